"""Ids -> hidden states, logits or scalars. Hugging Face names and files on disk."""

from strop.models.adapters import tokenizer_folder
from strop.models.checkpointing import Checkpointing
from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.models.interface import CausalLM
from strop.models.loading import load_model, save_model, weight_hash
from strop.models.lora import LoraConfig
from strop.models.precision import compute_in

__all__ = [
    "CausalLM",
    "Checkpointing",
    "Decoder",
    "LoraConfig",
    "ModelConfig",
    "compute_in",
    "init_model",
    "load_model",
    "save_model",
    "tokenizer_folder",
    "weight_hash",
]
