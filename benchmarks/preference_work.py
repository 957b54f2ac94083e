"""The pairs that both systems learn from: the DPO and reward-model jobs."""

from __future__ import annotations

from benchmarks import work

PAIRS = 8


def pairs(count: int = PAIRS) -> list[dict[str, list[dict[str, str]]]]:
    """A question of about 50 tokens as messages, and two answers of about 40 to 160 tokens, of different lengths."""
    questions = work.questions(count)
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": " ".join([question] * (1 + i % 3))}],
            "rejected": [{"role": "assistant", "content": " ".join([questions[i - 1]] * (1 + (i + 1) % 4))}],
        }
        for i, question in enumerate(questions)
    ]


def row_tokens(tokenizer) -> int:  # a transformers tokenizer
    """Tokens of all rows written out, prompt and answer for each side: what a padded batch holds without padding.

    Both systems' rates are of these, so that their ratio is that of pairs per second.
    """
    rows = [pair["prompt"] + pair[side] for pair in pairs() for side in ("chosen", "rejected")]
    return sum(len(ids) for ids in tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"])
