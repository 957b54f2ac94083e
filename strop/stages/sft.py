"""SFT: supervised fine-tuning on examples of good answers. Not RL: the label is given, nothing is sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from strop.data import PackedBatches, load_rows, sft_examples
from strop.models import Checkpointing, LoraConfig, save_model
from strop.optim import OptimizerConfig, SkippedSteps
from strop.runs import Interrupt, Progress, derive_seed, start_run
from strop.stages.begin import (
    at_least,
    check_optimizer,
    chosen_dtype,
    in_its_dtype,
    kept_tokenizer,
    load_policy,
    load_tokenizer,
)
from strop.stages.supervised import check_lengths, mean_loss, restore, save_failed_batch, supervised_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Supervised fine-tuning on completions (Ouyang et al. 2022, step 1)."""

    init_from: str
    """Where to start: RUN, RUN/STEP or a Hugging Face folder (`from` in a recipe, --from on the command line)."""
    data: str
    """Examples: JSONL, Parquet, CSV or hf:NAME, with messages, prompt + completion, or text columns."""
    eval_data: str = ""
    """Held-out examples in the same format; their loss is logged every eval_every steps."""
    num_steps: int
    """Optimiser steps."""
    batch_tokens: int = 8192
    """Tokens per optimiser step, prompts included; examples stay whole, so a step has at most this many."""
    micro_batch_tokens: int = 2048
    """Tokens per forward and backward pass: bounds the activation memory, never the result."""
    max_length: int = 1024
    """Longest example in tokens; what happens to longer ones is on_too_long."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """Dropped and truncated examples are counted and reported."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-5, schedule="cosine"))
    """AdamW and its schedule."""
    lora: LoraConfig | None = None
    """Train only a LoRA adapter, its table [lora]; not set = all weights."""
    eval_every: int = 50
    """Steps between evaluations on eval_data; the last step always has one."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    gradient_checkpointing: Checkpointing = "some"
    """What backward passes compute again instead of keeping it: some of it, none (faster, more memory), or all layers
    (a third slower, least memory). The result is the same."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype; auto measures, int8 is faster and noisier (docs/speed.md). The weights that learn are float32 in
    any case."""
    device: str = "cpu"
    """A torch device."""
    seed: int = 0
    """Decides the order of the examples."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "eval_every", "save_every", "keep_checkpoints")
        at_least(self, 2, "max_length")
        at_least(self, 0, "seed")
        check_optimizer(self.optimizer, self.num_steps)
        if self.micro_batch_tokens < self.max_length:
            raise ValueError(
                f"micro_batch_tokens={self.micro_batch_tokens} is smaller than max_length={self.max_length}: "
                "an example is never cut, so raise the one or lower the other"
            )
        if self.batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens={self.batch_tokens} cannot hold an example of max_length={self.max_length}")


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
    """Fine-tune; returns the run folder. Raises ValueError for bad input, DivergedError when updates keep failing."""
    rows = load_rows(config.data)
    eval_rows = load_rows(config.eval_data) if config.eval_data else None
    hashes = {"data": rows.content_hash} | ({"eval_data": eval_rows.content_hash} if eval_rows is not None else {})
    start = start_run(
        runs_dir, name, stage="sft", config=config, init_from=config.init_from, data_hashes=hashes, seed=config.seed,
        resume=resume,
    )  # fmt: skip
    with start, Interrupt() as interrupt:
        run = start.run
        tokenizer = kept_tokenizer(start, lambda: load_tokenizer(start))
        dtype = chosen_dtype(start, config.dtype, config.device)
        model = load_policy(
            start, config.lora, dtype, config.device, config.seed, checkpointing=config.gradient_checkpointing
        )
        tokenizer.check_fits(model.config.vocab_size)
        examples = sft_examples(rows, tokenizer, config.max_length, on_too_long=config.on_too_long)
        check_lengths(examples, model.config.max_position_embeddings)
        batches = PackedBatches(examples, batch_tokens=config.batch_tokens, seed=derive_seed(config.seed, "examples"))
        held_out = []
        if eval_rows is not None:
            eval_examples = sft_examples(eval_rows, tokenizer, config.max_length, on_too_long="drop")
            check_lengths(eval_examples, model.config.max_position_embeddings)
            held_out = list(
                PackedBatches(
                    eval_examples, batch_tokens=config.micro_batch_tokens, seed=0, shuffle=False
                ).epoch_batches()
            )
        optimizer = config.optimizer.build(model.named_parameters())
        skipped = SkippedSteps(config.optimizer.max_skipped_steps)
        restore(start, optimizer, batches, skipped)

        def write_model(folder: Path) -> None:
            save_model(model, folder)
            tokenizer.save(folder)

        with Progress("sft", total_steps=config.num_steps, start_step=start.step) as progress:
            for step in range(start.step + 1, config.num_steps + 1):
                batch = next(batches)
                metrics = supervised_step(
                    model,
                    optimizer,
                    batch,
                    lr=config.optimizer.lr_at(step - 1, config.num_steps),
                    max_grad_norm=config.optimizer.max_grad_norm,
                    micro_batch_tokens=config.micro_batch_tokens,
                )
                is_last = step == config.num_steps
                if held_out and (is_last or step % config.eval_every == 0):
                    metrics["eval/loss"] = mean_loss(model, held_out, micro_batch_tokens=config.micro_batch_tokens)
                run.log(step, metrics | {"epoch": batches.epoch})
                skipped.record(bool(metrics["skipped"]), lambda batch=batch: save_failed_batch(run.path, batch))
                is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
                if is_last or step % config.save_every == 0 or is_stopped:
                    run.save_checkpoint(
                        step,
                        write_model,
                        optimizer.state_dict(),
                        {"batches": batches.state_dict(), "skipped": skipped.state_dict()},
                        keep_last=config.keep_checkpoints,
                    )
                progress.update(step, {"loss": metrics["loss"], "tokens/s": metrics["time/tokens_per_second"]})
                if is_stopped and not is_last:
                    interrupt.exit()
    return start.run.path
