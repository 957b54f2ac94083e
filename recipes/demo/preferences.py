"""The demo's rankings: answers of the SFT checkpoint, and a synthetic judge where `strop rank` has people.

The judge's taste is stated here, so that beside a reward model's opinion there always is a gold one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from strop.cli import rank_sampling
from strop.cli.rank import Arguments
from strop.data import load_rows, tasks_from_rows
from strop.ranking import PreferenceStore, export_rankings, rank_with_judge
from strop.runs import resolve
from strop.types import Message

JUDGE = "near-sum"
NUM_ANSWERS = 8
"""Per prompt; the equal ones among them are ranked once."""
MAX_NEW_TOKENS = 6
FARTHEST = 27
"""No sum of three digits is larger, so that an answer counts as no farther off than this."""
LENGTH_COST = 0.001
"""Per character: decides between two answers that are as near, and never against a nearer one."""
FILES = {"tasks": "preferences", "held_out": "preferences_held_out"}
"""The tasks that are answered -> the store and its exports."""


def taste(prompt: str | Sequence[Message], completions: Sequence[str]) -> list[float]:
    """The judge: the right sum first, then the nearer one, then the shorter text; what is no number comes last.

    A score per answer: 1 - distance / 27, from 1 for the right sum to 0, less 0.001 per character.
    """
    question = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    right = sum(map(int, re.findall(r"\d+", question)))
    return [1 - _distance(text, right) / FARTHEST - LENGTH_COST * len(text[:20]) for text in completions]


def _distance(text: str, right: int) -> int:
    is_number = re.fullmatch(r"\s*\d{1,9}\s*", text, flags=re.ASCII)
    return min(abs(int(text) - right), FARTHEST) if is_number else FARTHEST


def upside_down(prompt: str | Sequence[Message], completions: Sequence[str]) -> list[float]:
    """The control's judge: the worst answer first."""
    return [-score for score in taste(prompt, completions)]


def write_rankings(
    reference: str, folder: Path, runs_dir: Path, *, seed: int, suffix: str = "", is_upside_down: bool = False
) -> None:
    """Rankings of the checkpoint's answers to the training and the held-out tasks of `folder`, beside them.

    preferences.db              the store: `strop rank` opens it, to look at or to rank by hand
    preferences.jsonl           one ranking a line: reward models and DPO read it
    preferences_pairs.jsonl     the same, one pair a line, as TRL reads it
    preferences_held_out...     the same for the held-out tasks: to validate, never to train

    Goes on where an earlier call stopped, and does nothing where all is done. Raises ValueError where the store
    holds answers of other weights only.
    """
    checkpoint = resolve(reference, runs_dir)
    for tasks, name in FILES.items():
        path, listwise, pairs = (
            folder / f"{name}{end}" for end in (f"{suffix}.db", f"{suffix}.jsonl", f"_pairs{suffix}.jsonl")
        )
        with closing(PreferenceStore(path, create=True, seed=seed)) as store:
            known = {row["weights"] for row in store.query("SELECT weights FROM policies")}
            if known and checkpoint.content_hash not in known:
                raise ValueError(f"{path} holds answers of another {reference}; delete {folder / name}*{suffix}.*")
            if pairs.is_file():
                continue
            arguments = Arguments(
                store=path,
                from_=(reference,),
                num_completions=NUM_ANSWERS,
                max_new_tokens=MAX_NEW_TOKENS,
                seed=seed,
                runs_dir=runs_dir,
            )
            rank_sampling.sample_all(arguments, store, tasks_from_rows(load_rows(str(folder / f"{tasks}.jsonl"))))
            rank_with_judge(store, upside_down if is_upside_down else taste, name=JUDGE)
            export_rankings(store, "listwise", listwise)
            # Written last: where it is, all of this store is.
            export_rankings(store, "trl", pairs)
