"""AdamW whose weights and moments are fp32 whatever dtype the model computes in."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from strop.native import kernels as native
from strop.optim import eight_bit
from strop.optim.eight_bit import Moments
from strop.optim.own_pages import fill_lasting_, lasting_zeros
from strop.optim.split import SplitMaster
from strop.optim.state import State

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_NORM_CHUNK = 65_536


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over named parameters, with fp32 masters for low-precision ones.

        w <- w - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)

    A bf16 parameter is a rounded copy of its fp32 master, remade after every step: an update of lr 1e-6 is far below
    half a bf16 ulp of most weights, so without a master it would be rounded away. An fp32 (or fp64) parameter is its
    own master. Where strop.native has kernels, a bf16 parameter is itself the upper half of its master and only the
    lower 16 bits are stored beside it (SplitMaster).

    Gradients of micro-batches add up in fp32: a hook takes each low-precision gradient as soon as backward has made it,
    so there is never a second set of them. A split master keeps the gradient of a first micro-batch in bf16, which is
    exact, and widens it when a second one arrives. The buffers exist only between the first backward and the step.

    Weight decay touches matrices only (two dimensions or more), not norms and biases. A parameter shared by two
    modules counts once, under its first name; one that does not require a gradient is left out. A parameter without a
    gradient keeps weight and moments unchanged in that step, as in torch.

    is_8bit: the moments of every parameter of eight_bit.MIN_ENTRIES entries or more take a byte each (eight_bit.py).

    The learning rate is given to each step, not kept: `learning_rate` makes it a pure function of the step.
    Use through `optimizer_step`, which clips and refuses non-finite gradients.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        is_8bit: bool = False,
    ) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, Tensor] = {}
        """Those that torch updates."""
        self._split: dict[str, SplitMaster] = {}
        """Those that the kernels update."""
        self._eight_bit: dict[str, Moments] = {}
        """Moments of those masters that eight_bit.step_ updates; empty before the first update."""
        self._is_8bit = is_8bit
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        handles: list[RemovableHandle] = []
        seen: set[int] = set()
        for name, parameter in named_parameters:
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            assert name not in self._parameters, f"two parameters are called {name!r}"
            seen.add(id(parameter))
            self._parameters[name] = parameter
            if native.has_kernels(parameter) and parameter.is_contiguous():
                self._split[name] = split = SplitMaster(parameter, is_8bit=self._has_8bit(parameter))
                handles.append(parameter.register_post_accumulate_grad_hook(split.take_gradient))
            elif parameter.dtype in _LOW_PRECISION:
                self._masters[name] = master = parameter.detach().float()
                handles.append(parameter.register_post_accumulate_grad_hook(_move_gradient_to(master)))
            else:
                self._masters[name] = parameter
            if name in self._masters and self._has_8bit(parameter):
                self._eight_bit[name] = {}
        if not self._parameters:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        # Without this, a dropped optimizer's hooks would go on taking the gradients of its successor.
        weakref.finalize(self, _remove_all, handles)

        by_torch = [master for name, master in self._masters.items() if name not in self._eight_bit]
        decayed = [master for master in by_torch if master.ndim >= 2]
        not_decayed = [master for master in by_torch if master.ndim < 2]
        groups = [
            {"params": masters, "weight_decay": decay}
            for masters, decay in ((decayed, weight_decay), (not_decayed, 0.0))
            if masters
        ]
        self._inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True) if groups else None

    def _has_8bit(self, parameter: Tensor) -> bool:
        return self._is_8bit and parameter.numel() >= eight_bit.MIN_ENTRIES

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients in the masters' dtype, not copies; parameters without one are left out.

        Those kept in bf16 are widened for it: for looking and for tests, not for every step.
        """
        gradients = (
            self._split[name].wide_gradient() if name in self._split else self._masters[name].grad
            for name in self._parameters
        )
        return [gradient for gradient in gradients if gradient is not None]

    @property
    def has_gradients(self) -> bool:
        return any(split.gradient is not None for split in self._split.values()) or any(
            master.grad is not None for master in self._masters.values()
        )

    @property
    def has_moments(self) -> bool:
        """Whether anything has been updated yet."""
        return any(self._moments(name) for name in self._parameters)

    def grad_norm(self) -> float:
        """The Euclidean norm of all accumulated gradients together; inf or nan if any entry is not finite.

        In pieces, because torch adds up a whole CPU tensor in a few fp32 lanes: over the 28 million entries of an
        embedding that loses 0.2 %.
        """
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        pieces = [piece for gradient in gradients for piece in gradient.reshape(-1).split(_NORM_CHUNK)]
        norm = get_total_norm(pieces).item()
        if not self._split:
            return norm
        squares = sum(native.square_sum(s.gradient) for s in self._split.values() if s.gradient is not None)
        return math.sqrt(squares + norm**2)

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: float = 1.0) -> None:
        """One update from the accumulated gradients times grad_scale; they are kept until `zero_grad`."""
        for name, split in self._split.items():
            split.step(
                self._parameters[name],
                lr=lr,
                grad_scale=grad_scale,
                betas=self._betas,
                eps=self._eps,
                weight_decay=self._weight_decay,
            )
        for name, moments in self._eight_bit.items():
            master = self._masters[name]
            if master.grad is None:
                continue
            if not moments:
                moments.update(eight_bit.zeros(master))
            eight_bit.step_(
                master.detach(),
                master.grad,
                moments,
                lr=lr,
                grad_scale=grad_scale,
                betas=self._betas,
                eps=self._eps,
                weight_decay=self._weight_decay if master.ndim >= 2 else 0.0,
            )
        if self._inner is not None:
            for group in self._inner.param_groups:
                group["lr"] = lr
                for master in group["params"]:
                    if master.grad is None:
                        continue
                    if grad_scale != 1.0:
                        master.grad.mul_(grad_scale)
                    if not self._inner.state[master] and master.is_contiguous():
                        self._inner.state[master] = _lasting_moments(master)
            self._inner.step()
        self._round_masters()

    def zero_grad(self) -> None:
        """Free the accumulated gradients."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None
        for split in self._split.values():
            split.gradient = None

    def state_dict(self) -> State:
        """All that the next step depends on, flat for safetensors; the tensors are the live ones, not copies.

        Keys: step.NAME, exp_avg.NAME and exp_avg_sq.NAME once NAME has been updated (of 8-bit moments also
        exp_avg_scale.NAME and exp_avg_sq_scale.NAME), and master.NAME for low-precision parameters only: an fp32
        parameter is its own master, so the model's file has it. That file must therefore keep the parameters' dtype.
        Split masters are put together when asked for: the same file on every machine, and no second set of them.
        """
        state: dict[str, Tensor | Callable[[], Tensor]] = {}
        for name, parameter in self._parameters.items():
            if name in self._split:
                state[f"master.{name}"] = partial(self._split[name].joined, parameter)
            elif self._masters[name] is not parameter:
                state[f"master.{name}"] = self._masters[name]
            for key, value in self._moments(name).items():
                state[f"{key}.{name}"] = value
        return State(state)

    def _moments(self, name: str) -> Mapping[str, Tensor]:
        if name in self._split:
            return self._split[name].moments
        if name in self._eight_bit:
            return self._eight_bit[name]
        assert self._inner is not None
        return self._inner.state.get(self._masters[name], {})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` returned, and remake the low-precision parameters from their masters.

        ValueError, before anything is changed, when a name is missing or unknown or a shape differs.
        """
        expected: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            wide = self._masters[name] if name in self._masters else parameter.detach().to("meta", torch.float32)
            if wide is not parameter:
                expected[f"master.{name}"] = wide
            layout = eight_bit.layout(parameter) if self._has_8bit(parameter) else _fp32_layout(wide)
            if any(f"{key}.{name}" in state for key in layout):
                expected |= {f"{key}.{name}": tensor for key, tensor in layout.items()}
        _check_same("is missing from", expected.keys() - state.keys())
        _check_same("is not known to this model but in", state.keys() - expected.keys())
        for key, tensor in expected.items():
            if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
                raise ValueError(
                    f"optimizer state {key} is {state[key].dtype} {list(state[key].shape)}, this model needs "
                    f"{tensor.dtype} {list(tensor.shape)}: resume with the model, dtype and optimizer state of the "
                    "checkpoint"
                )
        if self._inner is not None:
            self._inner.state.clear()
        for name, parameter in self._parameters.items():
            moments: dict[str, Tensor] = {}
            if f"step.{name}" in expected:
                keys = eight_bit.layout(parameter) if self._has_8bit(parameter) else ("step", "exp_avg", "exp_avg_sq")
                moments = {key: _lasting_copy(state[f"{key}.{name}"], parameter) for key in keys}
            if name in self._split:
                self._split[name].load(parameter, state[f"master.{name}"], moments)
                continue
            master = self._masters[name]
            if master is not parameter:
                master.copy_(state[f"master.{name}"])
            if name in self._eight_bit:
                self._eight_bit[name] = moments
            elif moments:
                assert self._inner is not None
                self._inner.state[master] = moments
        self._round_masters()

    def _round_masters(self) -> None:
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)


def _fp32_layout(wide: Tensor) -> dict[str, Tensor]:
    return {"step": torch.empty((), device="meta"), "exp_avg": wide, "exp_avg_sq": wide}


def _lasting_moments(master: Tensor) -> dict[str, Tensor]:
    """What torch makes at a master's first step."""
    moments = {"step": torch.zeros((), device=master.device)}
    return moments | {
        key: lasting_zeros(master.shape, master.dtype, master.device) for key in ("exp_avg", "exp_avg_sq")
    }


def _lasting_copy(values: Tensor, parameter: Tensor) -> Tensor:
    return fill_lasting_(lasting_zeros(values.shape, values.dtype, parameter.device), values)


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "two optimizers over one parameter: the other one took its gradient"
        parameter.grad = None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return move


def _remove_all(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _check_same(problem: str, names: Iterable[str]) -> None:
    wrong = sorted(names)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{wrong[0]}{more} {problem} the optimizer state: resume with the model and dtype of the checkpoint"
        )
