"""One measurement of transformers' generate: python -m benchmarks.run_transformers JOB MODEL.

bf16 weights, sdpa attention, the default (dynamic) cache, plain sampling: the fastest of what was tried
(settings.py).
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks import work


def main(job_name: str, model_folder: str, setting: str = "bf16 sdpa") -> None:
    job = work.job(job_name)
    torch.manual_seed(0)
    options, generate_options = SETTINGS[setting]
    model = AutoModelForCausalLM.from_pretrained(model_folder, **options).eval()
    batch = torch.tensor(work.prompt_ids(model_folder, job.batch))

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **generate_options,
            )
        assert out.shape == (job.batch, work.PROMPT_TOKENS + new_tokens)
        return time.perf_counter() - start

    prefills, wholes = [], []
    for _ in range(job.warm_up + job.timed):
        prefills.append(seconds(1))
        wholes.append(seconds(job.new_tokens))
    decodes = [whole - prefill for whole, prefill in zip(wholes, prefills, strict=True)]
    work.report_generation(job.batch, job.new_tokens, prefills[job.warm_up :], decodes[job.warm_up :])


SETTINGS: dict[str, tuple[dict, dict]] = {
    "bf16 sdpa": ({"dtype": torch.bfloat16}, {}),
    "bf16 eager": ({"dtype": torch.bfloat16, "attn_implementation": "eager"}, {}),
    "bf16 sdpa static cache": ({"dtype": torch.bfloat16}, {"cache_implementation": "static", "disable_compile": True}),
    "fp32 sdpa": ({"dtype": torch.float32}, {}),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
