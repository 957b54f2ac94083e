"""Prompts -> completions, with the logprob of every sampled token."""

from strop.generation.engine import Engine, EngineStats
from strop.generation.naive import naive_generate

__all__ = ["Engine", "EngineStats", "naive_generate"]
