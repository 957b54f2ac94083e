"""Strop trains a language model through every stage, from raw text to a frozen, served model."""

__version__ = "0.1.0"
