"""Optimisers, learning-rate schedules, and the one optimiser step of every stage."""

from strop.optim.adamw import AdamW
from strop.optim.config import OptimizerConfig
from strop.optim.diverged import DivergedError, SkippedSteps
from strop.optim.schedule import Schedule, learning_rate
from strop.optim.state import State
from strop.optim.step import StepReport, optimizer_step

__all__ = [
    "AdamW",
    "DivergedError",
    "OptimizerConfig",
    "Schedule",
    "SkippedSteps",
    "State",
    "StepReport",
    "learning_rate",
    "optimizer_step",
]
