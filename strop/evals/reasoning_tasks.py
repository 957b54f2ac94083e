"""reasoning-gym's generated questions as tasks."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from typing import Any

from strop.rewards.reasoning_gym import check_dataset, make_entries, why_unfit

Row = dict[str, Any]

INSTRUCTION = "Give the final answer between <answer> and </answer>."


def reasoning_rows(names: list[str], *, size: int, seed: int) -> list[Row]:
    """`size` questions, dealt out evenly over the named datasets, decided by the seed.

    Columns: prompt, question, answer (the gold, which scores 1), dataset, seed, size and index, from which the reward
    generates the question again. Questions whose own answer would not score 1 are left out, with a warning: some golds
    are empty, not solved, or other ones at every start. Raises ValueError for an unknown dataset, composite, a seed or
    size that it refuses, and a dataset of which nothing is left; ImportError when reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError("reasoning-gym's tasks need reasoning-gym: pip install 'strop[tasks]'")
    from reasoning_gym.factory import DATASETS

    for name in names:
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"reasoning-gym has no dataset {name!r}{hint}")
        check_dataset(name, "suite")
    if size < len(names):
        raise ValueError(f"{size} tasks are too few for {len(names)} datasets")
    sources: list[Row] = []
    for place, name in enumerate(names):
        own = (size + len(names) - 1 - place) // len(names)
        sources += [{"dataset": name, "seed": seed, "size": own, "index": index} for index in range(own)]
    rows: list[Row] = []
    for source, entry in zip(sources, make_entries(sources), strict=True):
        if entry["gold"] is None:
            name = source["dataset"]
            raise ValueError(f"reasoning-gym's {name!r} gives no gold answer, so that its scorer cannot be checked")
        prompt = [{"role": "user", "content": f"{entry['question']}\n\n{INSTRUCTION}"}]
        rows.append({"prompt": prompt, "question": entry["question"], "answer": entry["gold"], **source})
    return _without_unfit(rows)


def _without_unfit(rows: list[Row]) -> list[Row]:
    reasons = why_unfit(rows)
    fit = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    unfit = [(row, reason) for row, reason in zip(rows, reasons, strict=True) if reason is not None]
    if lost := {row["dataset"] for row, _ in unfit} - {row["dataset"] for row in fit}:
        name, reason = next((row["dataset"], reason) for row, reason in unfit if row["dataset"] in lost)
        raise ValueError(f"no question of reasoning-gym's {name!r} can be judged; the first: {reason}")
    if unfit:
        row, reason = unfit[0]
        warnings.warn(
            f"{len(unfit)} of {len(rows)} questions are left out, since their own answer does not score 1; the first, "
            f"{row['dataset']} {row['index']}: {reason}",
            stacklevel=3,
        )
    return fit
