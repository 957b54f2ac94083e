"""A checkpoint opened for use: weights that nothing can change, and the proof that nothing did."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from strop.generation import Engine
    from strop.models import CausalLM
    from strop.tokenizer import Tokenizer
    from strop.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which checkpoint, and how to compute with it."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN[/STEP]|FOLDER")]
    """A run (its newest checkpoint), a run's step, or a Hugging Face folder."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype; auto is whichever of float32 and bfloat16 multiplies faster on this machine."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """How completions are drawn."""

    max_new_tokens: int = 256
    """Tokens after which a completion is cut."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Keep so many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the likeliest."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the model's own end of turn."""
    seed: int = 0
    """Decides every sample."""


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    model: CausalLM
    tokenizer: Tokenizer
    engine: Engine


@contextmanager
def frozen_model(arguments: ModelArguments, *, num_slots: int = 32) -> Iterator[FrozenModel]:
    """The checkpoint, read-only. The hash of its weights goes to stderr before and after, and a change raises."""
    from torch import nn

    from strop.generation import Engine
    from strop.models import compute_in, load_model, tokenizer_folder, weight_hash
    from strop.models.precision import name_of, own_precision
    from strop.runs import resolve
    from strop.tokenizer import Tokenizer

    checkpoint = resolve(arguments.model, arguments.runs_dir)
    with own_precision(arguments.dtype, arguments.device):
        dtype = compute_in(arguments.dtype, arguments.device)
        model = load_model(checkpoint.path, dtype=dtype, device=arguments.device, frozen=True)
        assert isinstance(model, nn.Module)
        tokenizer = Tokenizer.load(tokenizer_folder(checkpoint.path))
        tokenizer.check_fits(model.lm_head_weight.shape[0])
        before = weight_hash(model)
        print(f"{checkpoint.path}: {name_of(dtype)}, weights {before[:16]}", file=sys.stderr)
        yield FrozenModel(model=model, tokenizer=tokenizer, engine=Engine(model, tokenizer, num_slots=num_slots))
        after = weight_hash(model)
        assert after == before, f"the frozen weights have changed: {before} before, {after} after"
        print(f"weights {after[:16]}, unchanged", file=sys.stderr)


def sampling_params(arguments: SamplingArguments, tokenizer: Tokenizer) -> SamplingParams:
    from strop.types import SamplingParams

    return SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        stop=arguments.stop,
        stop_token_ids=tokenizer.stop_token_ids,
    )
