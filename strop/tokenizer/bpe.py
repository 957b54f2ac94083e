"""Training a tokenizer from text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from strop.tokenizer.tokenizer import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML_TEMPLATE = """\
{%- if tools %}{{ raise_exception('this template has no tools') }}{% endif %}
{%- for message in messages %}
    {%- if message['tool_calls'] %}{{ raise_exception('this template has no tool calls') }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""ChatML, with the assistant's text marked for the loss."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = (), split_digits: bool = True
) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of at most vocab_size ids, learned from the texts.

    Ids 0, 1, 2 are <|endoftext|> (the EOS), <|im_start|>, <|im_end|>, then come special_tokens, the 256 bytes and the
    merges, so that any string survives encode and decode. A corpus too small for so many merges gives fewer ids: size
    the model by Tokenizer.vocab_size. split_digits makes every digit its own token, which arithmetic is learned from
    more easily. The same texts in the same order give the same tokenizer.

    Raises ValueError for a vocab_size below the bytes and special tokens, and for texts without a character in them.
    """
    specials = [END_OF_TEXT, TURN_START, TURN_END, *special_tokens]
    if len(set(specials)) != len(specials) or not all(specials):
        raise ValueError(f"special_tokens must differ from each other and from the first three, got {specials}")
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes + {len(specials)} special tokens = {smallest}"
        )
    if isinstance(texts, str):
        raise ValueError("texts must be several strings, not one: wrap it in a list")

    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if split_digits
        else byte_level
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_characters = 0

    def counted() -> Iterator[str]:
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if num_characters == 0:
        raise ValueError("cannot train a tokenizer: the corpus is empty")
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, chat_template=CHATML_TEMPLATE)
    return Tokenizer(hf, name="trained here")
