"""One measurement of TRL: python -m benchmarks.run_trl JOB MODEL.

Its fastest working setting on a CPU of those tried: bf16 weights (its default, fp32 weights under bf16 autocast, casts
every weight at every decoded token), no autocast, no gradient checkpointing, one micro-batch.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks import work


class Clock(TrainerCallback):
    """Wall time of every optimiser step; TRL generates inside its training step, so rollouts are in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args, state, control, **_):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self._start)


def sft(model_folder: str) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = work.conversations(work.SFT_ROWS)
    steps = work.WARM_UP_STEPS + work.TIMED_STEPS
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"messages": row} for row in rows]),
            args=SFTConfig(per_device_train_batch_size=work.SFT_ROWS, max_steps=steps, **_common(folder)),
            callbacks=[clock := Clock()],
        )
        trainer.train()
    encoded = tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"]
    tokens = sum(len(ids) - 1 for ids in encoded)
    work.report([tokens] * work.TIMED_STEPS, clock.seconds[work.WARM_UP_STEPS :])


def grpo(model_folder: str, *, has_lora: bool = False) -> None:
    from trl import GRPOConfig, GRPOTrainer

    counts: list[int] = []

    def reward(completions, completion_ids, **columns):
        counts.append(sum(len(ids) for ids in completion_ids))
        return work.long_answer_reward(completions)

    steps = work.WARM_UP_STEPS + work.TIMED_STEPS
    lora = None
    if has_lora:
        from peft import LoraConfig

        lora = LoraConfig(
            r=work.LORA_RANK, lora_alpha=work.LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in work.questions(work.GRPO_PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(prompts),
            args=GRPOConfig(
                per_device_train_batch_size=work.GRPO_PROMPTS * work.GRPO_GROUP,
                num_generations=work.GRPO_GROUP,
                max_completion_length=work.GRPO_NEW_TOKENS,
                beta=0.0,
                max_steps=steps,
                **_common(folder) | ({"learning_rate": work.LORA_LR} if has_lora else {}),
            ),
            peft_config=lora,
            callbacks=[clock := Clock()],
        )
        trainer.train()
    work.report(counts[work.WARM_UP_STEPS :], clock.seconds[work.WARM_UP_STEPS :])


def grpo_lora(model_folder: str) -> None:
    grpo(model_folder, has_lora=True)


def _common(folder: str) -> dict:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }


if __name__ == "__main__":
    {"sft": sft, "grpo": grpo, "grpo_lora": grpo_lora}[sys.argv[1]](sys.argv[2])
