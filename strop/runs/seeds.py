"""Randomness by name: every generator is derived from the run's seed and what it is for, so none has to be saved."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose: the first bits of BLAKE2b-64 over seed and parts, written as a Python tuple.

    So the parts are separated and typed: ("a", "bc") and ("ab", "c"), or 1 and "1", give different seeds.
    Example: derive_seed(run_seed, "rollout", step, task_index).
    """
    # int() because numpy's integers are written differently, ascii() because repr changes with Python's Unicode tables.
    key = (int(seed), *(part if isinstance(part, str) else int(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(ascii(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded with derive_seed(seed, *parts). Make one per step and purpose, do not carry it along."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *parts))
