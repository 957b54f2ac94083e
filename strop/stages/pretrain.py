"""Pre-training: predict the next token of raw text. Not RL: nothing is sampled, every token is its own label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from strop.data import PretrainBatches, TokenShards, build_shards, stream_texts
from strop.data.sources import source_hash
from strop.evals.text import bits_per_byte
from strop.generation import Engine
from strop.models import CausalLM, Checkpointing, ModelConfig, init_model, load_model, save_model
from strop.optim import OptimizerConfig, SkippedSteps
from strop.runs import Interrupt, Progress, Start, derive_seed, start_run
from strop.stages.begin import at_least, check_optimizer, chosen_dtype, in_its_dtype, kept_tokenizer, load_tokenizer
from strop.stages.supervised import restore, save_failed_batch, supervised_step
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Request, SamplingParams

SAMPLE_TOKENS = 64
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of the training mixture."""

    path: str
    """A text, JSONL or Parquet file, a folder of them, or hf:NAME, with documents in a `text` column."""
    weight: float = 1.0
    """Its share of the tokens relative to the other sources, whatever their sizes; a small source is repeated."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A new model's size; a Llama-style decoder."""

    hidden_size: int = 256
    """Width of the residual stream (D)."""
    num_layers: int = 6
    """Transformer layers (L)."""
    num_heads: int = 8
    """Query heads (N); the head width is hidden_size / num_heads."""
    num_kv_heads: int = 4
    """Key-value heads (K), shared by groups of query heads."""
    intermediate_size: int = 704
    """Width of the gated MLP."""
    tie_embeddings: bool = True
    """Whether input embedding and output head are one matrix."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""

    def check(self) -> None:
        """ValueError for sizes that do not go together."""
        at_least(
            self, 1, "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", prefix="model."
        )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}"
            )
        if (head_dim := self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"model.hidden_size / model.num_heads = {head_dim} is odd, but rotations need pairs")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Next-token pre-training, from scratch or going on from a checkpoint."""

    data: tuple[Source, ...]
    """The training mixture."""
    eval_data: str = ""
    """Held-out documents: their bits per byte are logged every eval_every steps."""
    eval_bytes: int = 200_000
    """Only the first so many bytes of eval_data."""
    init_from: str = ""
    """A checkpoint to go on from (`from` in a recipe); empty = a new model of the given shape."""
    tokenizer: str = ""
    """Folder or hub name of a tokenizer; empty = the checkpoint's own, or a new BPE of vocab_size from the data."""
    vocab_size: int = 4096
    """Size of a new tokenizer."""
    model: Shape = field(default_factory=Shape)
    """Size of a new model."""
    context_length: int = 256
    """Longest stretch of one document that is predicted in one go; documents never attend to one another."""
    num_steps: int
    """Optimiser steps."""
    batch_tokens: int = 16384
    """Tokens per optimiser step."""
    micro_batch_tokens: int = 4096
    """Tokens per forward and backward pass: bounds the activation memory, never the result."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=2e-3, schedule="cosine", warmup_steps=20, final_fraction=0.1, beta2=0.95, weight_decay=0.1
        )
    )
    """AdamW and its schedule."""
    sample_prompts: tuple[str, ...] = ()
    """Beginnings that the model continues at every evaluation, into samples.jsonl."""
    eval_every: int = 100
    """Steps between evaluations; the last step always has one."""
    save_every: int = 200
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
    """Decides initial weights and the order of the text."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError('data is empty: name at least one source, for example data = [{ path = "corpus.txt" }]')
        at_least(self, 1, "context_length", "num_steps", "eval_bytes", "eval_every", "save_every", "keep_checkpoints")
        at_least(self, 0, "seed")
        check_optimizer(self.optimizer, self.num_steps)
        if self.micro_batch_tokens < self.context_length:
            raise ValueError(
                f"micro_batch_tokens={self.micro_batch_tokens} is smaller than context_length={self.context_length}: "
                "raise the one or lower the other"
            )
        if self.batch_tokens < self.context_length:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is smaller than context_length={self.context_length}: "
                "raise the one or lower the other"
            )
        if self.init_from and self.model != Shape():
            raise ValueError("model is the shape of a new model, but init_from has one already: remove one of the two")
        if (self.init_from or self.tokenizer) and self.vocab_size != Config.vocab_size:
            raise ValueError("vocab_size is for a new tokenizer, but there is one already: remove vocab_size")
        self.model.check()


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
    """Pre-train; returns the run folder. Raises ValueError for bad input, DivergedError when updates keep failing."""
    hashes = {source.path: source_hash(source.path) for source in config.data}
    if config.eval_data:
        hashes[config.eval_data] = source_hash(config.eval_data)
    eval_texts = list(_first_bytes(config.eval_data, config.eval_bytes)) if config.eval_data else []
    start = start_run(
        runs_dir, name, stage="pretrain", config=config, init_from=config.init_from, data_hashes=hashes,
        seed=config.seed, resume=resume,
    )  # fmt: skip
    with start, Interrupt() as interrupt:
        run = start.run
        tokenizer = kept_tokenizer(start, lambda: _tokenizer(config, start))
        shards = build_shards([source.path for source in config.data], tokenizer, run.path / "shards")
        model = _model(config, start, tokenizer)
        tokenizer.check_fits(model.config.vocab_size)
        requests = _sample_requests(config, tokenizer, model.config.max_position_embeddings)
        batches = _batches(config, shards)
        optimizer = config.optimizer.build(model.named_parameters())
        skipped = SkippedSteps(config.optimizer.max_skipped_steps)
        restore(start, optimizer, batches, skipped)
        if start.resumed is None:
            print(
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters in {model.dtype}; "
                f"{shards.num_tokens / 1e6:.2f} M tokens of {shards.num_bytes / 1e6:.2f} MB; vocabulary "
                f"{tokenizer.vocab_size}; {config.num_steps * config.batch_tokens / shards.num_tokens:.1f} epochs",
                flush=True,
            )

        def write_model(folder: Path) -> None:
            save_model(model, folder)
            tokenizer.save(folder)

        with Progress("pretrain", total_steps=config.num_steps, start_step=start.step) as progress:
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
                is_evaluated = is_last or step % config.eval_every == 0
                if is_evaluated and eval_texts:
                    report = bits_per_byte(
                        model,
                        tokenizer,
                        eval_texts,
                        context_length=config.context_length,
                        batch_tokens=config.micro_batch_tokens,
                    )
                    metrics |= {"eval/bits_per_byte": report["bits_per_byte"], "eval/loss": report["loss"]}
                run.log(step, metrics | {"epoch": batches.epoch})
                # Where the gradient is not finite, the logits need not be, and the engine refuses to sample from such.
                if is_evaluated and requests and not metrics["skipped"]:
                    run.log_samples(step, _continuations(model, tokenizer, config, requests))
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


def _tokenizer(config: Config, start: Start) -> Tokenizer:
    """The tokenizer that a run begins with: the one asked for, the parent's, or a new one."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    if start.parent is not None:
        return load_tokenizer(start)
    texts = (text for source in config.data for _, text in stream_texts(source.path))
    return train_bpe(texts, config.vocab_size)


def _model(config: Config, start: Start, tokenizer: Tokenizer) -> CausalLM:
    dtype = chosen_dtype(start, config.dtype, config.device)
    if start.resumed or start.parent:
        model = load_model(start.model_folder, dtype=dtype, device=config.device)
        model.set_checkpointing(config.gradient_checkpointing)
        limit = model.config.max_position_embeddings
        if config.context_length > limit:
            raise ValueError(f"context_length={config.context_length} exceeds the model's {limit} positions: lower it")
        return model
    model_config = new_model_config(config, tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    model = init_model(model_config, seed=derive_seed(config.seed, "init"), dtype=dtype).to(config.device)
    model.set_checkpointing(config.gradient_checkpointing)
    return model


def new_model_config(
    config: Config, vocab_size: int, *, bos_id: int | None = None, eos_id: int | None = None
) -> ModelConfig:
    """The model that a run from scratch makes for a tokenizer of vocab_size ids."""
    shape = config.model
    return ModelConfig(
        # GEMMs run at full width on multiples of 64; the spare rows are never a label.
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=max(config.context_length, 2048),
        rope_theta=shape.rope_theta,
        tie_embeddings=shape.tie_embeddings,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )


def _batches(config: Config, shards: TokenShards) -> PretrainBatches:
    return PretrainBatches(
        shards,
        batch_tokens=config.batch_tokens,
        context_length=config.context_length,
        seed=derive_seed(config.seed, "text"),
        weights=[source.weight for source in config.data],
    )


def _sample_requests(config: Config, tokenizer: Tokenizer, max_positions: int) -> list[Request]:
    """One request per sample prompt. ValueError naming the first that is empty or too long."""
    sampling = SamplingParams(
        max_new_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, stop_token_ids=tokenizer.stop_token_ids
    )
    requests: list[Request] = []
    for index, prompt in enumerate(config.sample_prompts):
        ids = tuple(tokenizer.encode_prompt(prompt))
        if not 0 < len(ids) <= max_positions - SAMPLE_TOKENS:
            raise ValueError(
                f"sample_prompts[{index}] has {len(ids)} tokens: it needs at least one, and no more than "
                f"{max_positions - SAMPLE_TOKENS}, so that {SAMPLE_TOKENS} more fit into the model's {max_positions}"
            )
        requests.append(Request(prompt_ids=ids, sampling=sampling, seed=index))
    return requests


def _continuations(
    model: CausalLM, tokenizer: Tokenizer, config: Config, requests: Sequence[Request]
) -> list[dict[str, object]]:
    """What the model makes of each sample prompt."""
    groups = Engine(model, tokenizer, num_slots=len(requests)).generate(requests)
    return [
        {"prompt": prompt, "completion": group[0].text, "finish_reason": group[0].finish_reason}
        for prompt, group in zip(config.sample_prompts, groups, strict=True)
    ]


def _first_bytes(source: str, limit: int) -> Iterator[str]:
    """The documents at the beginning of a source, the last one cut so that they hold `limit` bytes."""
    for _, text in stream_texts(source):
        data = text.encode()
        # A character that the cut goes through is left out.
        yield text if len(data) <= limit else data[:limit].decode(errors="ignore")
        limit -= len(data)
        if limit <= 0:
            return
