"""Ids -> hidden states, logits or scalars. Hugging Face names and files on disk."""

from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.models.interface import CausalLM
from strop.models.loading import load_model, save_model, weight_hash
from strop.models.precision import choose_dtype

__all__ = [
    "CausalLM",
    "Decoder",
    "ModelConfig",
    "choose_dtype",
    "init_model",
    "load_model",
    "save_model",
    "weight_hash",
]
