"""pass@k, maj@n, intervals and bits per byte, against their definitions and published values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.evals.intervals import mean_interval, wilson_interval
from strop.evals.tasks import evaluate_tasks
from strop.evals.text import bits_per_byte
from strop.models import Decoder, ModelConfig, init_model, load_model
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, PackedBatch, Request, SamplingParams, Segment, Task, Verdict


class ScriptedEngine:
    """Says what it was told to say."""

    max_length = 128

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self.texts = texts
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self.requests = list(requests)
        return [
            [
                Completion(
                    token_ids=(1,) * (len(text) or 1),
                    sampling_logprobs=(0.0,) * (len(text) or 1),
                    finish_reason="length" if text.endswith("...") else "stop",
                    text=text,
                )
                for text in group
            ]
            for group in self.texts
        ]


class Judge:
    """Right when the text is the task's answer; "broken" breaks the verifier, "?" gives no answer."""

    name = "judge"

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        return [self._verdict(task, completion) for task, completion in zip(tasks, completions, strict=True)]

    def _verdict(self, task: Task, completion: Completion) -> Verdict:
        if completion.text == "broken":
            return Verdict(score=0.0, status="infra_error", detail="the sandbox is down")
        is_right = completion.text.lower() == task.columns["answer"]
        return Verdict(score=float(is_right), status="ok" if is_right else "wrong")

    def close(self) -> None:
        """Holds nothing."""


class JudgeOfAnswers(Judge):
    """Case does not matter to it, so that "Yes" and "yes" are one vote."""

    def answer_key(self, completion: Completion) -> str | None:
        return None if completion.text == "?" else completion.text.lower()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["abc"], 259)


def evaluate(tokenizer: Tokenizer, texts: Sequence[Sequence[str]], reward: Judge, **options: Any) -> dict[str, float]:
    tasks = [Task(id=f"t:{i}", prompt=f"question {i}", columns={"answer": "yes"}) for i in range(len(texts))]
    report = evaluate_tasks(
        ScriptedEngine(texts),  # type: ignore[arg-type]
        tokenizer,
        tasks,
        reward,
        sampling=SamplingParams(max_new_tokens=8),
        num_samples=len(texts[0]),
        **options,
    )
    assert len(report.samples) == len(texts) * len(texts[0])
    return report.metrics


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(tokenizer: Tokenizer) -> None:
    texts = [["yes", "no", "no", "yes"], ["no", "no", "no", "no"], ["no", "no", "yes", "no"]]
    metrics = evaluate(tokenizer, texts, Judge(), k=(1, 2, 3, 4))
    for k in (1, 2, 3, 4):
        shares = []
        for group in texts:
            subsets = list(itertools.combinations(group, k))
            shares.append(sum("yes" in subset for subset in subsets) / len(subsets))
        assert metrics[f"pass@{k}"] == pytest.approx(sum(shares) / 3)
        assert metrics[f"pass@{k}_low"] <= metrics[f"pass@{k}"] <= metrics[f"pass@{k}_high"]
        assert (metrics[f"pass@{k}_low"], metrics[f"pass@{k}_high"]) == pytest.approx(mean_interval(shares))
    assert metrics["score"] == pytest.approx(3 / 12)
    assert metrics["num_tasks"] == 3


def test_answers_whose_verifier_broke_are_left_out_not_wrong(tokenizer: Tokenizer) -> None:
    texts = [["yes", "broken", "no", "broken"], ["broken"] * 4, ["yes", "yes", "yes", "broken"]]
    metrics = evaluate(tokenizer, texts, Judge(), k=(1, 3))
    assert metrics["pass@1"] == pytest.approx((1 / 2 + 1) / 2)
    # Only the third task has three judged answers.
    assert metrics["pass@3"] == 1.0
    assert metrics["infra_errors"] == 7
    assert metrics["num_unjudged"] == 1
    assert metrics["score"] == pytest.approx(4 / 5)
    with pytest.raises(RuntimeError, match="no answer could be judged; the first failure: the sandbox is down"):
        evaluate(tokenizer, [["broken"]], Judge())


def test_majority_counts_answers_ties_go_to_the_first_and_unreadable_ones_have_no_vote(tokenizer: Tokenizer) -> None:
    cases = [
        (["yes", "Yes", "no", "no", "nope"], 1.0),  # two keys of two votes: the one sampled first
        (["no", "YES", "yes", "no", "nope"], 0.0),  # the same tie, the other way round
        (["?", "?", "?", "yes", "?"], 1.0),
        (["?", "?", "?", "?", "?"], 0.0),
        (["broken", "broken", "broken", "yes", "yes"], 1.0),
        (["no", "no", "yes", "yes", "yes"], 1.0),
    ]
    for texts, expected in cases:
        assert evaluate(tokenizer, [texts], JudgeOfAnswers())["maj@5"] == expected, texts
    # Without answer_key the whole text votes, and "YES" is another answer than "yes".
    assert evaluate(tokenizer, [["yes", "YES", "no", "no", "nope"]], Judge())["maj@5"] == 0.0
    assert "maj@1" not in evaluate(tokenizer, [["yes"]], Judge())


def test_length_and_truncation_count_every_answer(tokenizer: Tokenizer) -> None:
    metrics = evaluate(tokenizer, [["yes", "no..."], ["no", "broken"]], Judge())
    assert metrics["truncated"] == 1 / 4
    assert metrics["mean_length"] == (3 + 5 + 2 + 6) / 4


def test_every_task_has_its_own_seed_and_the_same_one_next_time(tokenizer: Tokenizer) -> None:
    def seeds(seed: int) -> list[int]:
        engine = ScriptedEngine([["yes"], ["yes"]])
        tasks = [Task(id=f"t:{i}", prompt="q", columns={"answer": "yes"}) for i in range(2)]
        options: dict[str, Any] = {"sampling": SamplingParams(max_new_tokens=8), "seed": seed}
        evaluate_tasks(engine, tokenizer, tasks, Judge(), **options)  # type: ignore[arg-type]
        return [request.seed for request in engine.requests]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 4


def test_bad_requests_are_refused_before_any_work(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"k=5 needs between 1 and num_samples=2 answers per task: raise num_samples"):
        evaluate(tokenizer, [["yes", "no"]], Judge(), k=(1, 5))
    with pytest.raises(ValueError, match="there is no task to evaluate"):
        evaluate_tasks(ScriptedEngine([]), tokenizer, [], Judge(), sampling=SamplingParams())  # type: ignore[arg-type]
    engine = ScriptedEngine([["yes"]])
    task = Task(id="held_out.jsonl:3", prompt="a" * 121, columns={"answer": "yes"})
    with pytest.raises(ValueError, match=r"held_out.jsonl:3: the prompt has 121 tokens; with max_new_tokens=8 it exc"):
        evaluate_tasks(engine, tokenizer, [task], Judge(), sampling=SamplingParams(max_new_tokens=8))  # type: ignore[arg-type]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_interval_of_a_mean() -> None:
    assert mean_interval([1.0, 0.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 5)
    assert mean_interval([1.0]) == wilson_interval(1, 1)
    low, high = mean_interval([0.5] * 20)
    assert low < 0.35 and high > 0.65, "equal rates are no proof that the next task has the same"
    rates = [0.25, 0.5, 0.75, 0.5]
    deviation = math.sqrt(sum((rate - 0.5) ** 2 for rate in rates) / 3)
    assert mean_interval(rates) == pytest.approx((0.5 - 1.96 * deviation / 2, 0.5 + 1.96 * deviation / 2), abs=1e-4)
    assert mean_interval([1.0, 1.0, 0.9, 1.0])[1] == 1.0
    for values in ([], ()):
        with pytest.raises(ValueError, match="at least one task"):
            mean_interval(values)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def unigram_model(probabilities_V: torch.Tensor) -> Decoder:
    """A decoder that predicts the same law everywhere: one embedding for all tokens, so one hidden state."""
    config = ModelConfig(
        vocab_size=len(probabilities_V),
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        tie_embeddings=False,
    )
    model = init_model(config, seed=0, dtype=torch.float64)
    assert model.head is not None
    with torch.no_grad():
        model.embedding.weight[:] = model.embedding.weight[0].clone()
        batch = torch.tensor([0])
        one = PackedBatch(token_ids_T=batch, labels_T=batch, loss_mask_T=batch == 0, segments=(Segment(trunk=1),))
        hidden_D = model.hidden(one)[0]
        model.head.weight.copy_(probabilities_V.log()[:, None] * hidden_D / hidden_D.square().sum())
    return model


def test_bits_per_byte_of_a_known_law_is_the_cross_entropy_whatever_the_cuts(tokenizer: Tokenizer) -> None:
    weights_V = torch.rand(259, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probabilities_V = weights_V / weights_V.sum()
    model = unigram_model(probabilities_V)
    texts = ["it was a bright cold day in April, and the clocks were striking thirteen", "b", "", "zürich ☃"]
    tokens = [token for text in texts for token in tokenizer.encode(text)[1:]]
    expected_bits = -sum(math.log2(probabilities_V[token]) for token in tokens)
    expected_bytes = sum(len(text.encode()) - 1 for text in texts if text)
    assert len(tokens) == expected_bytes  # one token per byte
    for context_length, batch_tokens in ((64, 4096), (64, 1), (7, 16), (1, 3)):
        report = bits_per_byte(model, tokenizer, texts, context_length=context_length, batch_tokens=batch_tokens)
        assert report["num_bytes"] == report["num_tokens"] == expected_bytes
        assert report["bits_per_byte"] == pytest.approx(expected_bits / expected_bytes, rel=1e-9)
        assert report["loss"] == pytest.approx(report["bits_per_byte"] * math.log(2), rel=1e-9)
        assert report["perplexity"] == pytest.approx(2 ** report["bits_per_byte"], rel=1e-9)


def test_a_first_character_of_several_tokens_is_given_as_a_whole(tokenizer: Tokenizer) -> None:
    model = unigram_model(torch.full((259,), 1 / 259, dtype=torch.float64))
    for text, first_bytes in (("éab", 2), ("☃abc", 3), ("\U0001f600ab", 4), ("abc", 1)):
        report = bits_per_byte(model, tokenizer, [text], context_length=64)
        assert report["num_bytes"] == len(text.encode()) - first_bytes
        assert report["num_tokens"] == len(text.encode()) - first_bytes
        assert report["bits_per_byte"] == pytest.approx(math.log2(259))
        cut = bits_per_byte(model, tokenizer, [text], context_length=1)
        assert cut["num_tokens"] == report["num_tokens"]
    with pytest.raises(ValueError, match="no document goes beyond its first token"):
        bits_per_byte(model, tokenizer, ["☃", "", "x"], context_length=8)


def test_a_tokenizer_with_bos_predicts_every_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    hf.bos_token = "<|im_start|>"
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with_bos = Tokenizer(hf, name="with bos")
    assert with_bos.encode_prompt("abc")[0] == with_bos.bos_id == 1
    model = unigram_model(torch.full((259,), 1 / 259, dtype=torch.float64))
    report = bits_per_byte(model, with_bos, ["abc", "é"], context_length=8)
    assert report["num_bytes"] == report["num_tokens"] == 5


def test_cuts_take_away_context_and_nothing_else(tiny_folder: Path) -> None:
    """Piece by piece with transformers: each piece begins with the token before it and sees nothing further back."""
    from transformers import AutoModelForCausalLM

    tokenizer, model = Tokenizer.load(tiny_folder), load_model(tiny_folder)
    oracle = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    text = "the quick brown fox jumps over the lazy dog and sleeps"
    ids = tokenizer.encode(text)
    found = {}
    for context_length in (100, 6, 1):
        nats = 0.0
        for start in range(0, len(ids) - 1, context_length):
            piece = torch.tensor([ids[start : start + context_length + 1]])
            with torch.no_grad():
                logprobs = oracle(piece[:, :-1]).logits[0].log_softmax(-1)
            nats -= float(logprobs.gather(1, piece[0, 1:, None]).sum())
        found[context_length] = bits_per_byte(model, tokenizer, [text], context_length=context_length)["bits_per_byte"]
        num_bytes = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
        assert found[context_length] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    assert len({round(value, 4) for value in found.values()}) == 3
    # A context that the model does not have is not pretended.
    long = " ".join(str(i) for i in range(100))
    assert len(tokenizer.encode(long)) > 200
    whole = bits_per_byte(model, tokenizer, [long], context_length=1000)
    assert whole == bits_per_byte(model, tokenizer, [long], context_length=128)
    assert whole != bits_per_byte(model, tokenizer, [long], context_length=127)
    with pytest.raises(ValueError, match="context_length=0 must be at least 1"):
        bits_per_byte(model, tokenizer, [long], context_length=0)
