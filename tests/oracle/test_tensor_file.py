"""The file that a checkpoint's training state is, against safetensors' own writer."""

from __future__ import annotations

import weakref

import torch
from safetensors.torch import load_file, save_file

from strop.optim import State
from strop.runs.tensors import write_tensors


def test_the_file_is_that_of_safetensors_byte_for_byte(tmp_path):
    random = torch.Generator().manual_seed(0)
    tensors = {
        "b.wide": torch.randn(3, 5, generator=random),
        "a.narrow": torch.randn(7, generator=random).bfloat16(),
        "é": torch.randn(2, 2, generator=random).double(),
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "codes": torch.arange(5, dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(4),
        "turned": torch.randn(3, 4, generator=random).T,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_values_made_when_asked_for_are_never_held_together(tmp_path):
    alive, most = 0, 0

    def let_go() -> None:
        nonlocal alive
        alive -= 1

    def make(value: float) -> torch.Tensor:
        nonlocal alive, most
        tensor = torch.full((100,), value)
        weakref.finalize(tensor.untyped_storage(), let_go)
        alive += 1
        most = max(most, alive)
        return tensor

    state = State({"kept": torch.ones(3)}) | State({"made": lambda: make(1.0)}).under("x") | {"more": torch.zeros(2)}
    state = state | State({f"y{place}": lambda place=place: make(float(place)) for place in range(4)})
    write_tensors(tmp_path / "file", state)
    read = load_file(tmp_path / "file")
    assert read.keys() == {"kept", "x.made", "more", "y0", "y1", "y2", "y3"} and torch.equal(read["y3"], state["y3"])
    assert most == 2  # the one before is let go when the next is there
