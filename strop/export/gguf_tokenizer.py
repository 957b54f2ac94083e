"""A tokenizer as the fields from which llama.cpp rebuilds it, or a refusal: never one that splits text differently."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from strop.tokenizer import Tokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""Regular expression of a Split before the byte level -> llama.cpp's name for it."""

_IGNORES_MERGES = {"gpt-2": False, "smollm": False, "qwen2": False, "llama-bpe": True}
"""Whether llama.cpp takes a word that is a token as it is, without its merges."""

_KNOWN_STOPS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|eom_id|>", "<EOT>", "</s>"),
}
"""Control tokens at which llama.cpp stops whatever the file says."""


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer:
    fields: Mapping[str, Any]
    """tokenizer.* of the file."""
    notes: tuple[str, ...]
    """In what llama.cpp will differ from the tokenizer, for people."""


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> GGUFTokenizer:
    """The fields of a byte-level BPE tokenizer for a model with vocab_size rows.

    Rows without a token are padded with unused ones. Raises ValueError, naming it, for whatever llama.cpp would do
    otherwise: a pre-tokenizer that it does not know, a normalizer, tokens that swallow spaces, an unreachable stop.
    """
    raw = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    notes: list[str] = []

    def refuse(what: str) -> ValueError:
        return ValueError(f"tokenizer {tokenizer.name!r} cannot be written as GGUF: {what}. Export it with --to hf")

    pre = _pre_tokenizer_name(raw["pre_tokenizer"])
    if pre is None:
        shown = json.dumps(raw["pre_tokenizer"])
        raise refuse(f"llama.cpp knows no pre-tokenizer like {shown:.300}; it has {', '.join(_IGNORES_MERGES)}")
    _check_model(raw["model"], pre, refuse)
    if (raw["normalizer"] or {}).get("type") == "NFC":
        notes.append("llama.cpp does not normalise text to NFC: text in another form gets other ids there")
    elif raw["normalizer"] is not None:
        raise refuse(f"llama.cpp does not normalise text ({json.dumps(raw['normalizer']):.200})")
    tokens, types = _tokens(tokenizer, raw["added_tokens"], vocab_size, refuse)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    eos, extra_stops = _stops(tokenizer, tokens, notes, refuse)
    adds_bos = _adds_bos(tokenizer, refuse)
    template = _template(tokenizer, refuse)
    fields: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": merges,
        # Without a BOS llama.cpp would call id 11 one, whatever that is. Nothing puts it before a text.
        "ggml.bos_token_id": eos if tokenizer.bos_id is None else tokenizer.bos_id,
        "ggml.eos_token_id": eos,
        **extra_stops,
        "ggml.unknown_token_id": tokenizer.hf.unk_token_id,
        "ggml.padding_token_id": tokenizer.pad_id,
        "ggml.add_bos_token": adds_bos,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": False,
        "chat_template": template,
    }
    return GGUFTokenizer(
        fields={f"tokenizer.{key}": value for key, value in fields.items() if value is not None}, notes=tuple(notes)
    )


def _pre_tokenizer_name(raw: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name of a pre-tokenizer that splits alike; None where it has none."""
    if raw is None:
        return None
    steps = raw["pretokenizers"] if raw["type"] == "Sequence" else [raw]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    uses_regex, before = steps[-1]["use_regex"], steps[:-1]
    if uses_regex:
        is_digits = [(one["type"], one.get("individual_digits")) for one in before] == [("Digits", True)]
        return "gpt-2" if not before else "smollm" if is_digits else None
    if len(before) != 1 or before[0]["type"] != "Split":
        return None
    split = before[0]
    is_plain = str(split["behavior"]).lower() == "isolated" and not split["invert"]
    return _SPLITS.get(str(split["pattern"].get("Regex"))) if is_plain else None


def _check_model(model: Mapping[str, Any], pre: str, refuse: Any) -> None:
    if model["type"] != "BPE":
        raise refuse(f"its model is {model['type']}, not byte-level BPE")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise refuse(f"llama.cpp's BPE has no {field} ({model[field]!r})")
    if not model["merges"]:
        raise refuse("llama.cpp reads no BPE without merges")
    if bool(model.get("ignore_merges")) != _IGNORES_MERGES[pre]:
        raise refuse(
            f"ignore_merges is {bool(model.get('ignore_merges'))}, but llama.cpp's {pre} has {_IGNORES_MERGES[pre]}"
        )


def _tokens(
    tokenizer: Tokenizer, added: list[dict[str, Any]], vocab_size: int, refuse: Any
) -> tuple[list[str], list[int]]:
    tokenizer.check_fits(vocab_size)
    tokens: list[str | None] = [None] * vocab_size
    for token, token_id in tokenizer.hf.backend_tokenizer.get_vocab(with_added_tokens=True).items():
        tokens[token_id] = token
    types = [int(gguf.TokenType.UNUSED if token is None else gguf.TokenType.NORMAL) for token in tokens]
    for one in added:
        for field in ("lstrip", "rstrip", "single_word"):
            if one[field]:
                raise refuse(f"its token {one['content']!r} has {field}, which llama.cpp does not honour")
        types[one["id"]] = int(gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED)
    named = [f"[PAD{token_id}]" if token is None else token for token_id, token in enumerate(tokens)]
    if len(set(named)) != len(named):
        raise refuse("two of its ids have the same text")
    return named, types


def _stops(tokenizer: Tokenizer, tokens: list[str], notes: list[str], refuse: Any) -> tuple[int, dict[str, int | None]]:
    stops = list(tokenizer.stop_token_ids)
    if not stops:
        raise refuse("it has no end-of-text token, so that nothing would ever stop")
    eos = stops[0] if tokenizer.eos_id is None else tokenizer.eos_id
    others = [stop for stop in stops if stop != eos]
    unknown = [stop for stop in others if tokens[stop] not in _KNOWN_STOPS]
    slots = [*unknown, *(stop for stop in others if stop not in unknown)][:2]
    if missing := [tokens[stop] for stop in unknown if stop not in slots]:
        raise refuse(f"GGUF has three places for stop tokens; {', '.join(missing)} would be the fourth")
    for token in sorted(_KNOWN_STOPS & set(tokens)):
        if tokens.index(token) not in stops:
            notes.append(f"llama.cpp stops at {token} too, which is no stop token here")
    eot, eom = [*slots, None, None][:2]
    return eos, {"ggml.eot_token_id": eot, "ggml.eom_token_id": eom}


def _adds_bos(tokenizer: Tokenizer, refuse: Any) -> bool:
    plain, surrounded = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    if surrounded == plain:
        return False
    if surrounded == [tokenizer.bos_id, *plain]:
        return True
    raise refuse(f"it surrounds a text by more than a BOS: {tokenizer.decode(surrounded, skip_special_tokens=False)!r}")


def _template(tokenizer: Tokenizer, refuse: Any) -> str | None:
    template = tokenizer.chat_template
    if template is None:
        return None
    if tokenizer.bos_id is None and "bos_token" in template:
        raise refuse("its chat template writes a bos_token that it does not have")
    # The loss marks are transformers' own; a condition that holds leaves the same text, white space included.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template)
