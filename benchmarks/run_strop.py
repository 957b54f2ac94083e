"""One measurement of Strop: python -m benchmarks.run_strop JOB MODEL [DTYPE]."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import work
from strop.native.malloc import restart_for_large_blocks


def generation(job: work.Job, model_folder: str) -> None:
    from strop.generation import Engine
    from strop.models import compute_in, load_model
    from strop.tokenizer import Tokenizer
    from strop.types import Request, SamplingParams

    model = load_model(model_folder, dtype=compute_in(job.dtype), frozen=True)
    engine = Engine(model, Tokenizer.load(model_folder), num_slots=job.batch)
    sampling = SamplingParams(max_new_tokens=job.new_tokens)
    ids = work.prompt_ids(model_folder, job.batch)
    prefills, decodes = [], []
    for step in range(job.warm_up + job.timed):
        engine.generate([Request(prompt_ids=tuple(prompt), sampling=sampling, seed=step) for prompt in ids])
        stats = engine.stats
        assert stats.completion_tokens == job.batch * job.new_tokens
        # The first sampled token belongs to the prefill, as in the other systems; bookkeeping goes to decoding.
        prefills.append(stats.prefill_seconds + stats.sample_seconds / job.new_tokens)
        decodes.append(stats.total_seconds - prefills[-1])
    work.report_generation(job.batch, job.new_tokens, prefills[job.warm_up :], decodes[job.warm_up :])


def sft(job: work.Job, model_folder: str) -> None:
    from strop.data import load_rows, sft_examples
    from strop.models.folders import read_json
    from strop.models.footprint import training_flops
    from strop.models.huggingface import config_from_dict
    from strop.optim import OptimizerConfig
    from strop.stages.sft import Config, train
    from strop.tokenizer import Tokenizer
    from strop.types import Segment

    rows = [{"messages": messages} for messages in work.conversations(job.batch)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        examples = sft_examples(load_rows(str(data)), Tokenizer.load(model_folder), max_length=1024)
        config = Config(
            init_from=model_folder,
            data=str(data),
            num_steps=job.warm_up + job.timed,
            batch_tokens=sum(example.num_labels for example in examples),
            micro_batch_tokens=2048,
            optimizer=OptimizerConfig(lr=1e-5),
            dtype=job.dtype,
            save_every=10_000,
        )
        lines = _steps(train, config, Path(folder), job)
    flops = training_flops(
        config_from_dict(read_json(Path(model_folder) / "config.json")),
        [Segment(trunk=example.num_labels) for example in examples],
        sum(int(example.loss_mask[1:].sum()) for example in examples),
    )
    seconds = [line["time/step_seconds"] for line in lines]
    gflops = flops / statistics.median(seconds) / 1e9
    work.report([line["num_tokens"] for line in lines], seconds, training_gflops=gflops)


def reinforce(job: work.Job, model_folder: str) -> None:
    """GRPO, or PPO on the same work: one update per rollout, no reference."""
    from strop.models import LoraConfig
    from strop.optim import OptimizerConfig
    from strop.rewards.config import RewardConfig
    from strop.rollouts.prompts import Sampling

    optimizer = OptimizerConfig(lr=work.LORA_LR if job.has_lora else 1e-6)
    lora = LoraConfig(rank=work.LORA_RANK, alpha=work.LORA_ALPHA) if job.has_lora else None
    if job.kind == "ppo":
        from strop.stages.ppo import train
        from strop.stages.ppo_config import Config, CriticConfig

        critic = CriticConfig(network="own" if job.has_own_critic else "shared")
        make = functools.partial(Config, critic=critic, epochs_per_rollout=1, kl_coef=0.0)
    else:
        from strop.stages.grpo import Config, train

        make = Config
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks.jsonl"
        rows = [{"prompt": [{"role": "user", "content": question}]} for question in work.questions(job.batch)]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = make(
            init_from=model_folder,
            tasks=str(tasks),
            rewards=(RewardConfig(name="benchmarks.work:long_answer_reward"),),
            num_steps=job.warm_up + job.timed,
            prompts_per_step=job.batch,
            group_size=job.group,
            sampling=Sampling(max_new_tokens=job.new_tokens),
            optimizer=optimizer,
            lora=lora,
            # With an adapter small micro-batches cost little: there are no gradients of whole weights to add up.
            micro_batch_tokens=640 if job.has_lora else 2560,
            num_slots=job.batch * job.group,
            dtype=job.dtype,
            save_every=10_000,
        )
        lines = _steps(train, config, Path(folder), job)
    tokens = [line["num_tokens"] for line in lines]
    work.report(
        tokens,
        [line["time/step_seconds"] for line in lines],
        rollout_seconds=statistics.median(line["time/rollout_seconds"] for line in lines),
        update_seconds=statistics.median(line["time/update_seconds"] for line in lines),
        engine_gap_exp=statistics.median(line["engine_gap_exp"] for line in lines),
        **({} if job.has_lora else _counted(job, model_folder, rows, statistics.median(tokens))),
    )


def _counted(job: work.Job, model_folder: str, rows: list[dict], num_tokens: float) -> dict[str, float]:
    """The floor of a step: what it cannot do without, counted from shapes.

    counted_gflop  prefill, forward and backward passes of the policy and of an own critic, the critic's values
    counted_read_gb  the policy's bfloat16 weights, read once for every decode step
    counted_gb  weights that learn: 12 bytes each in training, of which 2 are the bfloat16 weight, 2 the rest of the
                float32 master and 8 AdamW's moments
    """
    from strop.models.folders import read_json
    from strop.models.footprint import num_parameters, training_flops
    from strop.models.huggingface import config_from_dict
    from strop.tokenizer import Tokenizer
    from strop.types import Segment

    config = config_from_dict(read_json(Path(model_folder) / "config.json"))
    tokenizer = Tokenizer.load(model_folder)
    length = round(num_tokens / (job.batch * job.group))
    prompts = [len(tokenizer.encode_prompt(row["prompt"])) for row in rows]
    trees = [Segment(trunk=prompt - 1, branches=(length,) * job.group) for prompt in prompts]
    prefill = training_flops(config, [Segment(trunk=prompt) for prompt in prompts], len(prompts)) / 3
    flops = prefill + training_flops(config, trees, round(num_tokens))
    if job.kind == "ppo":
        # A shared trunk has its values from a forward pass of the policy; an own critic is trained as well.
        trunk = training_flops(config, trees, 0)
        flops += trunk / 3 + (trunk if job.has_own_critic else 0.0)
    networks = 2 if job.has_own_critic else 1
    return {
        "counted_gflop": flops / 1e9,
        "counted_read_gb": (job.new_tokens - 1) * 2 * num_parameters(config) / 1e9,
        "counted_gb": networks * 12 * num_parameters(config) / 1e9,
    }


def preferences(job: work.Job, model_folder: str) -> None:
    """DPO or a reward model on pairs. DPO's reference logprobs are computed before the steps that are timed."""
    from transformers import AutoTokenizer

    from strop.optim import OptimizerConfig

    if job.kind == "dpo":
        from strop.stages.dpo import Config, train
    else:
        from strop.stages.reward_model import Config, train
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        rows = work.pairs(job.batch)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = Config(
            init_from=model_folder,
            data=str(data),
            num_steps=job.warm_up + job.timed,
            batch_size=len(rows),
            micro_batch_tokens=2048,
            optimizer=OptimizerConfig(lr=1e-6),
            dtype=job.dtype,
            save_every=10_000,
        )
        lines = _steps(train, config, Path(folder), job)
    tokens = work.pair_tokens(AutoTokenizer.from_pretrained(model_folder), rows)
    work.report([tokens] * len(lines), [line["time/step_seconds"] for line in lines])


def _steps(train, config, folder: Path, job: work.Job) -> list[dict]:
    """Run the stage; its own log says how long each step took, from the first sample to the last update."""
    from strop.runs import read_lines

    run = train(config, name="bench", runs_dir=folder, resume=False)
    return [line for line in read_lines(run / "metrics.jsonl") if line["step"] > job.warm_up]


def main(job_name: str, model_folder: str, dtype: str = "auto") -> None:
    job = dataclasses.replace(work.job(job_name), dtype=dtype)
    jobs = {"generation": generation, "sft": sft, "grpo": reinforce, "ppo": reinforce}
    jobs |= {"dpo": preferences, "reward-model": preferences}
    jobs[job.kind](job, model_folder)


if __name__ == "__main__":
    restart_for_large_blocks()
    main(*sys.argv[1:])
