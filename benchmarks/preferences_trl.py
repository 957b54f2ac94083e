"""One measurement of TRL on preferences: python -m benchmarks.preferences_trl dpo|reward-model MODEL.

Settings as in run_trl: bf16 weights, no autocast, no gradient checkpointing, one micro-batch; DPO with its reference
logprobs computed before training (precompute_ref_log_probs), as ours are, and in neither counted into the steps.
"""

from __future__ import annotations

import sys
import tempfile

from benchmarks import preference_work, run_trl, work  # run_trl first: it sets the environment

# isort: split
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def dpo(model_folder: str) -> None:
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    _train(DPOTrainer, DPOConfig, model, model_folder, beta=0.1, precompute_ref_log_probs=True)


def reward_model(model_folder: str) -> None:
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.bfloat16, num_labels=1)
    _train(RewardTrainer, RewardConfig, model, model_folder)


def _train(trainer_class, config_class, model, model_folder: str, **options) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    clock = run_trl.Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(preference_work.pairs()),
            args=config_class(
                per_device_train_batch_size=preference_work.PAIRS,
                max_steps=work.WARM_UP_STEPS + work.TIMED_STEPS,
                max_length=None,
                **{**run_trl._common(folder), **options},
            ),
            callbacks=[clock],
        )
        trainer.train()
    tokens = preference_work.row_tokens(AutoTokenizer.from_pretrained(model_folder))
    work.report([tokens] * work.TIMED_STEPS, clock.seconds[work.WARM_UP_STEPS :])


if __name__ == "__main__":
    {"dpo": dpo, "reward-model": reward_model}[sys.argv[1]](sys.argv[2])
