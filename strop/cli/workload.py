"""A recipe's config -> what one step of it does, for the forecast of `strop doctor --recipe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.models import ModelConfig
    from strop.stages.forecast import Workload
    from strop.tokenizer import Tokenizer
    from strop.types import Segment

STAGES = ("pretrain", "sft", "grpo", "ttrl")
"""Those that have a forecast."""

ASSUMED_PROMPT = 64
"""Tokens of a prompt where the tasks, or the tokenizer, cannot be read yet."""
MAX_TASKS = 200
"""Prompts looked at for their length."""


def workload(stage: str, config: Any, runs_dir: Path) -> Workload:
    """One step of the stage. ValueError for a stage, a device or a model that has no forecast."""
    if stage not in STAGES:
        raise ValueError(f"there is no forecast for the stage {stage} yet, only for {', '.join(STAGES)}")
    if config.device != "cpu":
        raise ValueError(f"device = {config.device!r}: the forecast measures this machine's CPU; leave device out")
    if stage == "ttrl" and not config.all_weights:
        raise ValueError("there is no forecast for an adapter yet: --all-weights forecasts training all weights")
    if stage != "ttrl" and getattr(config, "lora", None) is not None:
        raise ValueError("there is no forecast for [lora] yet: leave it out for the cost of training all weights")
    import torch

    from strop.native.kernels import has_kernels

    planned = {"pretrain": _pretrain, "sft": _sft, "grpo": _grpo, "ttrl": _ttrl}[stage](config, runs_dir)
    return dataclasses.replace(
        planned,
        has_kernels=has_kernels(torch.empty(0, dtype=planned.dtype)),
        is_8bit=config.optimizer.state == "8bit",
    )


def _pretrain(config: Any, runs_dir: Path) -> Workload:
    from strop.models import choose_dtype
    from strop.stages.forecast import Workload, packed_segments
    from strop.stages.pretrain import new_model_config
    from strop.types import Segment

    if config.init_from:
        model, folder = _checkpoint(config.init_from, runs_dir)
    else:
        vocab_size = _load_tokenizer(Path(config.tokenizer)).vocab_size if config.tokenizer else config.vocab_size
        model, folder = new_model_config(config, vocab_size), None
    micro_batch = packed_segments([Segment(trunk=config.context_length)], _micro_tokens(config))
    return Workload(
        model=model,
        dtype=choose_dtype(config.dtype),
        micro_batch=micro_batch,
        num_labels=sum(map(len, micro_batch)),
        tokens_per_step=config.batch_tokens,
        tokens_per_update=config.batch_tokens,
        file_bytes=_file_bytes(folder),
    )


def _sft(config: Any, runs_dir: Path) -> Workload:
    from strop.data import load_rows, sft_examples
    from strop.models import choose_dtype
    from strop.stages.forecast import Workload, packed_segments
    from strop.types import Segment

    model, folder = _checkpoint(config.init_from, runs_dir)
    assumptions: list[str] = []
    if Path(config.data).exists():
        rows = load_rows(config.data)
        tokenizer = _load_tokenizer(folder)
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
        model=model,
        dtype=choose_dtype(config.dtype),
        micro_batch=micro_batch,
        num_labels=max(1, round(share * sum(map(len, micro_batch)))),
        tokens_per_step=step_tokens,
        tokens_per_update=step_tokens,
        file_bytes=_file_bytes(folder),
        assumptions=tuple(assumptions),
    )


def _grpo(config: Any, runs_dir: Path) -> Workload:
    from strop.models import choose_dtype
    from strop.stages.forecast import Rollout, Workload

    model, folder = _checkpoint(config.init_from, runs_dir)
    prompt_tokens, num_eval, assumptions = _prompts(config, folder)
    new_tokens, num_prompts = config.sampling.max_new_tokens, config.prompts_per_step
    micro_batches = rollout_micro_batches(
        prompt_tokens, new_tokens, num_prompts, config.group_size, config.micro_batch_tokens
    )
    largest = max(micro_batches, key=lambda segments: sum(map(len, segments)))
    tokens = sum(len(segment) for segments in micro_batches for segment in segments)
    updates = -(-num_prompts // config.minibatch_prompts) if config.minibatch_prompts else 1
    is_kl_reward = config.kl_coef != 0 and config.kl_placement == "reward"
    passes = int(config.updates_share_a_rollout or is_kl_reward) + int(config.kl_coef != 0)
    if config.dynamic_sampling:
        assumptions.append("dynamic_sampling finds no flat group: every further round costs one more rollout")
    return Workload(
        model=model,
        dtype=choose_dtype(config.dtype),
        micro_batch=largest,
        num_labels=sum(sum(segment.branches) for segment in largest),
        tokens_per_step=tokens * config.epochs_per_rollout,
        tokens_per_update=tokens // updates,
        num_updates=updates * config.epochs_per_rollout,
        frozen_tokens=passes * tokens,
        has_reference=config.kl_coef != 0,
        with_entropy=True,
        file_bytes=_file_bytes(folder),
        rollout=Rollout(
            num_prompts=num_prompts,
            group_size=config.group_size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            num_slots=config.num_slots,
            eval_samples=num_eval,
        ),
        assumptions=(
            *assumptions,
            "every completion runs to sampling.max_new_tokens; the verifiers' time and memory are not in it",
        ),
    )


def _ttrl(config: Any, runs_dir: Path) -> Workload:
    """GRPO on group_size completions of the num_votes that are sampled; held-out prompts are its evaluation."""
    planned = _grpo(config.as_grpo(), runs_dir)
    assert planned.rollout is not None
    held_out = config.held_out.num_prompts * config.held_out.num_samples
    rollout = dataclasses.replace(planned.rollout, group_size=config.num_votes, eval_samples=held_out)
    return dataclasses.replace(planned, rollout=rollout)


def rollout_micro_batches(
    prompt_tokens: int, new_tokens: int, num_prompts: int, group_size: int, max_tokens: int
) -> list[tuple[Segment, ...]]:
    """The micro-batches that RolloutBatch.split makes of completions that all have new_tokens."""
    from strop.types import Segment

    trunk = prompt_tokens - 1
    micro_batches: list[tuple[Segment, ...]] = []
    current: dict[int, int] = {}  # prompt -> its completions
    total = 0
    for prompt in range(num_prompts):
        for _ in range(group_size):
            cost = new_tokens + (0 if prompt in current else trunk)
            if current and total + cost > max_tokens:
                micro_batches.append(_trees(current, trunk, new_tokens))
                current, total, cost = {}, 0, new_tokens + trunk
            current[prompt] = current.get(prompt, 0) + 1
            total += cost
    micro_batches.append(_trees(current, trunk, new_tokens))
    assert all(isinstance(segment, Segment) for segments in micro_batches for segment in segments)
    return micro_batches


def _trees(counts: dict[int, int], trunk: int, new_tokens: int) -> tuple[Segment, ...]:
    from strop.types import Segment

    return tuple(Segment(trunk=trunk, branches=(new_tokens,) * count) for count in counts.values())


def _prompts(config: Any, folder: Path) -> tuple[int, int, list[str]]:
    """(tokens of a prompt, completions of an evaluation, what had to be assumed)."""
    from strop.data import load_rows, tasks_from_rows
    from strop.rollouts.prompts import encode_prompt

    if not Path(config.tasks).exists():
        return ASSUMED_PROMPT, 0, [f"{config.tasks} is not there yet: prompts of {ASSUMED_PROMPT} tokens"]
    tokenizer = _load_tokenizer(folder)
    tasks = tasks_from_rows(load_rows(config.tasks))[:MAX_TASKS]
    lengths = [len(encode_prompt(task, tokenizer, 0, 2**62)) for task in tasks]
    num_eval = 0
    if config.eval.tasks and Path(config.eval.tasks).exists():
        num_eval = min(config.eval.max_tasks, len(load_rows(config.eval.tasks))) * config.eval.num_samples
    return max(2, round(sum(lengths) / len(lengths))), num_eval, []


def _micro_tokens(config: Any) -> int:
    return min(config.micro_batch_tokens, config.batch_tokens)


def _checkpoint(reference: str, runs_dir: Path) -> tuple[ModelConfig, Path]:
    """The shape of the model that a run starts from, and its folder."""
    from strop.models.folders import read_json
    from strop.models.huggingface import FAMILIES, config_from_dict
    from strop.runs import resolve

    folder = resolve(reference, runs_dir).path
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{folder}: model_type={raw.get('model_type')!r} runs through transformers, for which there is no "
            f"forecast; there is one for {', '.join(FAMILIES)}"
        )
    return config_from_dict(raw, str(folder / "config.json")), folder


def _load_tokenizer(folder: Path) -> Tokenizer:
    from strop.tokenizer import Tokenizer

    return Tokenizer.load(folder)


def _file_bytes(folder: Path | None) -> int:
    return 0 if folder is None else sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def smaller(stage: str, config: Any) -> Sequence[tuple[str, Any]]:
    """(what to change, the changed config) of everything that needs less memory; the largest steps last."""
    import dataclasses

    options: list[tuple[str, dict[str, Any]]] = []
    floor = {"pretrain": "context_length", "sft": "max_length"}.get(stage)
    least = getattr(config, floor) if floor else 1
    size = config.micro_batch_tokens
    while size // 2 >= max(least, 64):
        size //= 2
        options.append((f"micro_batch_tokens = {size}", {"micro_batch_tokens": size}))
    if stage == "grpo":
        slots = config.num_slots
        while slots // 2 >= 8:
            slots //= 2
            options.append((f"num_slots = {slots}", {"num_slots": slots}))
        if config.kl_coef:
            options.append(("kl_coef = 0 (no reference)", {"kl_coef": 0.0, "reference_refresh_steps": 0}))
        sampling, new_tokens = config.sampling, config.sampling.max_new_tokens // 2
        if new_tokens > config.overlong_buffer:
            shorter = dataclasses.replace(sampling, max_new_tokens=max(1, new_tokens))
            options.append((f"sampling.max_new_tokens = {new_tokens}", {"sampling": shorter}))
    if config.dtype == "float32":
        options.append(('dtype = "bfloat16"', {"dtype": "bfloat16"}))
    return [(what, dataclasses.replace(config, **change)) for what, change in options]
