"""Single-use boxes for code that a model wrote, and the proof that they hold (canary)."""

from strop.rewards.sandbox.canary import CanaryRow, canary

__all__ = ["CanaryRow", "canary"]
