"""A training step from a rollout's recorded activations against the same step that computes them: equal to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.data import TaskBatches
from strop.generation import Engine
from strop.models import Decoder, LoraConfig, ModelConfig, init_model, load_model, save_model
from strop.models.lora import attach, fresh_parts
from strop.models.recording import Recording, new_recording
from strop.native import build, products
from strop.optim import OptimizerConfig
from strop.rewards.base import WeightedRewards
from strop.rewards.config import RewardConfig
from strop.rewards.function import FunctionReward
from strop.rollouts.batch import RolloutBatch, collate_rollouts
from strop.rollouts.logprobs import token_logprobs
from strop.rollouts.prompts import Sampling, encode_prompts
from strop.stages.grpo import Actors, Config, grpo_step
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Request, SamplingParams, Task

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 3,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": ModelConfig(**SHAPE, num_heads=2, num_kv_heads=2, head_dim=32),
    "three heads share": ModelConfig(**SHAPE, num_heads=6, num_kv_heads=2, head_dim=64, tie_embeddings=False),
    "qwen2": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=32, qkv_bias=True, model_type="qwen2"),
    "every bias": ModelConfig(
        **SHAPE, num_heads=2, num_kv_heads=1, head_dim=96, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "smollm3": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=4, head_dim=32, layers_without_rope=frozenset({0, 2})),
}
PROMPTS = [tuple(range(20, 61)), (5, 6, 7), (250, 3), tuple(range(100, 117))]


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    reason = build.why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    assert build.library() is not None, reason


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, and the dog sat on the cat. é😀"] * 3, 290)


def make_model(config: ModelConfig) -> Decoder:
    model = init_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(torch.bfloat16)


def rollout(model: Decoder, tokenizer: Tokenizer, recording: Recording | None) -> RolloutBatch:
    """Ten samples of four prompts in three slots, so that slots are refilled and one prompt waits for its turn."""
    engine = Engine(model, tokenizer, num_slots=3)
    counts = (4, 1, 2, 3)
    requests = [
        Request(
            prompt_ids=prompt,
            sampling=SamplingParams(max_new_tokens=20, stop_token_ids=tuple(range(0, 320, 6))),
            num_samples=count,
            seed=index,
        )
        for index, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True))
    ]
    completions = engine.generate(requests, recording=recording)
    lengths = {len(completion.token_ids) for group in completions for completion in group}
    assert len(lengths) > 3  # ragged
    return collate_rollouts(PROMPTS, completions)


def gradients(model: Decoder, batch: RolloutBatch, recording: Recording | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logprobs_BT, _ = token_logprobs(model, batch, temperature=1.0, recording=recording)
    weights_BT = torch.randn(logprobs_BT.shape, generator=torch.Generator().manual_seed(2))
    (logprobs_BT * weights_BT).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return logprobs_BT.detach(), found


@pytest.mark.parametrize("in_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("checkpointing", ["some", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_to_the_bit(
    name: str, checkpointing: str, in_int8: bool, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(MODELS[name])
    model.set_checkpointing(checkpointing)  # pyright: ignore[reportArgumentType]
    with products.int8(in_int8):
        recording = new_recording(model, 1000, 1.0)
        assert recording is not None
        batch = rollout(model, tokenizer, recording)
        # What the other samples of a group, and groups that are left out, leave in the recording is not in the way.
        batch = batch.select([9, 0, 1, 3, 4, 7])
        expected_logprobs, expected = gradients(model, batch, None)

        def no_forward(*_: object) -> None:
            raise AssertionError("a layer was computed")

        monkeypatch.setattr("strop.models.fused._room_for_product", no_forward)  # every product of a forward pass
        monkeypatch.setattr("strop.models.fused._lora_forward", no_forward)
        monkeypatch.setattr("strop.objectives.logprobs._write_statistics", no_forward)
        recomputed: list[int] = []

        def recompute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            recomputed.append(weight.shape[0])
            return products.linear(x, weight, bias)

        monkeypatch.setattr("strop.models.fused._product", recompute)
        logprobs, found = gradients(model, batch, recording)
    assert recomputed == [2 * SHAPE["intermediate_size"]] * {"some": 1, "none": 0}[checkpointing]
    assert torch.equal(logprobs, expected_logprobs)
    for parameter, gradient in found.items():
        assert torch.equal(gradient, expected[parameter]), parameter


def test_what_does_not_fit_is_not_recorded_and_changes_nothing(tokenizer: Tokenizer) -> None:
    model = make_model(MODELS["llama"])
    expected = rollout(model, tokenizer, None)
    assert expected.packed().recorded_rows_T is None
    for num_rows in (0, 45, 60):
        recording = new_recording(model, num_rows, 1.0)
        assert recording is not None
        batch = rollout(model, tokenizer, recording)
        assert not recording.is_complete
        assert batch.completions == expected.completions
        assert torch.equal(batch.sampling_logprobs_BT, expected.sampling_logprobs_BT)
    recording = new_recording(model, 1000, 1.0)
    engine = Engine(model, tokenizer)
    request = Request(prompt_ids=(1, 2), sampling=SamplingParams(max_new_tokens=2))
    [[completion]] = engine.generate([request], recording=recording)
    assert completion.recorded_rows == (0, 1, 2)
    assert completion.recorded_labels == (0, 1)
    [[completion]] = engine.generate([request])  # in the same cache
    assert completion.recorded_rows == completion.recorded_labels == ()
    assert recording is not None and recording.claim(1) == range(3, 4)


def test_who_has_no_recording() -> None:
    """Where trainer and rollouts may differ in a bit, or the backward pass needs more."""
    config = MODELS["llama"]
    assert new_recording(init_model(config, seed=0), 9, 1.0) is None  # float32
    assert new_recording(make_model(ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=16)), 9, 1.0) is None
    qwen3 = ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True, model_type="qwen3")
    assert new_recording(make_model(qwen3), 9, 1.0) is None
    model = make_model(config)
    model.set_checkpointing("all")
    assert new_recording(model, 9, 1.0) is None
    model.set_checkpointing("none")
    assert new_recording(model, 9, 1.0) is not None
    attach(model, fresh_parts(model, LoraConfig(rank=2), seed=0))
    assert new_recording(model, 9, 1.0) is None


def judge(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


@pytest.mark.parametrize("epochs", [1, 2])
def test_grpo_learns_the_same_with_it(
    epochs: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_model(MODELS["qwen2"]), tmp_path)
    prompts = ["the cat", "dog", "sat on the mat, and"]
    tasks = [Task(id=f"t:{i}", prompt=prompt, columns={}) for i, prompt in enumerate(prompts)]
    uses: list[int] = []
    take = Recording.layers
    monkeypatch.setattr(Recording, "layers", lambda self, rows_T: uses.append(len(rows_T)) or take(self, rows_T))

    def learn(first_step: int = 2, **options: object) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        config = Config(
            init_from=str(tmp_path),
            tasks="",
            rewards=(RewardConfig(name="judge"),),
            num_steps=60,
            prompts_per_step=2,
            group_size=4,
            sampling=Sampling(max_new_tokens=12, temperature=0.8),
            optimizer=OptimizerConfig(lr=1e-3),
            epochs_per_rollout=epochs,
            **options,  # pyright: ignore[reportArgumentType]
        )
        policy = load_model(tmp_path, dtype=torch.bfloat16)
        policy.set_checkpointing(config.gradient_checkpointing)
        actors = Actors(
            policy=policy,
            reference=None,
            tokenizer=tokenizer,
            engine=Engine(policy, tokenizer, num_slots=5),
            reward=WeightedRewards([(FunctionReward(judge), 1.0)]),
            optimizer=config.optimizer.build(policy.named_parameters()),
            prompt_ids=encode_prompts(tasks, tokenizer, 12, 256),
        )
        stream = TaskBatches(tasks, batch_size=1, seed=3)
        metrics = [grpo_step(actors, stream, config, step)[0] for step in (first_step, first_step + 1)]
        kept = [{k: v for k, v in line.items() if "time" not in k and "seconds" not in k} for line in metrics]
        return {name: value.detach() for name, value in policy.named_parameters()}, kept

    weights, metrics = learn()
    assert len(uses) == 2 and metrics[1]["grad_norm"] > 0  # the first update of either rollout
    learn(first_step=50)
    assert len(uses) == 3  # step 51 computes, and compares
    for options in ({"reuse_rollout": False}, {"micro_batch_tokens": 40}, {"gradient_checkpointing": "all"}):
        others, other_metrics = learn(**options)  # pyright: ignore[reportArgumentType]
        assert len(uses) == 3
        if "micro_batch_tokens" in options:  # gradients of two micro-batches are summed in another order
            continue
        assert other_metrics == metrics
        assert all(torch.equal(value, weights[name]) for name, value in others.items())
