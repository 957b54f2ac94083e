"""What LoRA must leave alone: the base's bits, the reference, the engine's completions, a start without effect."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from strop.cli.main import main
from strop.generation import Engine
from strop.models import LoraConfig, load_model, save_model, weight_hash
from strop.models.adapters import add_adapter, tensors_hash
from strop.models.decoder import Decoder
from strop.models.logprobs import packed_logprobs
from strop.models.lora import Reference, adapted_linears, detach, merged, reference_of
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import load_training_state, read_lines, resolve
from strop.stages import grpo, sft
from strop.stages.supervised import supervised_step
from strop.tokenizer import Tokenizer
from strop.types import PackedBatch, Request, SamplingParams, Segment

IDS = torch.randint(300, (30,), generator=torch.Generator().manual_seed(1))
BATCH = PackedBatch(
    token_ids_T=IDS, labels_T=IDS, loss_mask_T=torch.ones(30, dtype=torch.bool), segments=(Segment(trunk=30),)
)


def adapted(folder: Path, *, dtype: torch.dtype = torch.float32, strength: float = 0.1) -> Decoder:
    model = load_model(folder, dtype=dtype)
    assert isinstance(model, Decoder)
    add_adapter(model, LoraConfig(rank=3, alpha=6), seed=0, base=folder)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            assert linear.adapter is not None
            for part in linear.adapter.parts().values():
                part.B.copy_(strength * torch.randn(part.B.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model.logits(model.hidden(BATCH))


def copy_without_adapter(model: Decoder, folder: Path) -> str:
    """The weight hash of the base in the dtype of the model."""
    return weight_hash(load_model(folder, dtype=model.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerged_the_base_has_its_own_bits(tiny_folder: Path, dtype: torch.dtype) -> None:
    model = adapted(tiny_folder, dtype=dtype)
    before, unmerged = weight_hash(model), logits(model)
    with merged(model):
        assert not adapted_linears(model)
        inside = logits(model)
        assert weight_hash(model) != copy_without_adapter(model, tiny_folder)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(unmerged.abs().max())
    torch.testing.assert_close(inside, unmerged, rtol=0, atol=tolerance)
    assert weight_hash(model) == before
    assert torch.equal(logits(model), unmerged)
    detach(model)
    assert weight_hash(model) == copy_without_adapter(model, tiny_folder)
    assert not torch.equal(logits(model), unmerged)


def test_merging_for_good_is_the_same_as_merging_for_a_while(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    save_model(model, tmp_path / "adapter")
    with merged(model):
        inside = weight_hash(model)
    assert weight_hash(load_model(tmp_path / "adapter")) == inside


def test_the_reference_is_the_base_without_a_copy(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    base = load_model(tiny_folder)
    reference = Reference(model)
    with torch.no_grad():
        assert torch.equal(reference.hidden(BATCH), base.hidden(BATCH))
        assert torch.equal(packed_logprobs(reference_of(model), BATCH)[0], packed_logprobs(base, BATCH)[0])
    assert sum(p.numel() for _, p in reference.named_parameters()) < 0.2 * sum(p.numel() for p in base.parameters())
    before = logits(model)
    # A reference that is another adapter on the same base: what a run from an adapter has.
    with torch.no_grad():
        for (_, own), (name, current) in zip(
            reference.named_parameters(), [x for x in model.named_parameters() if ".adapter." in x[0]], strict=True
        ):
            assert ".adapter." in name
            own.copy_(current)
            current.mul_(2)
        torch.testing.assert_close(model.logits(reference.hidden(BATCH)), before, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(model), before)


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True])
def test_decoding_is_teacher_forcing(tiny_folder: Path, is_packed: bool) -> None:
    model = adapted(tiny_folder)
    expected = logits(model)[10:]
    assert (expected - logits(load_model(tiny_folder))[10:]).abs().max() > 0.1
    cache = model.new_cache(num_slots=1, max_length=30)
    with model.decoding(1) if is_packed else nullcontext():
        model.prefill([IDS[:10].tolist()], cache, [0])
        found = torch.cat([model.logits(model.decode_step(token[None], cache)) for token in IDS[10:]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1.0001), (torch.bfloat16, 1.05)])
def test_the_engine_samples_from_the_adapted_model(tiny_folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Mean exp(|engine's logprob - trainer's|): the trainer adds the adapter to the base's product, the engine has it
    merged into weights of the compute dtype. The base alone is far away from both."""
    model, base = adapted(tiny_folder, dtype=dtype), load_model(tiny_folder, dtype=dtype)
    requests = [
        Request(prompt_ids=(5, 9, 70 + i), sampling=SamplingParams(max_new_tokens=20), seed=i) for i in range(9)
    ]
    gaps: dict[str, list[torch.Tensor]] = {"adapted": [], "base": []}
    for request, [completion] in zip(
        requests, Engine(model, Tokenizer.load(tiny_folder)).generate(requests), strict=True
    ):
        ids = torch.tensor([*request.prompt_ids, *completion.token_ids])
        batch = PackedBatch(
            token_ids_T=ids[:-1], labels_T=ids[1:], loss_mask_T=ids[1:] >= 0, segments=(Segment(trunk=len(ids) - 1),)
        )
        for name, one in (("adapted", model), ("base", base)):
            with torch.no_grad():
                law = one.logits(one.hidden(batch)).float().log_softmax(-1)
            found = law.gather(1, ids[1:, None])[len(request.prompt_ids) - 1 :, 0]
            gaps[name].append((found - torch.tensor(completion.sampling_logprobs)).abs())
    mean = {name: float(torch.cat(values).exp().mean()) for name, values in gaps.items()}
    assert mean["adapted"] < tolerance < 1.1 < mean["base"], mean


def test_an_update_moves_the_adapter_and_nothing_else(tiny_folder: Path) -> None:
    model = adapted(tiny_folder, dtype=torch.bfloat16)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.1).build(model.named_parameters())
    supervised_step(model, optimizer, BATCH, lr=1e-2, max_grad_norm=1.0, micro_batch_tokens=64)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".adapter." in name}
    assert {name.split(".", 1)[1] for name in optimizer.state_dict()} == moved, "no master, no moment of the base"
    detach(model)
    assert weight_hash(model) == copy_without_adapter(model, tiny_folder)


def rows_file(folder: Path) -> str:
    words = ["brown", "lazy", "cat", "dog", "fox", "quick"]
    rows = [{"prompt": f"the {a} {b}", "completion": f" {b}", "answer": "x"} for a in words for b in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


LORA = LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "up_proj"))


def sft_config(folder: Path, init_from: str, lora: LoraConfig | None = LORA) -> sft.Config:
    return sft.Config(
        init_from=init_from, data=rows_file(folder), num_steps=3, batch_tokens=64, max_length=64,
        optimizer=OptimizerConfig(lr=1e-2), dtype="bfloat16", lora=lora,
    )  # fmt: skip


def grpo_config(folder: Path, init_from: str, lora: LoraConfig | None = LORA, kl_coef: float = 0.1) -> grpo.Config:
    return grpo.Config(
        init_from=init_from, tasks=rows_file(folder), num_steps=3, prompts_per_step=3, group_size=4,
        rewards=(RewardConfig(name="length", options={"target_tokens": 3, "width": 3}),),
        sampling=Sampling(max_new_tokens=5, stop=("e", "a", "o", "t", "n", "i", "r", "s")),
        optimizer=OptimizerConfig(lr=1e-2), kl_coef=kl_coef, dtype="bfloat16", lora=lora,
    )  # fmt: skip


def test_a_run_leaves_the_base_alone_and_chains_to_the_next(tiny_folder: Path, tmp_path: Path) -> None:
    """SFT with an adapter, GRPO from it with the same adapter, then everything trained from the merged weights."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    first = sft.train(sft_config(tmp_path, str(tmp_path / "base")), name="sft", runs_dir=tmp_path, resume=False)
    second = grpo.train(grpo_config(tmp_path, "sft"), name="rl", runs_dir=tmp_path, resume=False)
    third = sft.train(sft_config(tmp_path, "rl", None), name="all", runs_dir=tmp_path, resume=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == files
    folders = [run / "checkpoints/step-000003" for run in (first, second, third)]
    for folder in folders[:2]:
        record = json.loads((folder / "strop_base.json").read_text())
        assert (folder / record["folder"]).resolve() == tmp_path / "base"
        assert record["weights_sha256"] == tensors_hash(tmp_path / "base")
        assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
        tensors, _ = load_training_state(resolve(str(folder), tmp_path))
        assert tensors and all(".adapter." in name or name.startswith("reference.") for name in tensors)
    assert (folders[2] / "model.safetensors").is_file()
    # Each begins where the one before it ended: at step 1 the policy is the reference, so that their KL is 0.
    lines = list(read_lines(second / "metrics.jsonl"))
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]
    hashes = [weight_hash(load_model(folder, dtype=torch.float32)) for folder in (tiny_folder, *folders)]
    assert len(set(hashes)) == 4


def test_merge_on_the_command_line(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    sft.train(sft_config(tmp_path, str(tiny_folder)), name="run", runs_dir=Path("runs"), resume=False)
    assert main(["models", "merge", "run", "whole"]) == 0
    whole = load_model("whole")
    assert isinstance(whole, Decoder) and whole.adapter is None
    assert whole.dtype == torch.float32
    folder = Path("runs/run/checkpoints/step-000003")
    assert weight_hash(whole) == weight_hash(load_model(folder))
    theirs = AutoModelForCausalLM.from_pretrained("whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], logits(whole), rtol=1e-5, atol=1e-5)
    assert Tokenizer.load("whole").content_hash == Tokenizer.load(tiny_folder).content_hash
    # Every command reads the adapter as it is; in float32 it says the same as the merged folder.
    capsys.readouterr()
    said = []
    for model in ("run", "run/3", str(folder), "whole"):
        options = ["--prompt", "the cat", "--plain", "--max-new-tokens", "8", "--dtype", "float32"]
        assert main(["generate", model, *options]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1 and said[0].strip()


def test_runs_may_move_together_with_their_base(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "one/base")
    runs = tmp_path / "one/runs"
    run = sft.train(sft_config(tmp_path, str(tmp_path / "one/base")), name="run", runs_dir=runs, resume=False)
    before = weight_hash(load_model(run / "checkpoints/step-000003"))
    (tmp_path / "one").rename(tmp_path / "two")
    assert weight_hash(load_model(tmp_path / "two/runs/run/checkpoints/step-000003")) == before
