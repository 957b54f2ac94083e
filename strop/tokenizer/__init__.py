"""Text <-> token ids, and the only place where a chat template or a loss mask is decided."""

from strop.tokenizer.bpe import train_bpe
from strop.tokenizer.streaming import StreamDecoder
from strop.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "train_bpe"]
