"""One measurement of Strop: python -m benchmarks.run_strop JOB MODEL."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import work


def generation(model_folder: str) -> None:
    from strop.generation import Engine
    from strop.models import choose_dtype, load_model
    from strop.tokenizer import Tokenizer
    from strop.types import Request, SamplingParams

    model = load_model(model_folder, dtype=choose_dtype("auto"), frozen=True)
    tokenizer = Tokenizer.load(model_folder)
    engine = Engine(model, tokenizer, num_slots=work.GENERATION_BATCH)
    sampling = SamplingParams(max_new_tokens=work.NEW_TOKENS)
    ids = [tokenizer.encode(question * 4)[: work.PROMPT_TOKENS] for question in work.questions(work.GENERATION_BATCH)]
    tokens, seconds = [], []
    for step in range(work.WARM_UP_STEPS + work.TIMED_STEPS):
        requests = [Request(prompt_ids=tuple(prompt), sampling=sampling, seed=step) for prompt in ids]
        start = time.perf_counter()
        groups = engine.generate(requests)
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(len(completion.token_ids) for group in groups for completion in group))
    work.report(tokens[work.WARM_UP_STEPS :], seconds[work.WARM_UP_STEPS :])


def sft(model_folder: str) -> None:
    from strop.optim import OptimizerConfig
    from strop.stages.sft import Config, train

    rows = [{"messages": messages} for messages in work.conversations(work.SFT_ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = Config(
            init_from=model_folder,
            data=str(data),
            num_steps=work.WARM_UP_STEPS + work.TIMED_STEPS,
            batch_tokens=4096,
            micro_batch_tokens=2048,
            optimizer=OptimizerConfig(lr=1e-5),
            save_every=10_000,
        )
        _measured(train, config, Path(folder), "num_tokens")


def grpo(model_folder: str, *, has_lora: bool = False) -> None:
    from strop.models import LoraConfig
    from strop.optim import OptimizerConfig
    from strop.rewards.config import RewardConfig
    from strop.rollouts.prompts import Sampling
    from strop.stages.grpo import Config, train

    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks.jsonl"
        rows = [{"prompt": [{"role": "user", "content": question}]} for question in work.questions(work.GRPO_PROMPTS)]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = Config(
            init_from=model_folder,
            tasks=str(tasks),
            rewards=(RewardConfig(name="benchmarks.work:long_answer_reward"),),
            num_steps=work.WARM_UP_STEPS + work.TIMED_STEPS,
            prompts_per_step=work.GRPO_PROMPTS,
            group_size=work.GRPO_GROUP,
            sampling=Sampling(max_new_tokens=work.GRPO_NEW_TOKENS),
            optimizer=OptimizerConfig(lr=work.LORA_LR if has_lora else 1e-6),
            lora=LoraConfig(rank=work.LORA_RANK, alpha=work.LORA_ALPHA) if has_lora else None,
            # With an adapter small micro-batches cost little: there are no gradients of whole weights to add up.
            micro_batch_tokens=640 if has_lora else 2560,
            num_slots=work.GRPO_PROMPTS * work.GRPO_GROUP,
            save_every=10_000,
        )
        _measured(train, config, Path(folder), "num_tokens")


def grpo_lora(model_folder: str) -> None:
    grpo(model_folder, has_lora=True)


def _measured(train, config, folder: Path, tokens_key: str) -> None:
    """Run the stage; its own log says how long each step took, from the first sample to the last update."""
    from strop.runs import read_lines

    run = train(config, name="bench", runs_dir=folder, resume=False)
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] > work.WARM_UP_STEPS]
    work.report([line[tokens_key] for line in lines], [line["time/step_seconds"] for line in lines])


if __name__ == "__main__":
    {"generation": generation, "sft": sft, "grpo": grpo, "grpo_lora": grpo_lora}[sys.argv[1]](sys.argv[2])
