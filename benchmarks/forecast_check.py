"""`strop doctor --recipe` against reality: forecast and measured peak memory and step time of real runs.

    python -m benchmarks.forecast_check [CASE ...] [--memory]

Forecast and run are each a process of its own, one after the other; the run takes three steps, the last two are timed.
Each case is added to benchmarks/results/forecast.json and .md. --memory is for a busy machine: two steps, and no times.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.__main__ import MODEL, ROOT, heading, origin
from strop.native.malloc import restart_for_large_blocks

RESULTS = ROOT / "benchmarks" / "results" / "forecast.json"
NUM_STEPS = 3
SHAPE_30M = {
    "hidden_size": 384, "num_layers": 8, "num_heads": 6, "num_kv_heads": 3, "intermediate_size": 1024,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain, 2.6 M, one micro-batch of 4096": (
        "pretrain",
        {
            "model": {"hidden_size": 192, "num_layers": 6, "num_heads": 6, "num_kv_heads": 3, "intermediate_size": 512},
            "vocab_size": 1024,
            "batch_tokens": 4096,
        },
    ),
    "pretrain, 32 M, 4 micro-batches of 2048": (
        "pretrain",
        {
            "model": SHAPE_30M, "tokenizer": "MODEL", "context_length": 512, "batch_tokens": 8192,
            "micro_batch_tokens": 2048,
        },
    ),
    "pretrain, 32 M, float32": (
        "pretrain",
        {
            "model": SHAPE_30M, "tokenizer": "MODEL", "context_length": 256, "batch_tokens": 2048,
            "micro_batch_tokens": 2048, "dtype": "float32",
        },
    ),
    "sft, 135 M, one micro-batch": ("sft", {"rows": 8, "batch_tokens": 2048, "micro_batch_tokens": 2048}),
    "sft, 135 M, micro-batches of 1024": ("sft", {"rows": 24, "batch_tokens": 4096, "micro_batch_tokens": 1024}),
    "grpo, 135 M, 4 x 8 x 64": (
        "grpo",
        {"group_size": 8, "sampling": {"max_new_tokens": 64}, "micro_batch_tokens": 2560, "num_slots": 32},
    ),
    "grpo, 135 M, 4 x 4 x 32, reference, micro-batches of 512": (
        "grpo",
        {
            "group_size": 4, "sampling": {"max_new_tokens": 32}, "micro_batch_tokens": 512, "num_slots": 16,
            "kl_coef": 0.05,
        },
    ),
    "grpo, 135 M, 2 x 8 x 128, minibatches, float32": (
        "grpo",
        {
            "group_size": 8, "prompts_per_step": 2, "minibatch_prompts": 1, "sampling": {"max_new_tokens": 128},
            "micro_batch_tokens": 1024, "num_slots": 16, "dtype": "float32",
        },
    ),
    "sft, 135 M, one micro-batch, nothing recomputed": (
        "sft", {"rows": 8, "batch_tokens": 2048, "micro_batch_tokens": 2048, "gradient_checkpointing": "none"},
    ),
    "sft, 135 M, one micro-batch, all recomputed": (
        "sft", {"rows": 8, "batch_tokens": 2048, "micro_batch_tokens": 2048, "gradient_checkpointing": "all"},
    ),
    "sft, 135 M, micro-batches of 1024, all recomputed": (
        "sft", {"rows": 24, "batch_tokens": 4096, "micro_batch_tokens": 1024, "gradient_checkpointing": "all"},
    ),
    "sft, 135 M, LoRA": ("sft", {"rows": 8, "batch_tokens": 2048, "micro_batch_tokens": 2048, "lora": {"rank": 8}}),
    "sft, 135 M, LoRA, micro-batches of 1024, all recomputed": (
        "sft",
        {
            "rows": 24, "batch_tokens": 4096, "micro_batch_tokens": 1024, "lora": {"rank": 8},
            "gradient_checkpointing": "all",
        },
    ),
    "grpo, 135 M, LoRA, 4 x 8 x 64, reference": (
        "grpo",
        {
            "group_size": 8, "sampling": {"max_new_tokens": 64}, "micro_batch_tokens": 2560, "num_slots": 32,
            "kl_coef": 0.05, "lora": {"rank": 8},
        },
    ),
    "dpo, 135 M, 8 pairs": ("dpo", {"rows": 8, "batch_size": 8, "micro_batch_tokens": 4096}),
    "dpo, 135 M, 8 pairs, micro-batches of 1024": (
        "dpo", {"rows": 8, "batch_size": 8, "micro_batch_tokens": 1024},
    ),
    "dpo, 135 M, LoRA, 8 pairs": (
        "dpo", {"rows": 8, "batch_size": 8, "micro_batch_tokens": 4096, "lora": {"rank": 8}},
    ),
    "dpo, 135 M, online, 4 x 4 x 64": (
        "dpo",
        {
            "online": {"tasks": "TASKS", "group_size": 4, "num_slots": 16}, "sampling": {"max_new_tokens": 64},
            "batch_size": 4, "micro_batch_tokens": 1024,
        },
    ),
    "reward-model, 135 M, 8 pairs": ("reward-model", {"rows": 8, "batch_size": 8, "micro_batch_tokens": 4096}),
    "reward-model, 135 M, 8 pairs, micro-batches of 1024": (
        "reward-model", {"rows": 8, "batch_size": 8, "micro_batch_tokens": 1024},
    ),
    "ppo, 135 M, 4 x 8 x 64, own critic": (
        "ppo",
        {
            "group_size": 8, "sampling": {"max_new_tokens": 64}, "micro_batch_tokens": 2560, "num_slots": 32,
            "kl_coef": 0.0, "epochs_per_rollout": 1,
        },
    ),
    "ppo, 135 M, 4 x 8 x 64, shared trunk": (
        "ppo",
        {
            "group_size": 8, "sampling": {"max_new_tokens": 64}, "micro_batch_tokens": 2560, "num_slots": 32,
            "kl_coef": 0.0, "epochs_per_rollout": 1, "critic": {"network": "shared"},
        },
    ),
    "ppo, 135 M, 4 x 4 x 32, own critic, reference, reward model, micro-batches of 512": (
        "ppo",
        {
            "group_size": 4, "sampling": {"max_new_tokens": 32}, "micro_batch_tokens": 512, "num_slots": 16,
            "epochs_per_rollout": 2, "rewards": [{"name": "model", "options": {"model": "REWARD_MODEL"}}],
        },
    ),
    "ppo, 135 M, LoRA, 4 x 8 x 64, shared trunk, reward model": (
        "ppo",
        {
            "group_size": 8, "sampling": {"max_new_tokens": 64}, "micro_batch_tokens": 2560, "num_slots": 32,
            "epochs_per_rollout": 1, "critic": {"network": "shared"}, "lora": {"rank": 8},
            "rewards": [{"name": "model", "options": {"model": "REWARD_MODEL"}}],
        },
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=int, help=f"numbers from 1 to {len(CASES)} (all)")
    parser.add_argument("--memory", action="store_true", help="record peak memory only")
    parser.add_argument("--do", choices=("forecast", "run"), help="only one half of one case, as JSON")
    options = parser.parse_args()
    chosen = [list(CASES)[number - 1] for number in options.cases] or list(CASES)
    if options.do:
        steps = 2 if options.memory else NUM_STEPS
        work.emit({"forecast": forecast_case, "run": run_case}[options.do](chosen[0], steps))
        return 0
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for case in chosen:
        number = str(list(CASES).index(case) + 1)
        ahead, real = (_half(number, what, *["--memory"] * options.memory) for what in ("forecast", "run"))
        print(case, ahead, real, file=sys.stderr, flush=True)
        if options.memory:
            ahead, real = (
                {name: value for name, value in half.items() if name != "seconds" and not name.startswith("s ")}
                for half in (ahead, real)
            )
        about = {"command": "python -m benchmarks.forecast_check" + " --memory" * options.memory}
        found[case] = {"forecast": ahead, "measured": real, "origin": heading(origin() | about)}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(f"{found[case]['origin']}\n\n{render(found)}\n", encoding="utf-8")
    print(render(found))
    return 0


def render(found: dict[str, Any]) -> str:
    """Forecast over measured, per case, in the order of CASES."""
    lines = [
        "| run | peak memory, forecast | measured | forecast / measured | s per step, forecast | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in (case for case in CASES if case in found):
        ahead, real = found[case]["forecast"], found[case]["measured"]
        memory = ahead["peak_gb"] / real["peak_gb"]
        times = "| - | - | - |"
        if "seconds" in real:
            times = f"| {ahead['seconds']:.2f} | {real['seconds']:.2f} | {ahead['seconds'] / real['seconds']:.2f} |"
        lines.append(f"| {case} | {ahead['peak_gb']:.2f} GB | {real['peak_gb']:.2f} GB | {memory:.2f} {times}")
    return "\n".join(lines)


def forecast_case(case: str, num_steps: int) -> dict[str, float]:
    import torch.utils.tensorboard  # noqa: F401

    from strop.cli.workload import workload
    from strop.stages.forecast import forecast
    from strop.stages.forecast_probe import measure

    with tempfile.TemporaryDirectory() as folder:
        stage, config, _ = _case(case, Path(folder), num_steps)
        planned = workload(stage, config, Path(folder))
        result = forecast(planned, measure(planned, has_times=num_steps == NUM_STEPS))
    parts = {f"gb {name}": size / 1e9 for name, size in result.phases[result.largest_phase].items() if size}
    parts |= {f"s {name}": value for name, value in result.seconds.items()}
    return {"peak_gb": result.peak_bytes / 1e9, "seconds": result.step_seconds} | parts


def run_case(case: str, num_steps: int) -> dict[str, float]:
    from strop.runs import read_lines

    with tempfile.TemporaryDirectory() as folder:
        _, config, train = _case(case, Path(folder), num_steps)
        run = train(config, name="check", runs_dir=Path(folder), resume=False)
        lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] > 1]
    parts = {
        f"s {name.removesuffix('_seconds')}": statistics.median(line[f"time/{name}"] for line in lines)
        for name in ("rollout_seconds", "update_seconds")
        if f"time/{name}" in lines[0]
    }
    seconds = statistics.median(line["time/step_seconds"] for line in lines)
    return {"peak_gb": work.peak_gb(), "seconds": seconds} | parts


def _half(number: str, what: str, *flags: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.forecast_check", number, "--do", what, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} of case {number} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _case(case: str, folder: Path, num_steps: int) -> tuple[str, Any, Any]:
    """(stage, its config, its train) with the data that it needs in `folder`."""
    from strop.cli.config import build, read_values
    from strop.cli.stages import load_stage

    name, settings = CASES[case]
    table = {**settings, "num_steps": num_steps, "save_every": 1000}
    data = folder / "data"
    if name == "pretrain":
        with lzma.open(ROOT / "recipes" / "demo" / "kjv.txt.xz", "rt", encoding="utf-8") as book:
            data.with_suffix(".txt").write_text(book.read(1_000_000), encoding="utf-8")
        table |= {"data": [{"path": str(data.with_suffix(".txt"))}], "optimizer": {"warmup_steps": 0}}
        if table.get("tokenizer") == "MODEL":
            table["tokenizer"] = str(MODEL)
    else:
        table |= {"from": str(MODEL)} | _data(name, table, folder)
    stage = load_stage(name)
    return name, build(stage.Config, read_values(table, stage.Config, case), case), stage.train


def _data(stage: str, table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings that name data, which is written to `folder`."""
    count = table.pop("rows", 0)
    tasks = [{"prompt": [{"role": "user", "content": question}]} for question in work.questions(4)]
    rows = {
        "sft": [{"messages": messages} for messages in work.conversations(count)],
        "dpo": work.pairs(count) if count else tasks,
        "reward-model": work.pairs(count),
    }.get(stage, tasks)
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = [{"name": "benchmarks.work:long_answer_reward"}]
    if "online" in table:
        return {"online": {**table["online"], "tasks": str(path)}, "rewards": own}
    if stage not in ("grpo", "ppo"):
        return {"data": str(path)}
    rewards = table.get("rewards", own)
    if "options" in rewards[0]:
        # Made in a process of its own: its memory is not the run's.
        subprocess.run([sys.executable, "-c", _MAKE_REWARD_MODEL, str(MODEL), str(folder / "reward")], check=True)
        rewards = [{"name": "model", "options": {"model": str(folder / "reward")}}]
    return {"prompts_per_step": table.get("prompts_per_step", 4), "tasks": str(path), "rewards": rewards}


_MAKE_REWARD_MODEL = """
import sys
from strop.models import load_model
from strop.models.heads import add_scalar_head, save_scalar_model
from strop.models.reward_scale import RewardScale
from strop.tokenizer import Tokenizer
source, target = sys.argv[1:]
save_scalar_model(add_scalar_head(load_model(source), seed=0), target, reward_scale=RewardScale(mean=0.0, std=1.0))
Tokenizer.load(source).save(target)
"""


if __name__ == "__main__":
    restart_for_large_blocks()
    sys.exit(main())
