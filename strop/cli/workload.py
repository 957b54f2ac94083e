"""A recipe's config -> what one step of it does, for the forecast of `strop doctor --recipe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.models import ModelConfig
    from strop.stages.forecast import Learner, Workload
    from strop.tokenizer import Tokenizer


def workload(stage: str, config: Any, runs_dir: Path) -> Workload:
    """One step of the stage. ValueError for a stage, a device or a model that has no forecast."""
    if config.device != "cpu":
        raise ValueError(f"device = {config.device!r}: the forecast measures this machine's CPU; leave device out")
    import torch

    from strop.cli import workload_preferences, workload_rollouts
    from strop.models.native import check_int8_widths
    from strop.native.kernels import has_kernels

    plan = {
        "pretrain": _pretrain,
        "sft": _sft,
        "reward-model": workload_preferences.reward_model,
        "dpo": workload_preferences.dpo,
        "grpo": workload_rollouts.grpo,
        "ppo": workload_rollouts.ppo,
        "ttrl": workload_rollouts.ttrl,
    }
    if stage not in plan:
        raise ValueError(f"{stage} has no forecast: how long its games are is not known before they are played")
    planned = plan[stage](config, runs_dir)
    if planned.in_int8:
        for learner in planned.learners.values():
            check_int8_widths(learner.model, has_head=learner.output != "scores")
    return dataclasses.replace(planned, has_kernels=has_kernels(torch.empty(0, dtype=planned.dtype)))


def computed_in(config: Any) -> dict[str, Any]:
    """Workload's dtype and in_int8. The process computes in it while it is measured only (forecast_probe.measure)."""
    from strop.models.precision import resolved, weight_dtype

    name = resolved(config.dtype, config.device)
    return {"dtype": weight_dtype(name), "in_int8": name == "int8"}


def learner_of(config: Any, model: ModelConfig, **others: Any) -> Learner:
    """The network that the stage trains, as its settings have it."""
    from strop.stages.forecast import Learner

    return Learner(
        model=model,
        lora=getattr(config, "lora", None),
        checkpointing=config.gradient_checkpointing,
        is_8bit=config.optimizer.state == "8bit",
        **others,
    )


def _pretrain(config: Any, runs_dir: Path) -> Workload:
    from strop.stages.forecast import Workload, packed_segments
    from strop.stages.pretrain import new_model_config
    from strop.types import Segment

    if config.init_from:
        model, folder = checkpoint(config.init_from, runs_dir)
    else:
        vocab_size = load_tokenizer(Path(config.tokenizer)).vocab_size if config.tokenizer else config.vocab_size
        model, folder = new_model_config(config, vocab_size), None
    micro_batch = packed_segments([Segment(trunk=config.context_length)], _micro_tokens(config))
    return Workload(
        learner=learner_of(config, model),
        **computed_in(config),
        micro_batch=micro_batch,
        num_labels=sum(map(len, micro_batch)),
        tokens_per_step=config.batch_tokens,
        tokens_per_update=config.batch_tokens,
        file_bytes=file_bytes(folder),
    )


def _sft(config: Any, runs_dir: Path) -> Workload:
    from strop.data import load_rows, sft_examples
    from strop.stages.forecast import Workload, packed_segments
    from strop.types import Segment

    model, folder = checkpoint(config.init_from, runs_dir)
    assumptions: list[str] = []
    if Path(config.data).exists():
        rows = load_rows(config.data)
        tokenizer = load_tokenizer(folder)
        examples = sft_examples(rows, tokenizer, config.max_length, on_too_long=config.on_too_long)
        lengths = [example.num_labels for example in examples]
        share = sum(int(example.loss_mask[1:].sum()) for example in examples) / sum(lengths)
    else:
        lengths, share = [config.max_length - 1], 1.0
        assumptions.append(f"{config.data} is not there yet: examples of max_length, every token of which counts")
    # A step is what fits of the data; less than the budget where there is less.
    step_tokens = min(config.batch_tokens, sum(lengths)) if not assumptions else config.batch_tokens
    pattern = [Segment(trunk=length) for length in lengths]
    micro_batch = packed_segments(pattern, min(_micro_tokens(config), step_tokens))
    return Workload(
        learner=learner_of(config, model),
        **computed_in(config),
        micro_batch=micro_batch,
        num_labels=max(1, round(share * sum(map(len, micro_batch)))),
        tokens_per_step=step_tokens,
        tokens_per_update=step_tokens,
        file_bytes=file_bytes(folder),
        assumptions=tuple(assumptions),
    )


def _micro_tokens(config: Any) -> int:
    return min(config.micro_batch_tokens, config.batch_tokens)


def checkpoint(reference: str, runs_dir: Path) -> tuple[ModelConfig, Path]:
    """The shape of the model that a run starts from, and the folder with its weights: of an adapter, its base's."""
    from strop.models.adapters import base_folder, is_adapter
    from strop.models.folders import read_json
    from strop.models.huggingface import FAMILIES, config_from_dict
    from strop.runs import resolve

    folder = resolve(reference, runs_dir).path
    if is_adapter(folder):
        folder = Path(base_folder(folder))
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{folder}: model_type={raw.get('model_type')!r} runs through transformers, for which there is no "
            f"forecast; there is one for {', '.join(FAMILIES)}"
        )
    return config_from_dict(raw, str(folder / "config.json")), folder


def load_tokenizer(folder: Path) -> Tokenizer:
    from strop.tokenizer import Tokenizer

    return Tokenizer.load(folder)


def file_bytes(folder: Path | None) -> int:
    return 0 if folder is None else sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def smaller(stage: str, config: Any) -> Sequence[tuple[str, Any]]:
    """(what to change, the changed config) of everything that needs less memory; the largest steps last."""
    options: list[tuple[str, dict[str, Any]]] = []
    floor = {"pretrain": "context_length", "sft": "max_length"}.get(stage)
    least = getattr(config, floor) if floor else 1
    size = config.micro_batch_tokens
    while size // 2 >= max(least, 64):
        size //= 2
        options.append((f"micro_batch_tokens = {size}", {"micro_batch_tokens": size}))
    if config.gradient_checkpointing == "none":
        options.append(('gradient_checkpointing = "some"', {"gradient_checkpointing": "some"}))
    if config.gradient_checkpointing != "all":
        options.append(('gradient_checkpointing = "all"', {"gradient_checkpointing": "all"}))
    if config.optimizer.state != "8bit":
        narrow = dataclasses.replace(config.optimizer, state="8bit")
        options.append(('optimizer.state = "8bit"', {"optimizer": narrow}))
    if hasattr(config, "num_slots"):
        slots = config.num_slots
        while slots // 2 >= 8:
            slots //= 2
            options.append((f"num_slots = {slots}", {"num_slots": slots}))
    if stage in ("grpo", "ppo"):
        if config.kl_coef:
            off = {"reference_refresh_steps": 0} if stage == "grpo" else {"kl_target": None}
            options.append(("kl_coef = 0 (no reference)", {"kl_coef": 0.0, **off}))
        sampling, new_tokens = config.sampling, config.sampling.max_new_tokens // 2
        if new_tokens > getattr(config, "overlong_buffer", 0):
            shorter = dataclasses.replace(sampling, max_new_tokens=max(1, new_tokens))
            options.append((f"sampling.max_new_tokens = {new_tokens}", {"sampling": shorter}))
    if stage == "ppo" and config.critic.network == "own":
        shared = dataclasses.replace(config.critic, network="shared", start="", lr=None, warmup_steps=0)
        options.append(('critic.network = "shared"', {"critic": shared}))
    if config.dtype == "float32":
        options.append(('dtype = "bfloat16"', {"dtype": "bfloat16"}))
    if getattr(config, "lora", True) is None:
        from strop.models import LoraConfig

        options.append(("lora.rank = 8 (an adapter instead of all weights)", {"lora": LoraConfig()}))
    changed = []
    for what, change in options:
        try:
            changed.append((what, dataclasses.replace(config, **change)))
        except ValueError:  # the stage does not take it beside its other settings
            continue
    return changed
