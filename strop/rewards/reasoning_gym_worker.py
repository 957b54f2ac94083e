"""The process that scores reasoning-gym answers. Started by reasoning_gym.ReasoningGymReward; imports no torch."""

from __future__ import annotations

import functools
import re
from typing import Any

from strop.rewards.reasoning_gym_text import why_not_run
from strop.rewards.serve import Handler, last_line, serve

MEMORY_BYTES = 2 << 30

NOT_AN_ANSWER = ("zzz", "-", "I do not know.", "0 1 2 3", "9**9")
"""The best score of these is a task's floor: some scorers pay for any text, some for any text with a digit in it."""


def main() -> None:
    serve(_make_handler, respawn=True, memory_bytes=MEMORY_BYTES, prepare=prepare)


def _make_handler() -> Handler:
    import reasoning_gym  # noqa: F401  # before the fork: it takes seconds

    return answer_request


def prepare(request: dict[str, Any]) -> None:
    """Makes the question, and marks what is no answer: seconds in some datasets, and not the answer's own."""
    key = (request["dataset"], request["seed"], request["size"], request["index"])
    _entry(*key)
    if "answer" in request:
        _floor(*key)


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """A mark; the texts of an entry where there is no "answer" to mark."""
    if "answer" in request:
        return score(request)
    _, entry = _entry(request["dataset"], request["seed"], request["size"], request["index"])
    gold = entry["answer"]
    return {"question": entry["question"], "gold": None if gold is None else str(gold)}


def score(request: dict[str, Any]) -> dict[str, Any]:
    """The scorer's mark for request["answer"] (None: for the gold), the mark of nothing, and the entry's own texts."""
    key = (request["dataset"], request["seed"], request["size"], request["index"])
    dataset, entry = _entry(*key)
    gold = entry["answer"]
    answer = gold if request["answer"] is None else request["answer"]
    refusal = None if answer is None else why_not_run(request["dataset"], answer)
    if answer is None:
        mark, error = 0.0, "there is no gold answer"
    elif refusal is not None:
        mark, error = 0.0, refusal
    else:
        mark, error = _mark(request["dataset"], dataset, entry, answer)
    return {"score": mark, "floor": _floor(*key), "error": error, "question": entry["question"], "gold": gold}


@functools.lru_cache(maxsize=64)
def _dataset(name: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=size)


@functools.lru_cache(maxsize=4096)
def _entry(name: str, seed: int, size: int, index: int) -> tuple[Any, dict[str, Any]]:
    dataset = _dataset(name, seed, size)
    return dataset, dataset[index]


@functools.lru_cache(maxsize=4096)
def _floor(name: str, seed: int, size: int, index: int) -> float:
    *others, best = sorted(_mark(name, *_entry(name, seed, size, index), text)[0] for text in NOT_AN_ANSWER)
    # One alone may be right by accident: "9**9", of which a scorer reads the last number, where the answer is 9.
    return others[-1] if best >= 1.0 > others[-1] else best


def _mark(name: str, dataset: Any, entry: dict[str, Any], answer: str) -> tuple[float, str]:
    """A scorer that raises has not understood the answer: no mark."""
    try:
        mark = float(dataset.score_answer(answer=answer, entry=entry))
        if name == "puzzle24" and not _uses_the_numbers(answer, entry):
            return 0.0, "not the four numbers of the question"
        return mark, ""
    except MemoryError:
        raise
    except Exception as error:
        return 0.0, last_line(error)


def _uses_the_numbers(answer: str, entry: dict[str, Any]) -> bool:
    """puzzle24's own scorer counts the numbers and does not look which: 1*3*5 + 9 would solve every puzzle."""
    return sorted(map(int, re.findall(r"\d+", answer))) == sorted(entry["metadata"]["numbers"])
