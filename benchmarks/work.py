"""The work that both systems do: prompts, examples, sizes; and how it is timed."""

from __future__ import annotations

import json
import resource
import statistics
from collections.abc import Sequence

WARM_UP_STEPS = 1
TIMED_STEPS = 3

GENERATION_BATCH = 32
PROMPT_TOKENS = 48
NEW_TOKENS = 64

GRPO_PROMPTS = 4
GRPO_GROUP = 8
GRPO_NEW_TOKENS = 64

LORA_RANK = 8
LORA_ALPHA = 16
LORA_LR = 1e-5

SFT_ROWS = 8

_SUBJECTS = (
    "the tides", "a lighthouse", "winter wheat", "the printing press", "a beehive", "glass", "the compass", "salt",
    "a river delta", "the bicycle", "paper", "a suspension bridge", "the telescope", "bread", "a glacier", "coral",
)  # fmt: skip


def questions(count: int) -> list[str]:
    """Open questions of about 20 words, so that answers run to the limit."""
    return [
        f"Please explain in a few sentences how {_SUBJECTS[i % len(_SUBJECTS)]} came to be important, and what people "
        f"thought about it {100 + 10 * i} years ago."
        for i in range(count)
    ]


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Question and answer of about 160 tokens together, of different lengths."""
    return [
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": " ".join([question] * (2 + i % 4))},
        ]
        for i, question in enumerate(questions(count))
    ]


def long_answer_reward(completions: Sequence, **_: object) -> list[float]:
    """Something cheap that differs between the answers of a group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count("e") / (1 + len(text)) for text in texts]


def report(tokens: Sequence[int], seconds: Sequence[float]) -> None:
    """Print the figures of this process as one JSON line; the warm-up steps are not among them."""
    rates = [count / second for count, second in zip(tokens, seconds, strict=True)]
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "tokens_per_second": round(statistics.median(rates), 2),
                "seconds_per_step": round(statistics.median(seconds), 3),
                "tokens_per_step": round(statistics.median(tokens), 1),
                "peak_gb": round(peak_kb / 1024**2, 3),
            }
        )
    )
