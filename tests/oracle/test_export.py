"""GGUF files as transformers and the gguf package read them, and the tokenizer as llama.cpp describes its own.

llama.cpp itself is compared by `strop export --check` and `python -m benchmarks.export`: pip compiles it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from benchmarks.export import CONFIGS, SIZES, TEXTS, random_model
from strop.export import write_gguf
from strop.export.gguf_tokenizer import _SPLITS, gguf_tokenizer
from strop.models import save_model
from strop.tokenizer import Tokenizer as OurTokenizer
from strop.tokenizer import train_bpe

READABLE = [
    "llama", "llama, tied, one key-value head", "llama, biases, wide heads", "mistral", "qwen2", "qwen3",
]  # fmt: skip
ROWS = torch.randint(SIZES["vocab_size"], (3, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> OurTokenizer:
    return train_bpe(TEXTS, 500)


def exported(name: str, tokenizer: OurTokenizer, path: Path, dtype: str = "f32") -> Any:
    model = random_model(CONFIGS[name])
    write_gguf(model, tokenizer, path, dtype=dtype, name="tiny")
    return model


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS).logits


@pytest.mark.parametrize("name", READABLE)
def test_transformers_reads_the_weights_that_it_wrote_itself(
    name: str, tokenizer: OurTokenizer, tmp_path: Path
) -> None:
    model = exported(name, tokenizer, tmp_path / "model.gguf")
    save_model(model, tmp_path / "folder")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    # Its reader leaves out head_dim and the biases of some families, which their config.json has.
    config = expected.config
    if name == "mistral":  # in GGUF a llama
        config = LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32)
    assert their_logits(expected).std() > 0.1
    torch.testing.assert_close(their_logits(found), their_logits(expected), rtol=1e-5, atol=1e-5)


def test_transformers_finds_the_same_config_of_a_llama(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    model = exported("llama", tokenizer, tmp_path / "model.gguf")
    save_model(model, tmp_path / "folder")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(their_logits(found), their_logits(expected), rtol=1e-5, atol=1e-5)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "rms_norm_eps",
              "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "eos_token_id")  # fmt: skip
    for field in fields:
        one, two = getattr(found.config, field), getattr(expected.config, field)
        assert one == (pytest.approx(two, rel=1e-6) if isinstance(two, float) else two), field


@pytest.mark.parametrize(("dtype", "most"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", None)])
def test_rounding_is_that_of_the_type(dtype: str, most: float | None, tokenizer: OurTokenizer, tmp_path: Path) -> None:
    exported("qwen3", tokenizer, tmp_path / "exact.gguf")
    exported("qwen3", tokenizer, tmp_path / "rounded.gguf", dtype)
    exact, rounded = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("exact", "rounded"))
    assert [one.name for one in exact] == [one.name for one in rounded]
    kinds = {one.tensor_type.name.lower() for one in rounded}
    assert kinds == {"f32", dtype}
    for one, two in zip(exact, rounded, strict=True):
        a, b = (gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in (one, two))
        if two.tensor_type.name == "F32":
            assert a.ndim == 1 and np.array_equal(a, b)
        elif most is not None:
            assert np.all(np.abs(a - b) <= most * np.abs(a) + 1e-7) and not np.array_equal(a, b)
        else:
            step = np.abs(a.reshape(-1, 32)).max(1, keepdims=True) / 127
            assert np.all(np.abs(a - b).reshape(-1, 32) <= 0.57 * step)  # the step itself is kept in float16


def test_llama3_divisors_are_those_of_transformers(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    exported("llama, llama3 rope", tokenizer, tmp_path / "model.gguf")
    config = LlamaConfig(**{**SIZES, **CONFIGS["llama, llama3 rope"]})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    [divisors] = [one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors if one.name == "rope_freqs.weight"]
    assert divisors.data.tolist() == pytest.approx((plain / scaled.numpy()).tolist(), rel=1e-5)
    assert divisors.data.min() == 1 and divisors.data.max() == pytest.approx(8)


def test_smollm3_is_written_in_the_order_of_llamas(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    """llama.cpp turns neighbouring rows in both; transformers reads no smollm3, so its llama reader judges."""
    config = {key: value for key, value in CONFIGS["smollm3"].items() if key != "model_type"}
    tensors = []
    for family in ("smollm3", "llama"):
        model = random_model({"model_type": family, "tie_word_embeddings": True, **config})
        write_gguf(model, tokenizer, tmp_path / family, dtype="f32", name="tiny")
        tensors.append({one.name: one.data for one in gguf.GGUFReader(tmp_path / family).tensors})
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        assert np.array_equal(value, tensors[1][name]), name


@pytest.mark.parametrize(
    ("name", "field"),
    [("qwen3, biases", "qkv_bias"), ("qwen2, llama3 rope", "rope_scaling"),
     ("smollm3, other layers without rope", "layers_without_rope")],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(
    name: str, field: str, tokenizer: OurTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{field}=.*--to hf"):
        exported(name, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_width_that_blocks_do_not_divide_is_refused(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    model = random_model({"model_type": "llama", "hidden_size": 48, "head_dim": 16})
    with pytest.raises(ValueError, match=r"rows of 48 values, which q8_0 cannot store in blocks of 32"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q8_0", name="tiny")


def test_a_value_beyond_float16_is_refused(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    with torch.no_grad():
        model.embedding.weight[3, 5] = -70000.0
    with pytest.raises(ValueError, match=r"embedding\.weight has the value 70000"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f16", name="tiny")


# llama.cpp's regular expressions by name (llama-vocab.cpp); each splits what the one before it has left.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_CPP = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [WORDS + r"\p{N}" + REST],
    "llama-bpe": [WORDS + r"\p{N}{1,3}" + REST],
}
LINES = [
    "the quick brown fox", "  three  spaces\n\n\nand lines \t tabs\r\n", "it's WE'LL don't I'd 'sup",
    "12345 6 78,9 3.14",
    "a1b2 x  7\n\n8", "naïve café, größer; 日本語 ١٢٣ ½ Ⅷ", "<|im_start|>user\nhi<|im_end|>\n",
    "😀👍🏽 e\u0301", " ", "\n", "def f(x):\n\treturn x**2  # ok!!",
]  # fmt: skip


def test_the_splits_are_those_that_transformers_knows_by_these_names() -> None:
    assert {name: regex for regex, name in _SPLITS.items()} == {
        name: GGUF_PRE_TOKENIZER_SPLITS[name] for name in ("llama-bpe", "qwen2")
    }


def as_llama_cpp(path: Path) -> Tokenizer:
    """A tokenizer from nothing but the file's fields and llama.cpp's splitting rules."""
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2"
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    pre = fields["tokenizer.ggml.pre"]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
    )
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in LLAMA_CPP[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    backend.add_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 4])
    return backend


def with_split(tokenizer: OurTokenizer, pre_tokenizer: Any, **changes: Any) -> OurTokenizer:
    """The same vocabulary behind another pre-tokenizer."""
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    backend = Tokenizer.from_str(json.dumps({**raw, **changes, "model": {**raw["model"], **changes.get("model", {})}}))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return OurTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"), name="other")


def regex_split(digits: str) -> Any:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words + digits + REST), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_the_file_alone_gives_the_same_ids(pre: str, tokenizer: OurTokenizer, tmp_path: Path) -> None:
    one = {
        "gpt-2": lambda: train_bpe(TEXTS, 500, split_digits=False),
        "smollm": lambda: tokenizer,
        "qwen2": lambda: with_split(tokenizer, regex_split(r"\p{N}")),
        "llama-bpe": lambda: with_split(tokenizer, regex_split(r"\p{N}{1,3}"), model={"ignore_merges": True}),
    }[pre]()
    exported("llama", one, tmp_path / "model.gguf")
    other = as_llama_cpp(tmp_path / "model.gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == pre
    for text in LINES:
        assert other.encode(text).ids == one.encode(text), text
        assert other.decode(one.encode(text), skip_special_tokens=False) == text


def test_special_tokens_padding_and_template(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    exported("llama", tokenizer, tmp_path / "model.gguf")
    fields = {name: one.contents() for name, one in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == fields["llama.vocab_size"] == SIZES["vocab_size"]
    num_real = tokenizer.vocab_size
    assert types == [3] * 3 + [1] * (num_real - 3) + [5] * (SIZES["vocab_size"] - num_real)
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.eot_token_id"] == 2
    assert not fields["tokenizer.ggml.add_bos_token"]
    template = fields["tokenizer.chat_template"]
    assert "generation %}" not in template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages: Any = [
        {"role": "user", "content": "a\n"}, {"role": "assistant", "content": " b"}, {"role": "user", "content": "c"},
    ]  # fmt: skip
    text = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    assert text == tokenizer.decode(tokenizer.encode_prompt(messages), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({}, pre_tokenizers.Whitespace(), "knows no pre-tokenizer like .*Whitespace"),
        ({}, pre_tokenizers.ByteLevel(add_prefix_space=True), "knows no pre-tokenizer"),
        ({}, regex_split(r"\p{N}{1,2}"), "knows no pre-tokenizer"),
        ({}, regex_split(r"\p{N}{1,3}"), "ignore_merges is False, but llama.cpp's llama-bpe has True"),
        ({"normalizer": {"type": "Lowercase"}}, None, "does not normalise text .*Lowercase"),
        ({"model": {"dropout": 0.1}}, None, "has no dropout"),
    ],
)
def test_a_tokenizer_that_would_split_otherwise_is_refused(
    changes: dict[str, Any], split: Any, message: str, tokenizer: OurTokenizer
) -> None:
    with pytest.raises(ValueError, match=f"tokenizer 'other' cannot be written as GGUF: .*{message}"):
        gguf_tokenizer(with_split(tokenizer, split, **changes), 520)


def test_nfc_is_said(tokenizer: OurTokenizer) -> None:
    [note] = gguf_tokenizer(with_split(tokenizer, None, normalizer={"type": "NFC"}), 520).notes[:1]
    assert "NFC" in note


def test_a_token_that_swallows_spaces_is_refused(tokenizer: OurTokenizer) -> None:
    from tokenizers import AddedToken

    other = with_split(tokenizer, None)
    other.hf.add_tokens([AddedToken("<sep>", rstrip=True)])
    with pytest.raises(ValueError, match="token '<sep>' has rstrip"):
        gguf_tokenizer(OurTokenizer(other.hf, name="other"), 520)
