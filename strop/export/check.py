"""An export opened by the runtime that it is for: the same ids for the same text, then the same greedy text.

Both sides compute from the weights as they are stored, ours in float32. llama.cpp rounds activations to the type of the
matrix that they meet, so that its logits differ from ours where that is not float32: a token that it takes may then lie
a little below our best one. How far is measured, and bounded by GAPS.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strop.export.gguf_file import as_stored
from strop.export.target import auto_tokenizer_splits_alike
from strop.generation import Engine
from strop.models import CausalLM, Decoder
from strop.tokenizer import Tokenizer
from strop.types import Message, PackedBatch, Request, SamplingParams, Segment

GAPS = {"f32": 1e-3, "f16": 0.03, "bf16": 0.2, "q8_0": 0.5}
"""How far below our largest logit the other runtime's choice may lie, by the type of the matrices."""

NEW_TOKENS = 32
QUESTIONS = ("Write one sentence about the sea.", "What is 12 + 30?", "Name three colours, one per line.")
TEXTS = ("The capital of France is", "def add(a, b):\n    return", "In 1969  the first 3 men;  don't you\n\nKnow? é")
_RUNTIMES = {"gguf": ("llama_cpp", "pip install 'strop[llama]' compiles it"), "hf": ("transformers", "")}


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    num_texts: int
    num_equal: int
    """Greedy completions that are the same token for token."""
    num_tokens: int
    gap: float
    """The furthest that a token of theirs lies below our largest logit; 0 where all texts are equal."""
    difference: float
    """The largest difference of a logprob, over all tokens of the vocabulary at all positions of their texts."""

    def __str__(self) -> str:
        return (
            f"{self.num_equal} of {self.num_texts} greedy texts equal ({self.num_tokens} tokens); logprobs differ by "
            f"at most {self.difference:.2g}, choices by {self.gap:.2g}"
        )


def require_runtime(kind: str) -> None:
    """Raise ValueError with the remedy where the runtime for this kind of export ("gguf" or "hf") is missing."""
    module, remedy = _RUNTIMES[kind]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"--check needs {module} for --to {kind}: {remedy}, or leave out --check")


def check_gguf(model: Decoder, tokenizer: Tokenizer, path: Path, *, dtype: str) -> CheckReport:
    """Compare llama.cpp on the file with our model, whose weights become those of the file, in float32.

    Raises ValueError where ids, stop tokens or texts differ by more than GAPS[dtype] explains.
    """
    as_stored(model, dtype)
    with _LlamaCpp(path, min(512, model.config.max_position_embeddings)) as other:
        for text in TEXTS:
            _require_same_ids(text, tokenizer.encode_prompt(text), other.encode(text))
        for stop in tokenizer.stop_token_ids:
            if not other.is_stop(stop):
                raise ValueError(f"llama.cpp does not stop at {tokenizer.decode([stop], skip_special_tokens=False)!r}")
        if tokenizer.chat_template is not None:
            for messages in _chats():
                _require_same_ids(messages, tokenizer.encode_prompt(messages), other.encode_chat(messages))
        report = _compare(model, tokenizer, other.greedy)
    return _accepted(report, GAPS[dtype])


def check_folder(model: CausalLM, tokenizer: Tokenizer, folder: Path) -> CheckReport:
    """Compare transformers on the folder with our model, both in float32. Raises ValueError where they differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    assert isinstance(model, nn.Module)
    model.float()
    reader = AutoTokenizer if auto_tokenizer_splits_alike(tokenizer, folder) else PreTrainedTokenizerFast
    theirs: Any = reader.from_pretrained(folder)
    for text in TEXTS:
        _require_same_ids(text, tokenizer.encode_prompt(text), theirs(text)["input_ids"])
    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in other.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} of the exported folder has values that are not finite")

    def greedy(prompt: Sequence[int], num_tokens: int, stops: Sequence[int]) -> tuple[list[int], Tensor]:
        with torch.no_grad():
            ids = other.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=list(stops),
                pad_token_id=stops[0],
                repetition_penalty=1.0,
            )[0, len(prompt) :].tolist()
            logits = other(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        return ids, logits

    return _accepted(_compare(model, tokenizer, greedy), GAPS["f32"])


Greedy = Callable[[Sequence[int], int, Sequence[int]], tuple[list[int], Tensor]]
"""(prompt, at most so many tokens, stop ids) -> (the likeliest tokens, the logits (T, V) that they were taken from)."""


def _compare(model: CausalLM, tokenizer: Tokenizer, greedy: Greedy) -> CheckReport:
    stops = tokenizer.stop_token_ids
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_token_ids=stops)
    room = min(512, model.config.max_position_embeddings) - NEW_TOKENS
    chats = _chats() if tokenizer.chat_template is not None else []
    prompts = [tuple(tokenizer.encode_prompt(prompt)) for prompt in (*TEXTS, *chats)]
    prompts = [prompt for prompt in prompts if 0 < len(prompt) <= room]
    if not prompts:
        raise ValueError(f"--check needs a model with more than {NEW_TOKENS} positions")
    requests = [Request(prompt_ids=prompt, sampling=sampling) for prompt in prompts]
    ours = [list(group[0].token_ids) for group in Engine(model, tokenizer).generate(requests)]
    num_equal = num_tokens = 0
    gap = difference = 0.0
    for prompt, mine in zip(prompts, ours, strict=True):
        theirs, their_logits = greedy(prompt, NEW_TOKENS, stops)
        num_equal += theirs == mine
        num_tokens += len(theirs)
        logits = _logits(model, [*prompt, *theirs])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
        gap = max(gap, float((logits.amax(1) - chosen).max()))
        difference = max(difference, float((logits.log_softmax(1) - their_logits.log_softmax(1)).abs().max()))
    return CheckReport(
        num_texts=len(prompts), num_equal=num_equal, num_tokens=num_tokens, gap=gap, difference=difference
    )


def _logits(model: CausalLM, token_ids: Sequence[int]) -> Tensor:
    ids = torch.tensor(token_ids)
    batch = PackedBatch(
        token_ids_T=ids,
        labels_T=ids,
        loss_mask_T=torch.ones_like(ids, dtype=torch.bool),
        segments=(Segment(trunk=len(ids)),),
    )
    with torch.no_grad():
        return model.logits(model.hidden(batch)).float()


def _accepted(report: CheckReport, gap: float) -> CheckReport:
    if not report.gap <= gap or not np.isfinite(report.difference):
        raise ValueError(f"the other runtime writes other text: {report}, where {gap:g} is what rounding explains")
    return report


def _require_same_ids(prompt: object, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) != list(theirs):
        raise ValueError(f"the other runtime reads {prompt!r} as {list(theirs)}, not as {list(ours)}")


def _chats() -> list[tuple[Message, ...]]:
    return [({"role": "user", "content": question},) for question in QUESTIONS]


class _LlamaCpp:
    """llama.cpp on one file: every logit kept, keys and values in float32 as ours are."""

    def __init__(self, path: Path, num_positions: int) -> None:
        self._library: Any = importlib.import_module("llama_cpp")
        try:
            with _quiet(self._library):
                self._llama: Any = self._library.Llama(
                    str(path),
                    n_ctx=num_positions,
                    logits_all=True,
                    type_k=self._library.GGML_TYPE_F32,
                    type_v=self._library.GGML_TYPE_F32,
                    n_threads=torch.get_num_threads(),
                    n_threads_batch=torch.get_num_threads(),
                    verbose=False,
                )
        except (ValueError, AssertionError) as error:
            raise ValueError(f"llama.cpp cannot load the export: {error}") from error

    def __enter__(self) -> _LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    def encode(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=True, special=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        template = self._llama.metadata["tokenizer.chat_template"]
        texts = [self._text(token) for token in (self._llama.token_eos(), self._llama.token_bos())]
        formatter = self._library.llama_chat_format.Jinja2ChatFormatter(template, *texts)
        prompt = formatter(messages=list(messages)).prompt
        ids = self._llama.tokenize(prompt.encode(), add_bos=True, special=True)
        twice = (
            ids[:2] == [self._llama.token_bos()] * 2
        )  # the template wrote one itself; llama.cpp's own chat looks too
        return ids[1:] if twice else ids

    def _text(self, token: int) -> str:
        return self._llama.detokenize([token], special=True).decode()

    def is_stop(self, token: int) -> bool:
        vocabulary = self._library.llama_model_get_vocab(self._llama.model)
        return bool(self._library.llama_vocab_is_eog(vocabulary, token))

    def greedy(self, prompt: Sequence[int], num_tokens: int, stops: Sequence[int]) -> tuple[list[int], Tensor]:
        self._llama.reset()
        self._llama.eval(list(prompt))
        ids: list[int] = []
        rows: list[Tensor] = []
        while len(ids) < num_tokens and not set(ids[-1:]) & set(stops):
            if ids:
                self._llama.eval(ids[-1:])
            rows.append(torch.from_numpy(self._llama.scores[self._llama.n_tokens - 1].copy()))
            ids.append(int(rows[-1].argmax()))
        return ids, torch.stack(rows)


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without what llama.cpp writes to stderr while it loads."""
    callback = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(callback, None)
    try:
        yield
    finally:
        _KEPT.append(callback)  # llama.cpp goes on calling it


_KEPT: list[Any] = []
