"""One measurement of Strop on preferences: python -m benchmarks.preferences_strop dpo|reward-model MODEL."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks import preference_work, work


def measure(job: str, model_folder: str) -> None:
    from strop.optim import OptimizerConfig
    from strop.runs import read_lines

    if job == "dpo":
        from strop.stages.dpo import Config, train
    else:
        from strop.stages.reward_model import Config, train
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        rows = preference_work.pairs()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = Config(
            init_from=model_folder,
            data=str(data),
            num_steps=work.WARM_UP_STEPS + work.TIMED_STEPS,
            batch_size=len(rows),
            micro_batch_tokens=2048,
            optimizer=OptimizerConfig(lr=1e-6),
            save_every=10_000,
        )
        run = train(config, name="bench", runs_dir=Path(folder), resume=False)
        lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] > work.WARM_UP_STEPS]
    tokens = preference_work.row_tokens(AutoTokenizer.from_pretrained(model_folder))
    work.report([tokens] * len(lines), [line["time/step_seconds"] for line in lines])


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2])
