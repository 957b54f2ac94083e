"""`strop eval`: how often a checkpoint solves held-out tasks, or how well it predicts a text."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from strop.cli.frozen import FrozenModel, ModelArguments, SamplingArguments, frozen_model, sampling_params

if TYPE_CHECKING:
    from strop.rewards.config import RewardConfig

INTERVAL_ENDS = ("_low", "_high")


@dataclass(frozen=True, kw_only=True)
class Arguments(ModelArguments, SamplingArguments):
    """Frozen weights on held-out data: pass@k and maj@k (--suite NAME, or --tasks FILE --reward NAME), or bits per byte
    (--text FILE)."""

    suite: str | None = None
    """Tasks with their reward: humaneval, humaneval-chat, metamath:ql, metamath:set@wal, reasoning_gym:chain_sum,
    math:FILE (docs/tasks.md)."""

    tasks: str | None = None
    """Tasks: JSONL, Parquet or hf:NAME with a prompt column and what the reward needs (an answer column, say)."""
    reward: str | None = None
    """What judges the answers: math, code, format, length, a function as module:name or file.py:name, or a recipe's
    table such as '{ name = "model", options = { model = "RUN" } }'."""
    num_samples: int = 1
    """Answers per task."""
    k: tuple[int, ...] = (1,)
    """Report pass@k for each, at most num_samples."""
    limit: int | None = None
    """Only so many tasks, from the top of the file (of a generator: so many, 100 unless told)."""
    text: str | None = None
    """A text file or any other data source: report bits per byte."""
    context_length: int = 1024
    """Tokens that the model sees at a time in --text."""
    output: Path | None = None
    """Write every answer with its verdict to this JSONL file."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    if sum(source is not None for source in (arguments.tasks, arguments.suite, arguments.text)) != 1:
        raise ValueError("give one of --suite NAME, --tasks FILE (with --reward) and --text FILE")
    if arguments.tasks is not None and arguments.reward is None:
        raise ValueError(
            "--tasks needs --reward: math, code, format, length, or a function as module:name or file.py:name"
        )
    if arguments.text is not None and (arguments.reward is not None or arguments.output is not None):
        raise ValueError("--reward and --output belong to --tasks, not to --text")
    if arguments.suite is not None and arguments.reward is not None:
        raise ValueError("--suite brings its own reward: leave --reward out")
    with frozen_model(arguments) as frozen:
        metrics = evaluate_text(arguments, frozen) if arguments.text is not None else evaluate(arguments, frozen)
    print("\n".join(metric_lines(metrics)))
    return 0


def evaluate_text(arguments: Arguments, frozen: FrozenModel) -> dict[str, float]:
    from strop.data.sources import stream_texts
    from strop.evals.text import bits_per_byte

    assert arguments.text is not None
    texts = [text for _, text in stream_texts(arguments.text)]
    return bits_per_byte(frozen.model, frozen.tokenizer, texts, context_length=arguments.context_length)


def evaluate(arguments: Arguments, frozen: FrozenModel) -> dict[str, float]:
    from strop.data.sources import load_rows
    from strop.data.tasks import tasks_from_rows
    from strop.evals.suites import load_suite
    from strop.evals.tasks import evaluate_tasks
    from strop.rewards.base import ChecksTasks
    from strop.rewards.load import load_reward
    from strop.stages.begin import located_rewards

    if arguments.suite is not None:
        suite = load_suite(arguments.suite, size=arguments.limit, seed=arguments.seed)
        tasks, config = tasks_from_rows(suite.rows), suite.reward
    else:
        assert arguments.tasks is not None and arguments.reward is not None
        tasks = tasks_from_rows(load_rows(arguments.tasks))[: arguments.limit]
        (config,), _ = located_rewards([reward_config(arguments.reward)], arguments.runs_dir, arguments.device)
    reward = load_reward(config)
    try:
        if arguments.suite is not None and isinstance(reward, ChecksTasks):
            reward.check_tasks(tasks)
        report = evaluate_tasks(
            frozen.engine,
            frozen.tokenizer,
            tasks,
            reward,
            sampling=sampling_params(arguments, frozen.tokenizer),
            num_samples=arguments.num_samples,
            k=arguments.k,
            seed=arguments.seed,
        )
    finally:
        reward.close()
    if arguments.output is not None:
        lines = [
            {
                "id": sample.task.id,
                "prompt": sample.task.prompt,
                "completion": sample.completion.text,
                "finish_reason": sample.completion.finish_reason,
                "score": sample.verdict.score,
                "status": sample.verdict.status,
                "detail": sample.verdict.detail,
            }
            for sample in report.samples
        ]
        write_json_lines(arguments.output, lines)
    return report.metrics


def reward_config(text: str) -> RewardConfig:
    """--reward as a recipe would have it. ValueError for a table that a recipe could not have."""
    from strop.cli.config import build, read_values
    from strop.rewards.config import RewardConfig

    table: dict[str, Any] = {"name": text}
    if text.lstrip().startswith("{"):
        try:
            table = tomllib.loads(f"reward = {text}")["reward"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"--reward {text}: not a TOML table: {error}") from error
    return build(RewardConfig, read_values(table, RewardConfig, "--reward"), "--reward")


def metric_lines(metrics: Mapping[str, float]) -> list[str]:
    """One line per metric, its 95 % interval behind it where there is one."""
    lines: list[str] = []
    for name, value in metrics.items():
        if name.endswith(INTERVAL_ENDS):
            continue
        ends = [metrics.get(f"{name}{end}") for end in INTERVAL_ENDS]
        interval = "" if None in ends else f"   [{ends[0]:.4f}, {ends[1]:.4f}]"
        lines.append(f"{name:16}{value:>12,}" if isinstance(value, int) else f"{name:16}{value:>12.4f}{interval}")
    return lines


def write_json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
