"""One measurement of TRL: python -m benchmarks.run_trl JOB MODEL [SETTING].

The setting is, of SETTINGS, the fastest that works on a CPU (python -m benchmarks.settings measures all): bf16 weights,
because its default, fp32 weights under bf16 autocast, casts every weight at every decoded token.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks import work

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32 weights, bf16 autocast": {"dtype": torch.float32, "bf16": True},
    "fp32": {"dtype": torch.float32},
    "bf16, eager attention": {"attn_implementation": "eager"},
    "bf16, gradient checkpointing": {"gradient_checkpointing": True},
    "bf16, micro-batches of a quarter": {"num_micro_batches": 4},
    "bf16, static cache": {"cache_implementation": "static"},
    "bf16, continuous batching": {"use_transformers_continuous_batching": True},
    "bf16, padding-free": {"padding_free": True},
    "bf16, torch.compile": {"torch_compile": True},
}
"""What replaces the defaults below; a key that a trainer has no field for is refused by its config."""


class Clock(TrainerCallback):
    """Wall time of every optimiser step; TRL generates inside its training step, so rollouts are in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args, state, control, **_):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self._start)


def sft(job: work.Job, model_folder: str, setting: dict[str, Any]) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = work.conversations(job.batch)
    with tempfile.TemporaryDirectory() as folder:
        model, options = _model_and_options(model_folder, folder, setting, job.batch)
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"messages": row} for row in rows]),
            args=SFTConfig(max_steps=job.warm_up + job.timed, **options),
            callbacks=[clock := Clock()],
        )
        trainer.train()
    encoded = tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"]
    tokens = sum(len(ids) - 1 for ids in encoded)
    work.report([tokens] * job.timed, clock.seconds[job.warm_up :])


def grpo(job: work.Job, model_folder: str, setting: dict[str, Any]) -> None:
    from trl import GRPOConfig, GRPOTrainer

    counts: list[int] = []

    def reward(completions, completion_ids, **columns):
        counts.append(sum(len(ids) for ids in completion_ids))
        return work.long_answer_reward(completions)

    lora = None
    if job.has_lora:
        from peft import LoraConfig

        lora = LoraConfig(
            r=work.LORA_RANK, lora_alpha=work.LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in work.questions(job.batch)]
    with tempfile.TemporaryDirectory() as folder:
        model, options = _model_and_options(model_folder, folder, setting, job.batch * job.group)
        trainer = GRPOTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(prompts),
            args=GRPOConfig(
                num_generations=job.group,
                max_completion_length=job.new_tokens,
                beta=0.0,
                max_steps=job.warm_up + job.timed,
                **options | ({"learning_rate": work.LORA_LR} if job.has_lora else {}),
            ),
            peft_config=lora,
            callbacks=[clock := Clock()],
        )
        trainer.train()
    work.report(counts[job.warm_up :], clock.seconds[job.warm_up :])


def preferences(job: work.Job, model_folder: str, setting: dict[str, Any]) -> None:
    """DPO has its reference logprobs computed before training, as ours are, and in neither counted into the steps."""
    from transformers import AutoModelForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = work.pairs(job.batch)
    with tempfile.TemporaryDirectory() as folder:
        model, options = _model_and_options(model_folder, folder, setting, job.batch)
        trainer_class, config_class = DPOTrainer, DPOConfig
        if job.kind == "dpo":
            options |= {"beta": 0.1, "precompute_ref_log_probs": True}
        else:
            trainer_class, config_class = RewardTrainer, RewardConfig
            load = {"dtype": torch.bfloat16, "num_labels": 1}
            model = AutoModelForSequenceClassification.from_pretrained(model_folder, **load)
        trainer = trainer_class(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=config_class(max_steps=job.warm_up + job.timed, max_length=None, **options),
            callbacks=[clock := Clock()],
        )
        trainer.train()
    tokens = work.pair_tokens(AutoTokenizer.from_pretrained(model_folder), rows)
    work.report([tokens] * job.timed, clock.seconds[job.warm_up :])


def _model_and_options(model_folder: str, folder: str, setting: dict[str, Any], num_rows: int):
    """The model and the trainer's arguments; num_rows make one optimiser step, in num_micro_batches parts."""
    options = dict(setting)
    load = {"dtype": options.pop("dtype", torch.bfloat16)}
    if "attn_implementation" in options:
        load["attn_implementation"] = options.pop("attn_implementation")
    parts = options.pop("num_micro_batches", 1)
    defaults = {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": num_rows // parts,
        "gradient_accumulation_steps": parts,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return AutoModelForCausalLM.from_pretrained(model_folder, **load), defaults | options


def main(job_name: str, model_folder: str, setting: str | None = None) -> None:
    job = work.job(job_name)
    chosen = SETTINGS[FASTEST[job_name.partition("/")[0]] if setting is None else setting]
    {"sft": sft, "grpo": grpo, "dpo": preferences, "reward-model": preferences}[job.kind](job, model_folder, chosen)


FASTEST = {
    **dict.fromkeys(("sft", "dpo", "reward-model", "grpo-64", "grpo-64-lora"), "bf16"),
    "grpo-256": "bf16, micro-batches of a quarter",
}
"""grpo-256 in one micro-batch wants more memory than most machines have."""

if __name__ == "__main__":
    main(*sys.argv[1:])
