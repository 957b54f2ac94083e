"""AdamW whose weights, moments and accumulated gradients are fp32 whatever dtype the model computes in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_NORM_CHUNK = 65_536


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over named parameters, with fp32 masters for low-precision ones.

        w <- w - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)

    A bf16 parameter is a rounded copy of its fp32 master, remade after every step: an update of lr 1e-6 is far below
    half a bf16 ulp of most weights, so without a master it would be rounded away. An fp32 (or fp64) parameter is its
    own master. Gradients of micro-batches add up in fp32: a hook moves each low-precision gradient into the master's
    buffer as soon as backward has made it, so there is never a second set of them. The buffers exist only between the
    first backward and the step.

    Weight decay touches matrices only (two dimensions or more), not norms and biases. A parameter shared by two
    modules counts once, under its first name; one that does not require a gradient is left out. A parameter without a
    gradient keeps weight and moments unchanged in that step, as in torch.

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
    ) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, Tensor] = {}
        handles: list[RemovableHandle] = []
        seen: set[int] = set()
        for name, parameter in named_parameters:
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            assert name not in self._parameters, f"two parameters are called {name!r}"
            seen.add(id(parameter))
            self._parameters[name] = parameter
            if parameter.dtype in _LOW_PRECISION:
                master = parameter.detach().float()
                handles.append(parameter.register_post_accumulate_grad_hook(_move_gradient_to(master)))
            else:
                master = parameter
            self._masters[name] = master
        if not self._parameters:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        # Without this, a dropped optimizer's hooks would go on taking the gradients of its successor.
        weakref.finalize(self, _remove_all, handles)

        decayed = [master for master in self._masters.values() if master.ndim >= 2]
        not_decayed = [master for master in self._masters.values() if master.ndim < 2]
        groups = [
            {"params": masters, "weight_decay": decay}
            for masters, decay in ((decayed, weight_decay), (not_decayed, 0.0))
            if masters
        ]
        self._inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients in the masters' dtype, not copies; parameters without one are left out."""
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def grad_norm(self) -> float:
        """The Euclidean norm of all accumulated gradients together; inf or nan if any entry is not finite.

        In pieces, because torch adds up a whole CPU tensor in a few fp32 lanes: over the 28 million entries of an
        embedding that loses 0.2 %.
        """
        pieces = [piece for gradient in self.gradients() for piece in gradient.reshape(-1).split(_NORM_CHUNK)]
        return get_total_norm(pieces).item()

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply every accumulated gradient by factor, in place."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    @torch.no_grad()
    def step(self, *, lr: float) -> None:
        """One update from the accumulated gradients, which are kept until `zero_grad`."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._inner.step()
        self._round_masters()

    def zero_grad(self) -> None:
        """Free the accumulated gradients."""
        for name, master in self._masters.items():
            master.grad = None
            self._parameters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on, flat for safetensors; the tensors are the live ones, not copies.

        Keys: step.NAME, exp_avg.NAME and exp_avg_sq.NAME once NAME has been updated, and master.NAME for
        low-precision parameters only: an fp32 parameter is its own master, so the model's file has it. That file must
        therefore keep the parameters' dtype.
        """
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                state[f"master.{name}"] = master
            for key, value in self._inner.state.get(master, {}).items():
                state[f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` returned, and remake the low-precision parameters from their masters.

        ValueError, before anything is changed, when a name is missing or unknown or a shape differs.
        """
        expected: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                expected[f"master.{name}"] = master
            if any(f"{key}.{name}" in state for key in ("step", "exp_avg", "exp_avg_sq")):
                expected[f"step.{name}"] = torch.zeros((), dtype=torch.float32)
                expected[f"exp_avg.{name}"] = expected[f"exp_avg_sq.{name}"] = master
        _check_same("is missing from", expected.keys() - state.keys())
        _check_same("is not known to this model but in", state.keys() - expected.keys())
        for key, tensor in expected.items():
            if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
                raise ValueError(
                    f"optimizer state {key} is {state[key].dtype} {list(state[key].shape)}, this model needs "
                    f"{tensor.dtype} {list(tensor.shape)}: resume with the model and dtype of the checkpoint"
                )
        self._inner.state.clear()
        for name, master in self._masters.items():
            if f"master.{name}" in expected:
                master.copy_(state[f"master.{name}"])
            if f"step.{name}" in expected:
                self._inner.state[master] = {
                    key: state[f"{key}.{name}"].to(master.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self._round_masters()

    def _round_masters(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])


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
