"""The shape of a decoder, as flags that tell the supported families apart."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies (Llama 3.1 model card, rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder for Llama, Mistral, Qwen2, Qwen3 and SmolLM2/3; the families differ only in these flags.

    Example: ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Each is shared by num_heads / num_kv_heads query heads (Ainslie et al. 2023)."""
    head_dim: int
    """Qwen3 states it apart from hidden_size / num_heads."""
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    layers_without_rope: frozenset[int] = field(default_factory=frozenset)
    """SmolLM3's NoPE layers, by index."""
    qkv_bias: bool = False
    output_bias: bool = False
    """On the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys before the rotation (Qwen3)."""
    tie_embeddings: bool = True
    model_type: str = "llama"
    """Which family's config.json is written."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    """Kept for readers of the folder; nothing here pads."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}: "
                "each key-value head serves a whole number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotary embedding turns pairs")
