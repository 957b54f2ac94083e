"""Loss masks against transformers' apply_chat_template: ours come from the plain template, theirs from marks in it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from strop.tokenizer import StreamDecoder, Tokenizer
from strop.tokenizer.chat import ChatTemplate, produced_tokens

CORPUS = [
    "the answer is 4 and the user asked what 2 + 2 is, assistant\n\nsystem\n\nHello there! How are you? I am fine.",
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call> <tools> # Tools é 😀 [INST] [/INST]',
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}"
    "{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
MULTI_TURN = [
    {"role": "user", "content": "what is 2 + 2?"},
    {"role": "assistant", "content": "the answer is 4"},
    {"role": "user", "content": "and é 😀?"},
    {"role": "assistant", "content": "I am 😀 fine.\n\nAnd you?"},
]
WITH_SYSTEM = [{"role": "system", "content": "You are terse."}, *MULTI_TURN]
ENDS_WITH_USER = [*MULTI_TURN, {"role": "user", "content": "thanks"}]
TWO_ANSWERS = [*MULTI_TURN, {"role": "assistant", "content": "Hello there!"}]


def tool_chat(arguments: object) -> list[dict]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "what is 1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "the answer is 3"},
    ]


def byte_level(template: str, *, eos: str, specials: tuple[str, ...], bos: str | None = None, trim: bool = False):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    steps: list = [processors.ByteLevel(trim_offsets=trim)]
    if bos is not None:
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        )
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template)


def sentencepiece_like(template: str) -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [word for text in CORPUS for word in text.replace("\n", " ").split()],
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials[:3], show_progress=False),
    )
    vocab = {token: i for i, token in enumerate(specials)}
    for token in sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    backend.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def build(family: str) -> PreTrainedTokenizerFast:
    if family == "chatml":
        return byte_level(CHATML, eos="<|endoftext|>", specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    if family == "llama3":
        names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return byte_level(LLAMA3, eos="<|end_of_text|>", specials=names, bos="<|begin_of_text|>", trim=True)
    if family == "mistral":
        return sentencepiece_like(MISTRAL)
    return byte_level(QWEN, eos="<|im_end|>", specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


CASES = [
    ("chatml", MULTI_TURN, None),
    ("chatml", WITH_SYSTEM, None),
    ("chatml", ENDS_WITH_USER, None),
    ("chatml", TWO_ANSWERS, None),
    ("llama3", MULTI_TURN, None),
    ("llama3", WITH_SYSTEM, None),
    ("mistral", MULTI_TURN, None),
    ("mistral", ENDS_WITH_USER, None),
    ("qwen", WITH_SYSTEM, None),
    ("qwen", MULTI_TURN, TOOLS),
    ("qwen", tool_chat({"a": 1, "b": 2}), TOOLS),
]


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "plain"])
@pytest.mark.parametrize(("family", "messages", "tools"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_mask_equals_transformers(family, messages, tools, marked):
    hf = build(family)
    theirs = hf.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    if not marked:
        hf.chat_template = hf.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    token_ids, mask = Tokenizer(hf, name=family).encode_chat(messages, tools=tools)
    assert token_ids == theirs["input_ids"]
    assert [int(counts) for counts in mask] == theirs["assistant_masks"]
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize(("family", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>")])
def test_counted_text_is_the_answers_with_their_stop_token(family, end):
    hf = build(family)
    hf.chat_template = hf.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = Tokenizer(hf, name=family)
    token_ids, mask = tokenizer.encode_chat(MULTI_TURN)
    counted = [i for i, counts in zip(token_ids, mask, strict=True) if counts]
    text = tokenizer.decode(counted, skip_special_tokens=False).replace(f"{end} ", end).strip()
    assert text == "".join(m["content"] + end for m in MULTI_TURN if m["role"] == "assistant")


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "qwen"])
def test_prompt_is_a_prefix_of_the_chat(family):
    tokenizer = Tokenizer(build(family), name=family)
    token_ids, mask = tokenizer.encode_chat(MULTI_TURN)
    for i in (1, 3):
        prompt = tokenizer.encode_prompt(MULTI_TURN[:i])
        assert token_ids[: len(prompt)] == prompt
        assert mask[len(prompt)] and not mask[len(prompt) - 1]


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("marked", [True, False])
def test_completion_messages_count_only_after_the_prompt(family, marked):
    hf = build(family)
    if not marked:
        hf.chat_template = hf.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = Tokenizer(hf, name=family)
    token_ids, mask = tokenizer.encode_chat(MULTI_TURN)
    for num_given in (1, 3):
        prompt = tokenizer.encode_prompt(MULTI_TURN[:num_given])
        expected = [False] * len(prompt) + mask[len(prompt) :]
        completed = tokenizer.encode_prompt_completion(MULTI_TURN[:num_given], MULTI_TURN[num_given:])
        assert completed == (token_ids, expected)


@pytest.mark.parametrize("marked", [True, False])
def test_spans_lie_behind_the_context(marked):
    hf = build("chatml")
    if not marked:
        hf.chat_template = hf.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text, spans = ChatTemplate(hf, "x").render_with_spans(MULTI_TURN, num_context=3)
    assert [text[start:end].strip() for start, end in spans] == [MULTI_TURN[3]["content"] + "<|im_end|>"]


@pytest.mark.parametrize("trim", [True, False], ids=["trimmed offsets", "whole offsets"])
def test_a_token_that_starts_in_the_prompt_does_not_count(trim):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + ' A: ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(byte_level(template, eos="</s>", specials=("</s>",), trim=trim), name="x")
    token_ids, mask = tokenizer.encode_chat(MULTI_TURN[:2])
    counted = tokenizer.decode([i for i, c in zip(token_ids, mask, strict=True) if c], skip_special_tokens=False)
    assert counted == " answer is 4</s>"  # " the" is one token, half of it given


def test_tool_arguments_as_json_text_equal_arguments_as_objects():
    tokenizer = Tokenizer(build("qwen"), name="qwen")
    as_text = tokenizer.encode_chat(tool_chat('{"a": 1, "b": 2}'), tools=TOOLS)
    assert as_text == tokenizer.encode_chat(tool_chat({"a": 1, "b": 2}), tools=TOOLS)
    assert '"arguments": {"a": 1, "b": 2}}' in tokenizer.decode(as_text[0])
    with pytest.raises(ValueError, match=r"messages\[1\].*not JSON"):
        tokenizer.encode_chat(tool_chat("{a: 1"), tools=TOOLS)


def test_template_newline_inside_the_marks_does_not_count_and_a_missing_stop_token_does():
    expected = Tokenizer(build("chatml"), name="x").encode_chat(MULTI_TURN)
    hf = build("chatml")
    original = hf.chat_template
    hf.chat_template = original.replace("{% endgeneration %}{{ '\\n' }}", "{{ '\\n' }}{% endgeneration %}")
    assert hf.chat_template != original
    assert Tokenizer(hf, name="x").encode_chat(MULTI_TURN) == expected
    hf.chat_template = original.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert hf.chat_template != original
    assert Tokenizer(hf, name="x").encode_chat(MULTI_TURN) == expected


def test_a_stop_token_inside_an_answer_does_not_cut_it():
    text, stop = "ab</s>cd", 2
    extents = [(0, 2), (2, 6), (6, 7), (7, 8)]
    assert produced_tokens(text, [5, stop, 6, 7], extents, [(0, 8)], {stop}) == [True] * 4


def test_marks_around_reasoning_that_the_generation_prompt_opens_start_after_it():
    hf = build("chatml")
    hf.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ '<think>\\n\\n</think> ' + m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    tokenizer = Tokenizer(hf, name="x")
    token_ids, mask = tokenizer.encode_chat(MULTI_TURN[:2])
    counted = [i for i, counts in zip(token_ids, mask, strict=True) if counts]
    assert tokenizer.decode(counted, skip_special_tokens=False) == "\n</think> the answer is 4<|im_end|>"


def test_marks_around_the_assistant_header_do_not_make_it_count():
    expected = Tokenizer(build("chatml"), name="x").encode_chat(MULTI_TURN)
    hf = build("chatml")
    hf.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\\n' + m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert Tokenizer(hf, name="x").encode_chat(MULTI_TURN) == expected


def test_sentencepiece_puts_no_space_between_prompt_and_completion():
    tokenizer = Tokenizer(build("mistral"), name="mistral")
    for prompt, completion in [("hello", "there"), ("hello", " there"), ("hello ", "there"), ("is 2", "3"), ("a", "")]:
        token_ids, _ = tokenizer.encode_prompt_completion(prompt, completion)
        prompt_ids = tokenizer.encode_prompt(prompt)
        assert token_ids[: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode(token_ids) == prompt + completion
        assert tokenizer.decode(prompt_ids + tokenizer.encode_completion(completion)) == prompt + completion


def test_sentencepiece_completion_of_several_turns_counts_what_the_chat_counts():
    hf = build("mistral")
    hf.chat_template = hf.chat_template.replace("[/INST]", "[/INST]¶")  # one character, several tokens, before a turn
    tokenizer = Tokenizer(hf, name="mistral")
    token_ids, mask = tokenizer.encode_chat(MULTI_TURN)
    num_given = len(tokenizer.encode_prompt(MULTI_TURN[:1]))
    expected = [False] * num_given + mask[num_given:]
    assert tokenizer.encode_prompt_completion(MULTI_TURN[:1], MULTI_TURN[1:]) == (token_ids, expected)


def test_sentencepiece_streams_spaces_and_byte_fallback():
    tokenizer = Tokenizer(build("mistral"), name="mistral")
    text = "hello there 🦊 é is  fine\n\nhello 日本"
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "🦊" in pieces and sum(map(bool, pieces)) > 20
