"""Text from tokens as they arrive."""

from __future__ import annotations

from strop.tokenizer.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class StreamDecoder:
    """Turns tokens into text one by one, without ever giving out half a character.

    What push and finish return adds up to Tokenizer.decode of all the tokens. (With SentencePiece's byte-fallback
    tokens, only if these are valid UTF-8: an invalid byte there undoes characters before it.)

    Example:
        stream = StreamDecoder(tokenizer)
        for token_id in sampled: print(stream.push(token_id), end="")
        print(stream.finish())
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Decoding only a window keeps long answers linear. It opens with tokens whose text is already out, since the
        # first token of a decoded sequence may lose its leading space.
        self._window: list[int] = []
        self._num_context = 0
        self._num_given = 0

    def push(self, token_id: int) -> str:
        """Returns the text that this token completes, "" if its last character is still open."""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = len(text.rstrip(_INCOMPLETE))
        new = text[self._num_given : settled]
        self._num_given = max(self._num_given, settled)
        if new and settled == len(text):
            context = self._window[self._num_context :]
            self._window, self._num_context, self._num_given = context, len(context), len(self._decode(context))
        return new

    def finish(self) -> str:
        """Returns what is left, with U+FFFD for a character that never became complete, and starts afresh."""
        rest = self._decode(self._window)[self._num_given :]
        self._window, self._num_context, self._num_given = [], 0, 0
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
