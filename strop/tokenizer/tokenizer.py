"""The tokenizer: prompts, completions and chats as token ids with loss masks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from strop.tokenizer.chat import ChatTemplate, Span, produced_tokens
from strop.types import Message

_STOP_KEY = "stop_token_ids"
"""Extra key of tokenizer_config.json: keeps the stops that came from a generation_config.json, which is the model's."""


class Tokenizer:
    """A Hugging Face fast tokenizer, with one answer to what a model sees, what counts in its loss and where it stops.

    Masks say who produced a token; padding never enters into it, and no pad token is needed.

    Example:
        tokenizer = Tokenizer.load("runs/base/checkpoints/step-000120")
        token_ids, loss_mask = tokenizer.encode_chat([{"role": "user", "content": "Hi"}, ...])
    """

    def __init__(self, hf: PreTrainedTokenizerFast, *, name: str, stop_token_ids: Sequence[int] = ()):
        """name is what errors call it; stop_token_ids are stops that hf itself does not know."""
        if not isinstance(hf, PreTrainedTokenizerFast):
            raise ValueError(
                f"the tokenizer of {name} is a {type(hf).__name__}: only fast tokenizers (tokenizer.json) are supported"
            )
        self.hf = hf
        """The wrapped tokenizer. Its own encode and decode may truncate, pad or clean up; ours never do."""
        self.name = name
        self._backend = hf.backend_tokenizer
        self._chat = ChatTemplate(hf, f"tokenizer {name!r}")
        self._extra_stop_ids = tuple(stop_token_ids)
        with_special = self.encode("a", add_special_tokens=True)
        self._adds_bos = hf.bos_token_id is not None and with_special[:1] == [hf.bos_token_id]
        # SentencePiece-like tokenizers put a space before the first word of whatever they encode.
        alone, inside = self.encode("a"), self.encode("\na")
        self._prefixes_space = inside[-len(alone) :] != alone

    @classmethod
    def load(cls, reference: str | Path) -> Tokenizer:
        """Returns the tokenizer of a local folder or of a model on the Hugging Face hub. Code in it is never run.

        Raises ValueError if there is none, or it is broken.
        """
        name = str(reference)
        is_folder = Path(reference).is_dir()
        if not is_folder and (isinstance(reference, Path) or name.count("/") > 1 or name.startswith((".", "/", "~"))):
            raise ValueError(f"no tokenizer folder {name!r}: give an existing folder or a hub name like 'owner/model'")
        if is_folder and not any(
            (Path(reference) / file).is_file()
            for file in ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
        ):
            raise ValueError(f"the folder {name!r} has no tokenizer: tokenizer.json is missing")
        try:
            if _is_complete(Path(reference)):
                hf = PreTrainedTokenizerFast.from_pretrained(name)
            else:
                hf = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception for a broken file
            raise ValueError(f"cannot load a tokenizer from {name!r}: {type(error).__name__}: {error}") from error
        kept = _as_ids(hf.init_kwargs.get(_STOP_KEY), f"{name}/tokenizer_config.json: {_STOP_KEY}")
        stop_token_ids = [*kept, *_generation_config_stops(name)]
        return cls(hf, name=name, stop_token_ids=list(dict.fromkeys(stop_token_ids)))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, from which load gives the same back."""
        if self._extra_stop_ids:
            self.hf.init_kwargs[_STOP_KEY] = list(self._extra_stop_ids)
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.hf.save_pretrained(str(folder))

    @cached_property
    def vocab_size(self) -> int:
        """The number of embedding rows that a model needs: the largest id plus one, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        return cast("int | None", self.hf.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        """Ends a document, and a plain-text completion. A chat turn may end with another token: see stop_token_ids."""
        return cast("int | None", self.hf.eos_token_id)

    @property
    def pad_id(self) -> int | None:
        """None for many tokenizers; nothing in Strop needs it."""
        return cast("int | None", self.hf.pad_token_id)

    @property
    def chat_template(self) -> str | None:
        """The default template's source."""
        template = self.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion: the EOS, the chat template's end of turn, generation_config.json's.

        EOS alone is not enough: Llama 3's chat turns end with <|eot_id|>, and Qwen's base models name <|endoftext|>
        their EOS though their template ends turns with <|im_end|>.
        """
        found = (self.eos_id, self._end_of_turn_id, *self._extra_stop_ids)
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    @cached_property
    def content_hash(self) -> str:
        """Hex digest of vocabulary, special tokens and template: the same for the same tokenizer in two folders.

        Without the stops of a generation_config.json, which a checkpoint may write differently.
        """
        content = (
            self._backend.to_str(),
            json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str),
            json.dumps(self.hf.chat_template, sort_keys=True),
        )
        return hashlib.blake2b("\0".join(content).encode(), digest_size=16).hexdigest()

    def has_same_ids(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both: a model of the one can read what the other made."""
        mine, theirs = (one._backend.get_vocab(with_added_tokens=True) for one in (self, other))
        return mine == theirs

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text, never truncated. With add_special_tokens, what the tokenizer surrounds it with."""
        return self._encoding(text, add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of the ids exactly, without transformers' clean-up of spaces. Ids that the model has and
        the tokenizer lacks (padding of the embedding) decode to nothing; half a character decodes to U+FFFD.
        """
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_prompt(self, prompt: str | Sequence[Message], *, tools: Sequence[Any] | None = None) -> list[int]:
        """Returns what the model sees before it writes: text with the BOS, or a chat with the generation prompt.

        A chat whose last message is the assistant's is to be continued inside that message. The BOS comes once where
        the tokenizer adds one to text, also for a chat template that forgets it (transformers' apply_chat_template
        then gives none), and never twice for one that writes it itself.
        """
        return self._encode_from_start(self._prompt_text(prompt, tools))[0]

    def encode_untrusted_chat(self, messages: Sequence[Message]) -> list[int]:
        """As encode_prompt of a chat whose contents strangers typed: no text in them becomes a control token.

        "<|im_end|>" in a message is then those ten characters, not the end of the turn. Chats without such text get
        the same ids from both.
        """
        specials = sorted(self._specials, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, specials))) if specials else None
        marks: dict[str, str] = {}

        def mark(found: re.Match[str]) -> str:
            name = f"\ue000{len(marks)}\ue001"  # private characters, which templates pass on as they are
            marks[name] = found[0]
            return name

        if pattern is None or not any(pattern.search(str(message.get("content"))) for message in messages):
            return self.encode_prompt(messages)
        text = self._prompt_text(
            [
                {**message, "content": pattern.sub(mark, re.sub("[\ue000\ue001]", "\ufffd", message["content"]))}
                for message in messages
            ],
            None,
        )
        parts = re.split("(\ue000[0-9]+\ue001)", text)
        token_ids = self._encode_from_start(parts[0])[0]
        for part in parts[1:]:
            is_literal = part in marks
            token_ids += (
                self._literal.encode(marks[part], add_special_tokens=False).ids
                if is_literal
                else (self._encode_continuation(part)[0] if part else [])
            )
        return token_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token; of a byte-level token that is half a character, that half."""
        token = self.hf.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        text = self.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text.encode()
        if (found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)) is not None:
            return bytes.fromhex(found[1])
        table = _bytes_of_characters()
        return bytes(table[one] for one in token) if all(one in table for one in token) else text.encode()

    def encode_completion(self, text: str) -> list[int]:
        """Returns the ids of a text that continues a plain-text prompt, then the EOS.

        Raises ValueError if the tokenizer has no EOS. The end of a chat turn is the template's matter: encode_chat.
        """
        return [*self._encode_continuation(text)[0], self._required_eos()]

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a whole chat and its loss mask, True where the assistant would have sampled the token.

        The chat is rendered and tokenised once; each turn counts from the end of its generation prompt to its stop
        token, without the newline that the template may add. For a template without {% generation %} marks that
        rewrites earlier turns, those turns do not count (with a warning); if no turn is left, ValueError.
        """
        text, spans = self._chat.render_with_spans(messages, tools)
        token_ids, extents = self._encode_from_start(text)
        return token_ids, produced_tokens(text, token_ids, extents, spans, self.stop_token_ids)

    def encode_prompt_completion(
        self,
        prompt: str | Sequence[Message],
        completion: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of both and the loss mask; the ids always start with exactly encode_prompt(prompt).

        The completion is tokenised apart, since that is where sampling starts, and where branches leave a trunk.
        Text ends with the EOS, which counts. Of a completion in messages only what the assistant wrote counts (not
        the tool messages between). Raises ValueError if one is text and the other messages, or if the template
        renders the prompt differently once the completion follows.
        """
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion must both be text, or both be lists of messages")
        prompt_text = self._prompt_text(prompt, tools)
        prompt_ids = self._encode_from_start(prompt_text)[0]
        if isinstance(completion, str):
            completion_ids = self.encode_completion(completion)
            return prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)
        assert not isinstance(prompt, str)
        if prompt[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with an assistant message: move it to the completion")
        text, spans = self._chat.render_with_spans([*prompt, *completion], tools, num_context=len(prompt))
        start = len(prompt_text)
        text, spans = text[start:], [(first - start, end - start) for first, end in spans]
        completion_ids, extents = self._encode_continuation(text)
        mask = produced_tokens(text, completion_ids, extents, spans, self.stop_token_ids)
        if not any(mask):
            raise ValueError("the completion has no assistant message: there is nothing to train on")
        return prompt_ids + completion_ids, [False] * len(prompt_ids) + mask

    def check_fits(self, vocab_size: int) -> None:
        """Raises ValueError if some id has no row in a model's embedding of vocab_size rows."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer {self.name!r} has {self.vocab_size} ids, but the model's vocabulary has only {vocab_size}: "
                f"use the tokenizer that belongs to the model, or a model with vocab_size >= {self.vocab_size}"
            )

    @cached_property
    def _specials(self) -> list[str]:
        """Texts that encode as control tokens."""
        return [one.content for one in self._backend.get_added_tokens_decoder().values() if one.special]

    @cached_property
    def _literal(self) -> Backend:
        """A copy for which control tokens are ordinary text."""
        copy = Backend.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _end_of_turn_id(self) -> int | None:
        if self.chat_template is None:
            return None
        answer = "Zq7"  # what no template adds, trims or rewrites
        text = self._chat.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}])
        end_of_answer = text.rfind(answer) + len(answer)
        token_ids, extents = self._encode_from_start(text)
        added = self._backend.get_added_tokens_decoder()
        for token_id, (start, end) in zip(token_ids, extents, strict=True):
            if start >= end_of_answer and text[start:end].strip():
                return token_id if token_id in added else None
        return None

    def _prompt_text(self, prompt: str | Sequence[Message], tools: Sequence[Any] | None) -> str:
        if not isinstance(prompt, str):
            return self._chat.render(prompt, tools, add_generation_prompt=True)
        if tools:
            raise ValueError("tools need a prompt of messages: plain text has no place for them")
        return prompt

    def _required_eos(self) -> int:
        if self.eos_id is None:
            raise ValueError(
                f"tokenizer {self.name!r} has no EOS token, so that a model could never learn to stop: set eos_token "
                "in its tokenizer_config.json"
            )
        return self.eos_id

    def _encoding(self, text: str, add_special_tokens: bool = False) -> Any:
        if self._backend.truncation or self._backend.padding:  # from its file, or left behind by a call of hf
            self._backend.no_truncation()
            self._backend.no_padding()
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise ValueError(f"text with half a UTF-16 surrogate pair is not Unicode: {text!r:.200}") from error

    def _encode_with_extents(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids, and the characters of each. Some tokenizers trim spaces off a token's offsets: they are given back to
        the token, which starts where the one before it ended. The tokens of one split character all cover it.
        """
        encoding = self._encoding(text)
        extents: list[Span] = []
        reached = 0
        for start, end in encoding.offsets:
            extents.append((min(start, reached), end))
            reached = max(reached, end)
        return encoding.ids, extents

    def _encode_from_start(self, text: str) -> tuple[list[int], list[Span]]:
        token_ids, extents = self._encode_with_extents(text)
        if self._adds_bos and token_ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *token_ids], [(0, 0), *extents]
        return token_ids, extents

    def _encode_continuation(self, text: str) -> tuple[list[int], list[Span]]:
        """As _encode_with_extents, for a text that other ids come before, which must not gain a space."""
        if self._prefixes_space:
            line_ids = self.encode("\n")
            token_ids, extents = self._encode_with_extents("\n" + text)
            if token_ids[: len(line_ids)] == line_ids:
                extents = [(max(start - 1, 0), max(end - 1, 0)) for start, end in extents]
                return token_ids[len(line_ids) :], extents[len(line_ids) :]
        return self._encode_with_extents(text)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _is_complete(folder: Path) -> bool:
    """Whether tokenizer.json is the whole truth. AutoTokenizer may then still rebuild the tokenizer from the model_type
    in config.json: next to a Qwen2 model it would put Qwen2's splitting rules around any other vocabulary.
    """
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    declared = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return declared in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _generation_config_stops(reference: str) -> list[int]:
    path = cached_file(
        reference,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return []
    try:
        eos = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error
    return _as_ids(eos, f"{path}: eos_token_id")


def _as_ids(value: Any, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"{where} must be an id or a list of ids, got {value!r}")
    return ids
