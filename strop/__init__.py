"""Strop trains a language model through every stage, from raw text to a frozen, served model."""

import os

__version__ = "0.1.0"

# Ragged batches have a new shape at every step, and for each shape it has seen oneDNN (through torch) keeps compiled
# kernels: by default for 1024 of them, twice, which grows to gigabytes and saves no time. Read at torch's first matrix
# product; a value that is set already is left alone.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
