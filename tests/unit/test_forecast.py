"""The arithmetic of `strop doctor --recipe`: from two measured layers to all, and which moment is the worst."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.cli.workload_rollouts import rollout_micro_batches
from strop.models import LoraConfig, ModelConfig, init_model
from strop.models.footprint import num_layer_parameters, num_parameters, num_recomputed
from strop.models.heads import add_scalar_head
from strop.models.live_memory import LiveMemory
from strop.models.lora import attach, fresh_parts
from strop.rollouts.batch import collate_rollouts
from strop.stages.forecast import (
    ALLOCATOR_SHARE,
    PAGE,
    Layers,
    Learner,
    Measured,
    Probe,
    Rollout,
    Workload,
    forecast,
    packed_segments,
)
from strop.stages.forecast_probe import Small, live_bytes, measure, probe_batch
from strop.types import Completion, Segment

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8
)
PARAMETERS = num_parameters(CONFIG)
WORKLOAD = Workload(
    learner=Learner(model=CONFIG),
    dtype=torch.bfloat16,
    micro_batch=(Segment(trunk=100),),
    num_labels=100,
    tokens_per_step=400,
    tokens_per_update=400,
    file_bytes=700,
)
ONE = Measured(
    kept_bytes=1000, head_peak_bytes=1500, tail_peak_bytes=1800, train_seconds=0.5, forward_seconds=0.2,
    decode_seconds=0.010, prefill_seconds=0.1,
)  # fmt: skip
TWO = Measured(
    kept_bytes=1300, head_peak_bytes=1800, tail_peak_bytes=2200, train_seconds=0.6, forward_seconds=0.3,
    decode_seconds=0.012, prefill_seconds=0.2,
)  # fmt: skip
LAST = dataclasses.replace(ONE, kept_bytes=900, head_peak_bytes=1450, train_seconds=0.55)
"""A layer that computes something again. Two of the five are like it."""
PROBE = Probe(learners=(Layers(one=ONE, two=TWO, last=LAST),), import_bytes=10_000, optimizer_seconds=1e-6)


def with_learner(**changes: Any) -> Workload:
    return dataclasses.replace(WORKLOAD, learner=dataclasses.replace(WORKLOAD.learner, **changes))


def probe_of(*layers: Layers) -> Probe:
    return dataclasses.replace(PROBE, learners=layers)


def test_resident_state_is_16_bytes_a_parameter_in_bf16_and_12_in_fp32_plus_gradients():
    update = forecast(WORKLOAD, PROBE).phases["update"]
    assert (update["weights"], update["masters"], update["moments"], update["gradients"]) == tuple(
        bytes_each * PARAMETERS for bytes_each in (2, 4, 8, 4)
    )
    exact = forecast(dataclasses.replace(WORKLOAD, dtype=torch.float32), PROBE).phases["update"]
    assert (exact["weights"], exact["masters"], exact["moments"]) == (4 * PARAMETERS, 0, 8 * PARAMETERS)


def test_8bit_moments_are_two_bytes_and_their_scales():
    narrow = forecast(with_learner(is_8bit=True), PROBE).phases["update"]
    assert narrow["moments"] == PARAMETERS * (2 + 2 * 4 / 256)
    assert narrow["masters"] == 4 * PARAMETERS


def test_kernels_keep_half_a_master_and_bf16_gradients_of_a_single_micro_batch():
    native = dataclasses.replace(WORKLOAD, has_kernels=True)
    update = forecast(native, PROBE).phases["update"]
    assert (update["masters"], update["gradients"]) == (2 * PARAMETERS, 4 * PARAMETERS)
    single = dataclasses.replace(native, tokens_per_step=100, tokens_per_update=100)
    update = forecast(single, PROBE).phases["update"]
    assert update["gradients"] == 4 * 2 * num_layer_parameters(CONFIG), "the first layer's are among what passes"


def test_every_further_layer_costs_what_the_second_did_and_the_last_ones_less():
    update = forecast(WORKLOAD, PROBE).phases["update"]
    # Two layers of 300, three of 200; beside layers 700 are kept.
    assert update["activations"] + update["passing"] == max(
        1450 + 2 * 300 + 2 * 200,  # before the last layer: a small model's peak, and the other layers
        1800 + 2 * 300 + 2 * 200,  # inside the last one
        1800 + 2 * 300,
        1800,
    )
    assert update["activations"] == 2 * 300 + 2 * 200
    assert update["allocator"] == ALLOCATOR_SHARE * (700 + 2 * 300 + 3 * 200)
    alike = forecast(WORKLOAD, probe_of(Layers(one=ONE, two=TWO))).phases["update"]
    assert alike["activations"] + alike["passing"] == 1800 + 4 * 300


def test_gradients_and_activations_are_whole_together_only_where_micro_batches_accumulate():
    single = dataclasses.replace(WORKLOAD, tokens_per_step=100, tokens_per_update=100)
    update = forecast(single, PROBE).phases["update"]
    # In the first layer of the only backward pass: all other layers' gradients, no activations below it.
    growth = 4 * num_layer_parameters(CONFIG)
    assert (update["activations"], update["gradients"], update["passing"]) == (0, 4 * growth, 1800)
    wide = {"kept_bytes": 10**6, "head_peak_bytes": 10**6 + 10**5, "tail_peak_bytes": 10**6}
    layers = [dataclasses.replace(small, **wide) for small in (ONE, ONE, LAST)]
    layers[1] = dataclasses.replace(layers[1], kept_bytes=2 * 10**6)
    update = forecast(single, probe_of(Layers(one=layers[0], two=layers[1], last=layers[2]))).phases["update"]
    # At its beginning: all activations, no gradients.
    assert (update["activations"], update["gradients"], update["passing"]) == (5 * 10**6, 0, 10**5)


def test_an_adapter_learns_alone():
    lora = LoraConfig(rank=3, target_modules=("q_proj", "down_proj"))
    work = with_learner(lora=lora)
    model = init_model(CONFIG, seed=0)
    attach(model, fresh_parts(model, lora, seed=0))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert work.learner.num_trained == trained
    assert work.learner.num_recomputed == 0, "the MLP with an adapter keeps gate and up"
    assert with_learner(lora=LoraConfig(target_modules=("q_proj",))).learner.num_recomputed == num_recomputed(CONFIG)
    update = forecast(work, PROBE).phases["update"]
    assert (update["masters"], update["moments"], update["gradients"]) == (0, 8 * trained, 4 * trained)
    assert (update["weights"], update["adapter"], update["reference"]) == (2 * PARAMETERS, 4 * trained, 0)
    with_reference = forecast(dataclasses.replace(work, has_reference=True), PROBE).phases["update"]
    assert (with_reference["adapter"], with_reference["reference"]) == (8 * trained, 0)


@pytest.mark.parametrize("tie", [True, False])
def test_a_scalar_head_is_one_row(tie: bool):
    config = dataclasses.replace(CONFIG, tie_embeddings=tie)
    scalar = add_scalar_head(init_model(config, seed=0), seed=0)
    expected = sum(value.numel() for value in scalar.parameters())
    assert Learner(model=config, output="scores").num_weights == expected


def test_an_own_critic_is_a_second_learner_whose_turn_comes_after_the_policys():
    critic = Learner(model=dataclasses.replace(CONFIG, num_layers=2), output="scores")
    work = dataclasses.replace(WORKLOAD, critic=critic, tokens_per_update=100, tokens_per_step=100, has_kernels=True)
    probe = probe_of(PROBE.learners[0], Layers(one=ONE, two=TWO))
    phases = forecast(work, probe).phases
    assert phases["update"]["critic"] == 2 * critic.num_weights
    assert phases["update"]["moments"] == 8 * (PARAMETERS + critic.num_weights)
    alone = forecast(dataclasses.replace(work, critic=None), PROBE).phases["update"]
    assert phases["update"]["gradients"] == alone["gradients"]
    growth = 2 * num_layer_parameters(CONFIG)
    assert phases["critic's update"]["gradients"] == 2 * PARAMETERS + growth
    both = forecast(dataclasses.replace(work, tokens_per_update=400), probe).phases
    assert both["update"]["gradients"] == both["critic's update"]["gradients"]
    assert both["update"]["gradients"] == 4 * (PARAMETERS + critic.num_weights)


def test_rows_of_the_embedding_without_a_gradient_have_no_moments():
    wide = dataclasses.replace(CONFIG, vocab_size=4096, hidden_size=1024)
    work = dataclasses.replace(WORKLOAD, learner=Learner(model=wide, output="scores"), has_kernels=True)
    few = dataclasses.replace(work, learner=dataclasses.replace(work.learner, seen_tokens=frozenset({0, 1, 9})))
    whole, part = (forecast(each, PROBE).phases["update"] for each in (work, few))
    # A row is one page of each moment, and half a page of the masters' lower halves: rows 0 and 1 share one.
    assert whole["moments"] - part["moments"] == 2 * PAGE * (4096 - 3)
    assert whole["masters"] - part["masters"] == PAGE * (2048 - 2)


def test_the_peak_is_the_largest_phase_not_their_sum():
    loading = dataclasses.replace(WORKLOAD, file_bytes=10**9)
    result = forecast(loading, PROBE)
    assert result.largest_phase == "load"
    assert result.peak_bytes == 10_000 + 2 * PARAMETERS + 10**9


def test_what_is_loaded_for_a_while_is_in_no_other_phase():
    work = dataclasses.replace(WORKLOAD, loaded_copies=1, reward_bytes=50)
    phases = forecast(work, PROBE).phases
    assert sum(phases["load"].values()) == 10_000 + 2 * 2 * PARAMETERS + 700 + 50
    assert "copies" not in phases["update"] and phases["update"]["reward models"] == 50


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
            "forward and backward": 4 * (0.5 + 4 * 0.1 + 3 * 0.05),  # the last three layers take longer
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


LEARNERS = {
    "some": Learner(model=CONFIG),
    "none": Learner(model=CONFIG, checkpointing="none", with_entropy=True),
    "all": Learner(model=CONFIG, checkpointing="all"),
    "LoRA": Learner(model=CONFIG, lora=LoraConfig(rank=2)),
    "LoRA of attention": Learner(model=CONFIG, lora=LoraConfig(rank=2, target_modules=("v_proj", "o_proj"))),
    "scores": Learner(model=CONFIG, output="scores"),
    "values": Learner(model=CONFIG, output="logprobs and values"),
}


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", LEARNERS)
def test_small_models_foretell_the_memory_of_five_layers(name: str, accumulates: bool):
    """The forecast of a backward pass, against a count on the whole model."""
    work = dataclasses.replace(
        WORKLOAD,
        learner=LEARNERS[name],
        dtype=torch.float32,
        micro_batch=(Segment(trunk=60), Segment(trunk=20, branches=(20,))),
        tokens_per_update=400 if accumulates else 100,
    )
    update = forecast(work, measure(work)).phases["update"]
    whole = Small(work.learner, work, num_layers=5)
    whole.decoder.set_checkpointing(work.learner.checkpointing)
    batch = probe_batch(work)
    if accumulates:
        for _ in range(2):
            whole.loss(batch).backward()
    kept, head_peak, tail_peak = live_bytes(whole, batch)
    assert update["allocator"] == pytest.approx(ALLOCATOR_SHARE * kept, rel=1e-3)
    waiting = 4 * work.learner.num_trained if accumulates else 0
    live = update["gradients"] - waiting + update["activations"] + update["passing"]
    assert live == pytest.approx(max(head_peak, tail_peak), rel=1e-3)


def test_the_demo_recipe_is_foretold_without_a_checkpoint(capsys: pytest.CaptureFixture[str]):
    from strop.cli.main import main

    recipe = Path(__file__).parents[2] / "recipes" / "demo" / "pretrain.toml"
    small = ["--micro-batch-tokens", "512", "--batch-tokens", "1024", "--model.num-layers", "3"]
    assert main(["doctor", "--recipe", str(recipe), *small]) == 0
    printed = capsys.readouterr().out
    assert "pretrain" in printed and "peak memory:" in printed and "time per step:" in printed
    assert "1,024 training tokens" in printed


def test_what_cannot_be_foretold_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from strop.cli.main import main

    demo = Path(__file__).parents[2] / "recipes" / "demo"
    cases = {
        ("--recipe", str(demo / "scratch.toml")): "is a pipeline",
        ("--recipe",): "--recipe needs a value",
        ("--stage", "sft"): "name the recipe",
        ("--recipe", str(demo / "pretrain.toml"), "--stage", "pretrian"): "--stage pretrian: there are",
        ("--recipe", str(demo / "pretrain.toml"), "--device", "cuda"): "leave device out",
        ("--recipe", str(demo / "sft.toml"), "--from", str(tmp_path)): "neither a run",
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
