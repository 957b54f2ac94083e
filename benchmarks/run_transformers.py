"""One measurement of transformers' generate: python -m benchmarks.run_transformers generation MODEL."""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import work


def main(model_folder: str) -> None:
    """bf16 weights, sdpa attention, the default (dynamic) cache, plain sampling: the fastest of what was tried."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    ids = [
        tokenizer(question * 4)["input_ids"][: work.PROMPT_TOKENS] for question in work.questions(work.GENERATION_BATCH)
    ]
    batch = torch.tensor(ids)
    tokens, seconds = [], []
    for _ in range(work.WARM_UP_STEPS + work.TIMED_STEPS):
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=work.NEW_TOKENS,
                max_new_tokens=work.NEW_TOKENS,
                pad_token_id=tokenizer.eos_token_id,
            )
        seconds.append(time.perf_counter() - start)
        tokens.append(out.shape[0] * (out.shape[1] - batch.shape[1]))
    work.report(tokens[work.WARM_UP_STEPS :], seconds[work.WARM_UP_STEPS :])


if __name__ == "__main__":
    main(sys.argv[2])
