"""Loading, stop tokens, BOS, prompts, and what bad templates and files do."""

from __future__ import annotations

import json
import warnings

import pytest
from tokenizers import processors

from strop.tokenizer import Tokenizer, train_bpe

CORPUS = ["the answer is 4, assistant user system\n\n hello there é 😀 <think>"] * 4
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "is 4"},
]
# Like SmolLM2's: a default system prompt, no marks.
SMOL = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Like Qwen3's: the last turn has its reasoning (or an empty block for it), earlier turns lose it.
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make(template: str | None, **special: str) -> Tokenizer:
    hf = train_bpe(CORPUS, 320, special_tokens=["<s>"]).hf
    hf.chat_template = template
    for name, token in special.items():
        setattr(hf, name, token)
    return Tokenizer(hf, name="tiny")


def adding_bos(template: str | None) -> Tokenizer:
    tokenizer = make(template, bos_token="<s>")
    tokenizer.hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_id), ("</s>", tokenizer.eos_id)],
    )
    return Tokenizer(tokenizer.hf, name="tiny")


def counted_text(tokenizer: Tokenizer, encoded: tuple[list[int], list[bool]]) -> str:
    return tokenizer.decode([i for i, counts in zip(*encoded, strict=True) if counts], skip_special_tokens=False)


# --- saving and loading


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "qwen3", "mistral"])
def test_save_and_load_change_nothing(tmp_path, model_type):
    tokenizer = make(SMOL, bos_token="<|im_start|>", pad_token="<|endoftext|>")
    tokenizer.save(tmp_path / "a")
    if model_type is not None:  # AutoTokenizer rebuilds some tokenizers from the model type next to them
        (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 9}))
    loaded = Tokenizer.load(tmp_path / "a")
    assert loaded.content_hash == tokenizer.content_hash
    assert loaded.chat_template == SMOL
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 0, 0)
    assert loaded.stop_token_ids == tokenizer.stop_token_ids == (0, 2)
    assert loaded.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
    assert loaded.encode("e\u0301 12  x") == tokenizer.encode("e\u0301 12  x")
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_hash_sees_the_template_and_the_special_tokens():
    hashes = {make(SMOL).content_hash, make(REASONING).content_hash, make(SMOL, bos_token="<s>").content_hash}
    assert len(hashes) == 3
    assert make(SMOL).content_hash in hashes


def test_load_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    make(SMOL).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match=f"cannot load a tokenizer from .*{tmp_path.name}"):
        Tokenizer.load(tmp_path)


def test_code_in_a_folder_is_refused(tmp_path):
    make(SMOL).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="cannot load"):
        Tokenizer.load(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- stop tokens


def test_stop_tokens_are_eos_end_of_turn_and_the_generation_config(tmp_path):
    tokenizer = make(SMOL)
    assert tokenizer.stop_token_ids == (tokenizer.eos_id, tokenizer.encode("<|im_end|>")[0]) == (0, 2)
    assert make(None).stop_token_ids == (0,)
    assert make("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}").stop_token_ids == (0,)
    assert make("{% for m in messages %}{{ m.role + ': ' + m.content + ' end' }}{% endfor %}").stop_token_ids == (0,)
    assert make("{% for m in messages %}{{ m.content + '\\n\\n<|im_end|>\\n' }}{% endfor %}").stop_token_ids == (0, 2)
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    loaded = Tokenizer.load(tmp_path / "model")
    assert loaded.stop_token_ids == (0, 2, 7)
    loaded.save(tmp_path / "copy")  # without the model's generation_config.json
    assert Tokenizer.load(tmp_path / "copy").stop_token_ids == (0, 2, 7)
    (tmp_path / "copy" / "generation_config.json").write_text('{"eos_token_id": 8}')
    assert Tokenizer.load(tmp_path / "copy").stop_token_ids == (0, 2, 7, 8)
    for broken in ('{"eos_token_id": "2"}', "[2]", "{"):
        (tmp_path / "copy" / "generation_config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            Tokenizer.load(tmp_path / "copy")


# --- prompts and completions


def test_smollm2_prompt_is_a_prefix_of_the_chat():
    tokenizer = make(SMOL)
    token_ids, mask = tokenizer.encode_chat(CHAT)
    for i in (1, 3):
        prompt = tokenizer.encode_prompt(CHAT[:i])
        assert token_ids[: len(prompt)] == prompt
    assert tokenizer.decode(token_ids).startswith("system\nYou are a helpful AI assistant.\nuser\nhello\nassistant\n")
    assert counted_text(tokenizer, (token_ids, mask)) == "the answer<|im_end|>is 4<|im_end|>"


@pytest.mark.parametrize("template", [SMOL, "{{ bos_token }}" + SMOL], ids=["template without", "template with"])
def test_bos_comes_exactly_once(template):
    tokenizer = adding_bos(template)
    bos = tokenizer.bos_id
    encodings = [
        tokenizer.encode_prompt("hello"),
        tokenizer.encode_prompt("<s>hello"),
        tokenizer.encode_prompt(""),
        tokenizer.encode_prompt(CHAT[:1]),
        tokenizer.encode_chat(CHAT)[0],
        tokenizer.encode_prompt_completion("hello", " there")[0],
        tokenizer.encode_prompt_completion(CHAT[:1], CHAT[1:2])[0],
    ]
    assert [(ids[0], ids.count(bos)) for ids in encodings] == [(bos, 1)] * len(encodings)
    assert tokenizer.encode("hello").count(bos) == 0
    assert tokenizer.encode_completion("hello").count(bos) == 0
    assert counted_text(tokenizer, tokenizer.encode_chat(CHAT)) == "the answer<|im_end|>is 4<|im_end|>"


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added():
    assert make(SMOL, bos_token="<s>").encode_prompt("hello") == make(SMOL).encode("hello")


def test_text_completion_ends_with_a_counted_eos_and_no_pad_is_needed():
    tokenizer = make(SMOL)
    assert tokenizer.pad_id is None
    token_ids, mask = tokenizer.encode_prompt_completion("hello", " there")
    assert token_ids == tokenizer.encode("hello") + tokenizer.encode_completion(" there")
    assert counted_text(tokenizer, (token_ids, mask)) == " there<|endoftext|>"
    tokenizer.hf.pad_token = tokenizer.hf.eos_token  # a mask from pad ids would now lose the EOS
    assert tokenizer.encode_prompt_completion("hello", " there") == (token_ids, mask)
    tokenizer.hf.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenizer.encode_completion("x")


def test_a_prompt_that_ends_with_the_assistant_is_continued():
    tokenizer = make(SMOL)
    text = tokenizer.decode(tokenizer.encode_prompt(CHAT[:2]), skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nthe answer")
    with pytest.raises(ValueError, match="move it to the completion"):
        tokenizer.encode_prompt_completion(CHAT[:2], CHAT[3:])


def test_prompt_and_completion_must_be_of_one_kind():
    tokenizer = make(SMOL)
    with pytest.raises(ValueError, match="both"):
        tokenizer.encode_prompt_completion("hello", CHAT[1:2])
    with pytest.raises(ValueError, match="no assistant message"):
        tokenizer.encode_prompt_completion(CHAT[:1], CHAT[2:3])
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        tokenizer.encode_prompt_completion(CHAT[:1], ["yes"])
    with pytest.raises(ValueError, match="plain text has no place"):
        tokenizer.encode_prompt("hello", tools=[{"name": "f"}])


def test_encoding_is_never_truncated_or_padded_by_what_hf_was_told():
    tokenizer = make(SMOL, pad_token="<|endoftext|>")
    whole = tokenizer.encode("hello " * 20)
    tokenizer.hf(["hello " * 20, "x"], truncation=True, max_length=4, padding=True)
    assert tokenizer.encode("hello " * 20) == whole
    assert tokenizer.encode("x") == make(SMOL).encode("x")


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(ValueError, match="surrogate"):
        make(None).encode("a\ud800")


def test_decode_is_exact_and_knows_no_padding_rows():
    tokenizer = make(SMOL)
    tokenizer.hf.clean_up_tokenization_spaces = True
    tokenizer.hf.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    text = "hello , there . it 's"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("hi"), tokenizer.vocab_size + 5, 2]) == "hi"
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"


def test_check_fits():
    tokenizer = make(SMOL)
    tokenizer.check_fits(tokenizer.vocab_size)
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"has {size} ids.*only {size - 1}.*vocab_size >= {size}"):
        tokenizer.check_fits(size - 1)


# --- templates


def test_history_that_loses_its_reasoning_counts_only_in_the_last_turn():
    tokenizer = make(REASONING)
    chat = [*CHAT[:3], {**CHAT[3], "reasoning_content": "there"}]
    with pytest.warns(UserWarning, match="are not trained on"):
        encoded = tokenizer.encode_chat(chat)
    assert counted_text(tokenizer, encoded) == "<think>\nthere\n</think>\n\nis 4<|im_end|>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counted_text(tokenizer, tokenizer.encode_chat(CHAT[:2])).endswith("</think>\n\nthe answer<|im_end|>")
        completion = tokenizer.encode_prompt_completion(chat[:3], chat[3:])
    assert completion == encoded
    with pytest.raises(ValueError, match=r"no assistant turn continues.*\{% generation %\}"):
        tokenizer.encode_chat(CHAT[:3])  # its only answer is history already


def test_system_prompt_that_moves_to_the_last_message_is_refused():
    moving = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last %}{{ messages[0].content + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make(moving)
    chat = [{"role": "system", "content": "be terse"}, *CHAT[:2]]
    with pytest.raises(ValueError, match="system prompt inside the first user message"):
        tokenizer.encode_chat(chat)
    with pytest.raises(ValueError, match="renders the prompt differently"):
        tokenizer.encode_prompt_completion(chat[:2], chat[2:])
    answer = "{{ ' ' + m.content + eos_token }}"
    tokenizer = make(moving.replace(answer, "{% generation %}" + answer + "{% endgeneration %}"))
    assert counted_text(tokenizer, tokenizer.encode_chat(chat)) == " the answer<|endoftext|>"  # the marks are trusted
    with pytest.raises(ValueError, match="renders the prompt differently"):
        tokenizer.encode_prompt_completion(chat[:2], chat[2:])


def test_marks_that_mark_nothing_are_refused():
    tokenizer = make(SMOL + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}")
    with pytest.raises(ValueError, match="cover no assistant turn"):
        tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError"),
        ("{{ messages[0].content + messages[0].nothing }}", "UndefinedError"),
        ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError.*__class__"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
    ],
)
def test_bad_templates_are_named(template, problem):
    tokenizer = make(template)
    for encode in (tokenizer.encode_chat, tokenizer.encode_prompt):
        with pytest.raises(ValueError, match=f"(?s)chat template of tokenizer 'tiny' failed.*user.*{problem}"):
            encode(CHAT[:1])
    assert tokenizer.encode_prompt("hello") == make(SMOL).encode("hello")  # text does not need it


def test_messages_need_a_template_and_tools_one_that_shows_them():
    with pytest.raises(ValueError, match="no chat template"):
        make(None).encode_chat(CHAT)
    with pytest.raises(ValueError, match="ignores tools"):
        make(SMOL).encode_prompt(CHAT[:1], tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(ValueError, match="has no tools"):
        train_bpe(CORPUS, 300).encode_prompt(CHAT[:1], tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "at least one message"),
        ({"role": "user", "content": "x"}, "must be a list"),
        (["hello"], r"messages\[0\]"),
        ([CHAT[0], {"content": "x"}], r"messages\[1\] must be an object with a 'role'"),
        ([CHAT[0], {"role": "assistant", "content": None}], r"messages\[1\].*neither 'content'"),
        ([{"role": "assistant", "content": None, "tool_calls": ["f"]}], r"messages\[0\]: a tool call"),
    ],
)
def test_bad_messages_are_named(messages, problem):
    with pytest.raises(ValueError, match=problem):
        make(SMOL).encode_chat(messages)
