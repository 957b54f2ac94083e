"""The work that all systems do: jobs, prompts, examples; and how it is timed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work, and who does it. Every measurement of it is a process of its own."""

    kind: Literal["machine", "generation", "sft", "grpo", "ppo", "dpo", "reward-model"]
    systems: tuple[str, ...]
    """Modules benchmarks.run_NAME, in the order of their turns; strop_int8 is run_strop with dtype int8."""
    batch: int = 0
    """generation: sequences; sft: rows; grpo, ppo: prompts; dpo, reward-model: pairs."""
    group: int = 1
    """grpo, ppo: completions per prompt."""
    new_tokens: int = 64
    """Longest completion; in generation every one has this length."""
    has_lora: bool = False
    """grpo: trains a LoRA adapter instead of all weights."""
    has_own_critic: bool = False
    """ppo: its critic is a network as large as the policy, and no head on the policy's trunk."""
    dtype: str = "auto"
    """What Strop computes in."""
    warm_up: int = 1
    """Steps before the clock counts."""
    timed: int = 3


OURS = ("strop", "strop_int8")

JOBS = {
    "machine": Job(kind="machine", systems=("machine",)),
    "generation-1": Job(kind="generation", systems=(*OURS, "transformers", "llama_cpp", "vllm"), batch=1),
    "generation-8": Job(kind="generation", systems=(*OURS, "transformers"), batch=8),
    "generation-32": Job(kind="generation", systems=(*OURS, "transformers", "llama_cpp", "vllm"), batch=32),
    "generation-64": Job(kind="generation", systems=(*OURS, "transformers"), batch=64, timed=2),
    "sft": Job(kind="sft", systems=(*OURS, "trl"), batch=8),
    "sft-8k": Job(kind="sft", systems=OURS, batch=54),
    "grpo-64": Job(kind="grpo", systems=(*OURS, "trl"), batch=4, group=8),
    "grpo-64-lora": Job(kind="grpo", systems=(*OURS, "trl"), batch=4, group=8, has_lora=True),
    "grpo-256": Job(kind="grpo", systems=(*OURS, "trl"), batch=4, group=16, new_tokens=256, timed=1),
    "ppo-64": Job(kind="ppo", systems=OURS, batch=4, group=8, has_own_critic=True),
    "ppo-64-shared": Job(kind="ppo", systems=OURS, batch=4, group=8),
    "dpo": Job(kind="dpo", systems=(*OURS, "trl"), batch=8),
    "reward-model": Job(kind="reward-model", systems=(*OURS, "trl"), batch=8),
}


def job(name: str) -> Job:
    """A job by name; NAME/1 times one step only, for a first look."""
    base, _, timed = name.partition("/")
    return dataclasses.replace(JOBS[base], timed=int(timed)) if timed else JOBS[base]


SHORT = ("machine", "generation-32", "sft", "grpo-64")
"""What `make bench` measures."""

PROMPT_TOKENS = 48
"""Of every prompt in generation."""

LORA_RANK = 8
LORA_ALPHA = 16
LORA_LR = 1e-5

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


def prompt_ids(model_folder: str, count: int) -> list[list[int]]:
    """The prompts of generation, PROMPT_TOKENS each: the same ids for every system."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model_folder) / "tokenizer.json"))
    return [tokenizer.encode(question * 4).ids[:PROMPT_TOKENS] for question in questions(count)]


def long_answer_reward(completions: Sequence, **_: object) -> list[float]:
    """Something cheap that differs between the answers of a group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count("e") / (1 + len(text)) for text in texts]


def pairs(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """A question of about 50 tokens as messages, and two answers of about 40 to 160 tokens, of different lengths."""
    asked = questions(count)
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": " ".join([question] * (1 + i % 3))}],
            "rejected": [{"role": "assistant", "content": " ".join([asked[i - 1]] * (1 + (i + 1) % 4))}],
        }
        for i, question in enumerate(asked)
    ]


def pair_tokens(tokenizer, rows: Sequence[dict]) -> int:  # a transformers tokenizer
    """Tokens of all rows written out, prompt and answer for each side: what a padded batch holds without padding.

    Both systems' rates are of these, so that their ratio is that of pairs per second.
    """
    written = [pair["prompt"] + pair[side] for pair in rows for side in ("chosen", "rejected")]
    return sum(len(ids) for ids in tokenizer.apply_chat_template(written, return_dict=True)["input_ids"])


def report(tokens: Sequence[float], seconds: Sequence[float], **others: float) -> None:
    """Print the figures of this process as one JSON line; the warm-up steps are not among the arguments."""
    rates = [count / second for count, second in zip(tokens, seconds, strict=True)]
    figures = {
        "tokens_per_second": statistics.median(rates),
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_step": statistics.median(tokens),
        "peak_gb": peak_gb(),
    }
    emit(figures | others)


def report_generation(
    batch: int, new_tokens: int, prefill_seconds: Sequence[float], decode_seconds: Sequence[float]
) -> None:
    """As report, for a batch whose completions all have new_tokens: the first token is the prefill's, the others cost
    one decode step each."""
    seconds = [first + rest for first, rest in zip(prefill_seconds, decode_seconds, strict=True)]
    report(
        [batch * new_tokens] * len(seconds),
        seconds,
        prefill_ms=1e3 * statistics.median(prefill_seconds),
        decode_step_ms=1e3 * statistics.median(decode_seconds) / (new_tokens - 1),
    )


def emit(figures: dict[str, float]) -> None:
    print(json.dumps({name: float(f"{value:.5g}") for name, value in figures.items()}))


def peak_gb() -> float:
    """Largest resident size that this process ever had (VmHWM), in 1e9 bytes.

    Not getrusage: its figure outlives an exec, so that a child begins with that of whoever started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise SystemExit("this system's /proc/self/status has no VmHWM")
