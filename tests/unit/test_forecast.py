"""The arithmetic of `strop doctor --recipe`: from two measured layers to all, and which moment is the worst."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from strop.cli.workload import rollout_micro_batches
from strop.models import ModelConfig, init_model
from strop.models.footprint import num_parameters, num_recomputed
from strop.models.live_memory import LiveMemory
from strop.rollouts.batch import collate_rollouts
from strop.stages.forecast import (
    ALLOCATOR_SHARE,
    Measured,
    Probe,
    Rollout,
    Workload,
    forecast,
    live_bytes,
    measure,
    packed_segments,
    probe_batch,
)
from strop.types import Completion, Segment

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8
)
PARAMETERS = num_parameters(CONFIG)
NOT_KEPT = 2 * (2 * 64) * 2 * 100
"""Two of the five layers compute gate and up of 100 tokens again."""
WORKLOAD = Workload(
    model=CONFIG,
    dtype=torch.bfloat16,
    micro_batch=(Segment(trunk=100),),
    num_labels=100,
    tokens_per_step=400,
    tokens_per_update=400,
    file_bytes=700,
)
PROBE = Probe(
    one=Measured(
        kept_bytes=1000, head_peak_bytes=1500, tail_peak_bytes=1800, train_seconds=0.5, forward_seconds=0.2,
        decode_seconds=0.010, prefill_seconds=0.1,
    ),
    two=Measured(
        kept_bytes=1300, head_peak_bytes=1800, tail_peak_bytes=2200, train_seconds=0.6, forward_seconds=0.3,
        decode_seconds=0.012, prefill_seconds=0.2,
    ),
    import_bytes=10_000,
    optimizer_seconds=1e-6,
)  # fmt: skip


def test_resident_state_is_16_bytes_a_parameter_in_bf16_and_12_in_fp32_plus_gradients():
    update = forecast(WORKLOAD, PROBE).phases["update"]
    assert (update["weights"], update["masters"], update["moments"], update["gradients"]) == tuple(
        bytes_each * PARAMETERS for bytes_each in (2, 4, 8, 4)
    )
    exact = forecast(dataclasses.replace(WORKLOAD, dtype=torch.float32), PROBE).phases["update"]
    assert (exact["weights"], exact["masters"], exact["moments"]) == (4 * PARAMETERS, 0, 8 * PARAMETERS)


def test_8bit_moments_are_two_bytes_and_their_scales():
    narrow = forecast(dataclasses.replace(WORKLOAD, is_8bit=True), PROBE).phases["update"]
    assert narrow["moments"] == PARAMETERS * (2 + 2 * 4 / 256)
    assert narrow["masters"] == 4 * PARAMETERS


def test_kernels_keep_half_a_master_and_bf16_gradients_of_a_single_micro_batch():
    native = dataclasses.replace(WORKLOAD, has_kernels=True)
    update = forecast(native, PROBE).phases["update"]
    assert (update["masters"], update["gradients"]) == (2 * PARAMETERS, 4 * PARAMETERS)
    single = dataclasses.replace(native, tokens_per_step=100, tokens_per_update=100)
    assert forecast(single, PROBE).phases["update"]["gradients"] == 2 * PARAMETERS


def test_every_further_layer_costs_what_the_second_did():
    one = dataclasses.replace(PROBE.one, kept_bytes=10**6, head_peak_bytes=10**6 + 10**5)
    two = dataclasses.replace(one, kept_bytes=10**6 + 300, head_peak_bytes=10**6 + 10**5 + 300)
    update = forecast(WORKLOAD, dataclasses.replace(PROBE, one=one, two=two)).phases["update"]
    assert update["activations"] == 10**6 + 4 * 300 - NOT_KEPT
    assert update["activations"] + update["head"] == 10**6 + 10**5 + 4 * 300 - NOT_KEPT // 2
    assert update["allocator"] == ALLOCATOR_SHARE * update["activations"]


def test_gradients_and_activations_are_whole_together_only_where_micro_batches_accumulate():
    single = dataclasses.replace(WORKLOAD, tokens_per_step=100, tokens_per_update=100)
    update = forecast(single, PROBE).phases["update"]
    # At the end of the only backward pass: all gradients, no activations.
    assert update["activations"] == 0 and update["gradients"] == 4 * PARAMETERS
    wide = dataclasses.replace(PROBE.one, kept_bytes=10**6, head_peak_bytes=10**6 + 10**5)
    probe = dataclasses.replace(PROBE, one=wide, two=wide)
    update = forecast(single, probe).phases["update"]
    # At its beginning: all activations, no gradients.
    assert update["activations"] == 10**6 - NOT_KEPT and update["gradients"] == 0
    assert update["head"] == 10**5 + NOT_KEPT // 2


def test_the_peak_is_the_largest_phase_not_their_sum():
    loading = dataclasses.replace(WORKLOAD, file_bytes=10**9)
    result = forecast(loading, PROBE)
    assert result.largest_phase == "load"
    assert result.peak_bytes == 10_000 + 2 * PARAMETERS + 10**9


def test_a_reference_is_a_second_set_of_weights():
    more = forecast(dataclasses.replace(WORKLOAD, has_reference=True), PROBE).peak_bytes
    assert more - forecast(WORKLOAD, PROBE).peak_bytes == 2 * PARAMETERS


def test_seconds_add_up_over_micro_batches_decode_steps_and_updates():
    rollout = Rollout(num_prompts=2, group_size=6, prompt_tokens=10, new_tokens=21, num_slots=4)
    result = forecast(
        dataclasses.replace(WORKLOAD, rollout=rollout, frozen_tokens=200, num_updates=2, tokens_per_update=200), PROBE
    )
    assert result.seconds == pytest.approx(
        {
            "prefill": 0.1 + 4 * 0.1,
            "decoding": 3 * 20 * (0.010 + 4 * 0.002),  # 12 samples through 4 slots; the first token is the prefill's
            "old and reference logprobs": 2 * (0.2 + 4 * 0.1),
            "forward and backward": 4 * (0.5 + 4 * 0.1),
            "optimizer": 2 * 1e-6 * PARAMETERS,
        }
    )
    assert result.step_seconds == pytest.approx(sum(result.seconds.values()))


def test_the_cache_is_for_the_slots_in_use_and_their_prompts():
    rollout = Rollout(num_prompts=2, group_size=4, prompt_tokens=10, new_tokens=21, num_slots=64)
    row = 2 * 5 * 2 * 8 * 2 * 32  # keys and values, layers, heads, width, bf16, 31 tokens rounded up to a block
    cache = forecast(dataclasses.replace(WORKLOAD, rollout=rollout), PROBE).phases["rollout"]["cache"]
    assert cache == (8 + 2) * row
    evaluated = dataclasses.replace(rollout, eval_samples=200)
    cache = forecast(dataclasses.replace(WORKLOAD, rollout=evaluated), PROBE).phases["rollout"]["cache"]
    assert cache == (64 + 16) * row


@pytest.mark.parametrize("max_tokens", [30, 64, 100, 10_000])
def test_micro_batches_are_those_of_the_rollout_batch(max_tokens: int):
    completion = Completion(token_ids=(1,) * 20, sampling_logprobs=(0.0,) * 20, finish_reason="length", text="")
    batch = collate_rollouts([(1,) * 9] * 3, [[completion] * 4] * 3)
    real = [micro.packed().segments for micro in batch.split(max_tokens)]
    assert rollout_micro_batches(9, 20, 3, 4, max_tokens) == real


def test_segments_fill_the_budget_and_no_more():
    assert packed_segments([Segment(trunk=30)], 100) == (Segment(trunk=30),) * 3
    assert packed_segments([Segment(trunk=30), Segment(trunk=50)], 100) == (Segment(trunk=30), Segment(trunk=50))
    assert packed_segments([Segment(trunk=300)], 100) == (Segment(trunk=300),)


def test_live_memory_counts_what_lives_and_forgets_what_is_freed():
    x = torch.zeros(250, requires_grad=True)  # 1000 bytes, there before
    with LiveMemory() as memory:
        y = x.exp()  # kept by its own backward pass
        view = y[:10]
        assert memory.live_bytes == 1000, view.shape
        z = y * 2.0
        assert memory.live_bytes == 2000
        del z
        assert (memory.live_bytes, memory.peak_bytes) == (1000, 2000)
        del y, view
        assert memory.live_bytes == 0
        x.exp().sum().backward()
        # exp's result for the backward pass, the sum, and at the end the gradient.
        assert memory.live_bytes == 1000


def test_two_measured_layers_foretell_the_memory_of_five():
    """The forecast of what a micro-batch keeps, against a count on the whole model."""
    work = dataclasses.replace(WORKLOAD, dtype=torch.float32, micro_batch=(Segment(trunk=60), Segment(trunk=40)))
    probe = measure(work)
    model = init_model(CONFIG, seed=0)
    kept, head_peak, _ = live_bytes(model, probe_batch(work), work)
    update = forecast(work, probe).phases["update"]
    assert num_recomputed(CONFIG) == 2
    assert update["activations"] == pytest.approx(kept, rel=1e-3)
    assert update["activations"] + update["head"] == pytest.approx(head_peak, rel=1e-3)


def test_the_demo_recipe_is_foretold_without_a_checkpoint(capsys: pytest.CaptureFixture[str]):
    from strop.cli.main import main

    recipe = Path(__file__).parents[2] / "recipes" / "demo" / "pretrain.toml"
    small = ["--micro-batch-tokens", "512", "--batch-tokens", "1024", "--model.num-layers", "3"]
    assert main(["doctor", "--recipe", str(recipe), *small]) == 0
    printed = capsys.readouterr().out
    assert "stage        pretrain" in printed and "peak memory:" in printed and "time per step:" in printed
    assert "1,024 training tokens" in printed


def test_what_cannot_be_foretold_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from strop.cli.main import main

    demo = Path(__file__).parents[2] / "recipes" / "demo"
    (tmp_path / "lora.toml").write_text('from = "x"\ndata = "x"\nnum_steps = 1\nlora = { rank = 2 }\n')
    cases = {
        ("--recipe", str(demo / "scratch.toml")): "is a pipeline",
        ("--recipe",): "--recipe needs a value",
        ("--stage", "sft"): "name the recipe",
        ("--recipe", str(demo / "pretrain.toml"), "--stage", "pretrian"): "--stage pretrian: there are",
        ("--recipe", str(demo / "pretrain.toml"), "--device", "cuda"): "leave device out",
        ("--recipe", str(demo / "sft.toml"), "--from", str(tmp_path)): "neither a run",
        ("--recipe", str(tmp_path / "lora.toml"), "--stage", "sft"): "no forecast for [lora] yet",
    }
    for args, expected in cases.items():
        assert main(["doctor", *args]) == 2, args
        assert expected in capsys.readouterr().err, args


def test_too_little_memory_is_met_with_what_would_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import strop.cli.doctor as doctor
    from strop.cli.main import main

    recipe = Path(__file__).parents[2] / "recipes" / "demo" / "pretrain.toml"
    monkeypatch.setattr(doctor, "free_bytes", lambda: 1000)
    small = ["--micro-batch-tokens", "1024", "--batch-tokens", "1024", "--model.num-layers", "2"]
    assert main(["doctor", "--recipe", str(recipe), *small]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "micro_batch_tokens = 256" in printed
    assert "micro_batch_tokens = 128" not in printed  # shorter than the context
    assert "None of these alone is enough" in printed
