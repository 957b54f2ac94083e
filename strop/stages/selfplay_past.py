"""Past selves of a self-play run: opponents that it has been, kept in runs/NAME/past."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from strop.models import CausalLM, save_model
from strop.runs import generator
from strop.runs.files import sync


class PastSelves:
    """The policy after every `every` steps. Which there are follows from the step alone, so that a resumed run has the
    same; and so does which of them a step meets.

    Playing against what one has been keeps a policy from going round in circles: a strategy that only beats the newest
    one may lose to an older (Silver et al. 2016 drew opponents at random for that reason).
    """

    def __init__(self, folder: Path, first: CausalLM, *, every: int, load: Callable[[Path], CausalLM]) -> None:
        """first: the model that the run began from, which is the first of them."""
        self.folder = folder
        self.first = first
        self.every = every
        self._load = load
        self._loaded: tuple[int, CausalLM] | None = None

    def draw(self, step: int, seed: int) -> tuple[int, CausalLM]:
        """Which past self a step (from 1) meets: the step that it is of, 0 for the beginning, and the model itself."""
        number = (step - 1) // self.every + 1
        chosen = self.every * int(torch.randint(number, (), generator=generator(seed, "past", step)))
        if not chosen:
            return 0, self.first
        if self._loaded is None or self._loaded[0] != chosen:
            self._loaded = None  # not two at a time
            self._loaded = chosen, self._load(self.path(chosen))
        return self._loaded

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def keep(self, step: int, policy: CausalLM) -> None:
        """After a step: the policy as it is now, where the step is one of those."""
        if step % self.every:
            return
        path = self.path(step)
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(policy, partial)
        for file in partial.iterdir():
            sync(file)
        # A run that was killed after this and before its checkpoint comes here again.
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
