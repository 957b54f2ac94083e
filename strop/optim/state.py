"""An optimiser's state whose largest tensors exist only while somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class State(Mapping[str, Tensor]):
    """Tensors by name, of which some are made anew whenever they are asked for: hold one at a time to save memory."""

    def __init__(self, parts: Mapping[str, Tensor | Callable[[], Tensor]]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        return part if isinstance(part, Tensor) else part()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __or__(self, other: Mapping[str, Tensor]) -> State:
        return State({**self._parts, **(other._parts if isinstance(other, State) else other)})

    def under(self, prefix: str) -> State:
        """The same tensors as PREFIX.NAME."""
        return State({f"{prefix}.{name}": part for name, part in self._parts.items()})
