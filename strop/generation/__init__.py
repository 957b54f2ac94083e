"""Prompts -> completions, with the logprob of every sampled token."""

from strop.generation.engine import Engine
from strop.generation.naive import naive_generate
from strop.generation.run import EngineStats, Run
from strop.generation.scoring import prompt_logprobs

__all__ = ["Engine", "EngineStats", "Run", "naive_generate", "prompt_logprobs"]
