"""Bits per byte: how well a model predicts text, comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from strop.models.interface import CausalLM
from strop.models.logprobs import packed_logprobs
from strop.tokenizer import Tokenizer
from strop.types import PackedBatch, Segment

MAX_CHARACTER_BYTES = 4


@torch.no_grad()
def bits_per_byte(
    model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], *, context_length: int, batch_tokens: int = 4096
) -> dict[str, float]:
    """Negative log-likelihood of the texts in bits, per byte of UTF-8.

        sum of -log2 p(token | document so far) / number of bytes predicted

    A document longer than context_length (or than the model has positions) is cut into pieces that each start with the
    last token of the one before, so every token but the first is predicted exactly once: the first is the BOS where the
    tokenizer begins texts with one, else the text's first token, whose bytes are then not counted either. The end of
    the text is not predicted.
    Also returns the loss in nats per token, the perplexity and the counts. Raises ValueError when nothing is predicted.
    """
    if context_length < 1:
        raise ValueError(f"context_length={context_length} must be at least 1")
    context_length = min(context_length, model.config.max_position_embeddings)
    pieces: list[tuple[list[int], int]] = []
    num_bytes = 0
    for text in texts:
        ids = tokenizer.encode_prompt(text)
        given, given_bytes = _first_token(tokenizer, ids, text)
        if len(ids) <= given:
            continue
        num_bytes += len(text.encode()) - given_bytes
        for start in range(0, len(ids) - 1, context_length):
            # Labels that are not predicted: those of a first character that takes several tokens.
            pieces.append((ids[start : start + context_length + 1], max(0, given - 1 - start)))
    if not pieces:
        raise ValueError("there is no text to predict: no document goes beyond its first token")
    pieces.sort(key=lambda piece: len(piece[0]))
    total_nats, num_tokens = 0.0, 0
    start = 0
    while start < len(pieces):
        end, size = start, 0
        while end < len(pieces) and (end == start or size + len(pieces[end][0]) - 1 <= batch_tokens):
            size += len(pieces[end][0]) - 1
            end += 1
        chosen = pieces[start:end]
        batch = PackedBatch(
            token_ids_T=torch.tensor([token for ids, _ in chosen for token in ids[:-1]]),
            labels_T=torch.tensor([token for ids, _ in chosen for token in ids[1:]]),
            loss_mask_T=torch.tensor([place >= given for ids, given in chosen for place in range(len(ids) - 1)]),
            segments=tuple(Segment(trunk=len(ids) - 1) for ids, _ in chosen),
        ).to(model.device)
        logprobs_R, _ = packed_logprobs(model, batch)
        total_nats -= float(logprobs_R.double().sum())
        num_tokens += len(logprobs_R)
        start = end
    return {
        "bits_per_byte": total_nats / math.log(2) / num_bytes,
        "loss": total_nats / num_tokens,
        "perplexity": math.exp(min(total_nats / num_tokens, 700.0)),
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
    }


def _first_token(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> tuple[int, int]:
    """(tokens, bytes of text) that nothing predicts: a BOS and no bytes, or the first token.

    A token may be a part of a character; then all the tokens of that character are given, or their bytes could not be
    told from the text.
    """
    if ids[:1] == [tokenizer.bos_id]:
        return 1, 0
    for count in range(1, min(len(ids), MAX_CHARACTER_BYTES) + 1):
        given = tokenizer.decode(ids[:count], skip_special_tokens=False)
        if text.startswith(given):
            return count, len(given.encode())
    # A tokenizer that changes the text (lower case, say): its first token is taken by its own spelling.
    return 1, len(tokenizer.decode(ids[:1], skip_special_tokens=False).encode())
