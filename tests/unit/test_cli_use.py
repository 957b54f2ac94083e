"""strop generate, chat and eval on a tiny model: frozen weights, and exactly what the engine samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.cli import main as cli
from strop.cli.chat import Arguments as ChatArguments
from strop.cli.chat import converse
from strop.cli.frozen import FrozenModel, ModelArguments, frozen_model
from strop.generation import Engine
from strop.models import ModelConfig, init_model, load_model, save_model
from strop.runs import derive_seed
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, Message, Request, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained model."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = train_bpe(["the cat sat on the mat, the dog on the log"], 280)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    model = init_model(config, seed=1)
    with torch.no_grad():
        model.get_parameter("embedding.weight").mul_(4)  # so that samples depend on the prompt and on the seed
    save_model(model, path)
    tokenizer.save(path)
    return path


def expected(folder: Path, prompt: str | Sequence[Message], *, num_samples: int, seed: int) -> list[Completion]:
    tokenizer = Tokenizer.load(folder)
    sampling = SamplingParams(max_new_tokens=12, stop_token_ids=tokenizer.stop_token_ids)
    request = Request(
        prompt_ids=tuple(tokenizer.encode_prompt(prompt)), sampling=sampling, num_samples=num_samples, seed=seed
    )
    return Engine(load_model(folder), tokenizer).generate([request])[0]


def run(*args: object) -> int:
    return cli.main([*map(str, args), "--dtype", "float32"])


def test_generate_writes_what_the_engine_samples_and_proves_the_weights_frozen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out.jsonl"
    args = ("--prompt", "the cat", "the dog", "--num-samples", 2, "--max-new-tokens", 12, "--seed", 5)
    assert run("generate", folder, *args, "--output", output) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    want = [
        completion
        for index, text in enumerate(["the cat", "the dog"])
        for completion in expected(
            folder, [{"role": "user", "content": text}], num_samples=2, seed=derive_seed(5, "generate", index)
        )
    ]
    assert [row["completion"] for row in rows] == [completion.text for completion in want]
    assert [row["id"] for row in rows] == ["prompt 1", "prompt 1", "prompt 2", "prompt 2"]
    assert [row["logprob"] for row in rows] == [pytest.approx(sum(one.sampling_logprobs)) for one in want]
    first, last = capsys.readouterr().err.strip().splitlines()
    hash_before = first.split("weights ")[1]
    assert len(hash_before) == 16 and last == f"weights {hash_before}, unchanged"


def test_generate_plain_leaves_the_chat_template_out(folder: Path, capsys: pytest.CaptureFixture[str]):
    args = ("--prompt", "the cat", "--max-new-tokens", 12)
    assert run("generate", folder, *args, "--plain") == 0
    plain = expected(folder, "the cat", num_samples=1, seed=derive_seed(0, "generate", 0))[0].text
    assert capsys.readouterr().out == plain + "\n"


def test_generate_reads_prompts_from_a_file(folder: Path, tmp_path: Path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "the mat"}\n{"prompt": [{"role": "user", "content": "the log"}]}\n')
    assert run("generate", folder, "--file", source, "--max-new-tokens", 12, "--output", output) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"].rpartition(":")[2] for row in rows] == ["1", "2"]
    want = expected(folder, "the mat", num_samples=1, seed=derive_seed(0, "generate", 0))[0]
    assert rows[0]["completion"] == want.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", "a", "--plain", "--system", "s"), "--system needs a chat template, not --plain"),
        (("--prompt", "a", "--max-new-tokens", 999), "shorten the prompt or lower max_new_tokens"),
        (("--prompt", "a", "--num-samples", 0), "--num-samples 0: at least 1"),
    ],
)
def test_generate_refuses(folder: Path, args: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]):
    assert run("generate", folder, *args) == 2
    assert message in capsys.readouterr().err


def test_a_change_of_frozen_weights_is_noticed(folder: Path):
    arguments = ModelArguments(model=str(folder), dtype="float32")
    with pytest.raises(AssertionError, match="frozen weights have changed"), frozen_model(arguments) as frozen:
        next(frozen.model.parameters()).data.flatten()[0] += 1e-3  # type: ignore[attr-defined]


def test_frozen_weights_take_no_gradient(folder: Path):
    with frozen_model(ModelArguments(model=str(folder), dtype="float32")) as frozen:
        assert not any(parameter.requires_grad for parameter in frozen.model.parameters())  # type: ignore[attr-defined]


def test_eval_of_a_text_is_the_entropy_of_a_model_that_knows_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    uniform = tmp_path / "uniform"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    with torch.no_grad():
        model.get_parameter("embedding.weight").zero_()  # type: ignore[attr-defined]
    save_model(model, uniform)  # type: ignore[arg-type]
    tokenizer.save(uniform)
    text = tmp_path / "held_out.txt"
    text.write_text("the cat sat on the dog, the mat on the log")
    assert run("eval", uniform, "--text", text) == 0
    metrics = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert float(metrics["loss"]) == pytest.approx(math.log(tokenizer.vocab_size), abs=1e-4)


def test_eval_of_tasks_reports_the_share_that_the_reward_accepts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "judge.py").write_text("def judge(completions, accept, **_):\n    return [float(a) for a in accept]\n")
    tasks, output = tmp_path / "tasks.jsonl", tmp_path / "out.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": "the cat", "accept": n == 0}) + "\n" for n in range(5)))
    args = ("--tasks", tasks, "--reward", f"{tmp_path}/judge.py:judge", "--max-new-tokens", 4, "--limit", 4)
    assert run("eval", folder, *args, "--output", output) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["pass@1"].startswith("0.2500   [0.") and lines["num_tasks"] == "4"
    assert [json.loads(line)["score"] for line in output.read_text().splitlines()] == [1.0, 0.0, 0.0, 0.0]


# Chat


class Recorder:
    """The engine, with every request that it got; interrupt_after presses Ctrl-C at that token of the first answer."""

    def __init__(self, engine: Engine, interrupt_after: int | None = None):
        self.engine, self.interrupt_after = engine, interrupt_after
        self.prompts: list[tuple[int, ...]] = []
        self.completions: list[Completion] = []

    def generate(self, requests: Sequence[Request], *, on_token: Callable[[int, int, int], None]) -> Any:
        self.prompts.append(requests[0].prompt_ids)
        seen = 0

        def pass_on(request_index: int, sample_index: int, token_id: int) -> None:
            nonlocal seen
            on_token(request_index, sample_index, token_id)
            seen += 1
            if len(self.prompts) == 1 and seen == self.interrupt_after:
                raise KeyboardInterrupt

        groups = self.engine.generate(requests, on_token=pass_on)
        self.completions.append(groups[0][0])
        return groups


def chat(
    folder: Path, lines: Sequence[str], monkeypatch: pytest.MonkeyPatch, interrupt_after: int | None = None
) -> tuple[Recorder, Tokenizer]:
    remaining = iter(lines)

    def typed(prompt: str) -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder)
    recorder = Recorder(Engine(model, tokenizer, num_slots=1), interrupt_after)
    arguments = ChatArguments(model=str(folder), system="be brief", max_new_tokens=12, temperature=1.0)
    converse(arguments, FrozenModel(model=model, tokenizer=tokenizer, engine=recorder))  # type: ignore[arg-type]
    return recorder, tokenizer


def test_chat_remembers_until_reset(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    recorder, tokenizer = chat(
        folder, ["the cat", "", "/help", "the dog", "/reset", "the mat", "/quit", "x"], monkeypatch
    )
    system = {"role": "system", "content": "be brief"}
    first = [system, {"role": "user", "content": "the cat"}]
    second = [
        *first,
        {"role": "assistant", "content": recorder.completions[0].text},
        {"role": "user", "content": "the dog"},
    ]
    third = [system, {"role": "user", "content": "the mat"}]
    assert recorder.prompts == [tuple(tokenizer.encode_prompt(messages)) for messages in (first, second, third)]
    answers = "".join(completion.text + "\n" for completion in recorder.completions)
    assert capsys.readouterr().out.replace("commands: /reset, /quit\n", "") == answers


def test_ctrl_c_stops_an_answer_and_keeps_what_there_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recorder, tokenizer = chat(folder, ["the cat", "the dog"], monkeypatch, interrupt_after=3)
    printed = capsys.readouterr().out
    shown = printed.split(" ...\n")[0]
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    second = [*first, {"role": "assistant", "content": shown}, {"role": "user", "content": "the dog"}]
    assert shown and recorder.prompts[1] == tuple(tokenizer.encode_prompt(second))


def test_a_conversation_that_outgrew_the_context_can_go_on_after_reset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recorder, _ = chat(folder, ["the cat " * 200, "/reset", "the dog"], monkeypatch)
    assert "(/reset starts afresh)" in capsys.readouterr().out
    assert len(recorder.completions) == 1
