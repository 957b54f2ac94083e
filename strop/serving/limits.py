"""How much one client, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Example: Limits(max_queue=64)"""

    num_slots: int = 32
    """Samples of one checkpoint that decode together."""
    max_length: int = 2048
    """Tokens of prompt and completion together; fewer where the model has fewer positions."""
    max_n: int = 64
    """Completions per prompt."""
    max_queue: int = 256
    """Samples that may wait for a slot, of all clients together; beyond it, 429."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_requests: int = 512
    """Requests under way at the same time, waiting ones included; beyond it, 503."""
    request_seconds: float = 600.0
    """After so long a request is given up."""
    stall_seconds: float = 60.0
    """How long a client may take to send its body, or to make room for the next piece of an answer."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_length", "max_n", "max_queue", "max_body", "max_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("request_seconds", "stall_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
