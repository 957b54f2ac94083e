"""Costs counted from a config, against the model itself and against hand counts."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from strop.models import ModelConfig, init_model
from strop.models.decoder import Decoder
from strop.models.footprint import cache_bytes, num_parameters, training_flops
from strop.types import PackedBatch, Segment

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4}
PLAIN = ModelConfig(**SHAPE, num_kv_heads=2, head_dim=8)
QWEN = ModelConfig(
    **SHAPE, num_kv_heads=1, head_dim=16, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
    tie_embeddings=False,
)  # fmt: skip


def test_parameters_are_those_of_the_decoder():
    for config in (PLAIN, QWEN):
        with torch.device("meta"):
            model = Decoder(config)
        assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_matrix_products_are_those_that_torch_counts():
    """torch counts every product that really runs, attention's masked half included, which is not counted here."""
    model = init_model(PLAIN, seed=0)
    length, labels = 24, 10
    tokens = torch.zeros(length, dtype=torch.int64)
    segments = (Segment(trunk=length),)
    batch = PackedBatch(token_ids_T=tokens, labels_T=tokens, loss_mask_T=tokens == 0, segments=segments)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model.hidden(batch)[:labels])
    masked = length * length - length * (length + 1) // 2
    masked_flops = 4 * PLAIN.num_layers * PLAIN.num_heads * PLAIN.head_dim * masked
    assert training_flops(PLAIN, segments, labels) == 3 * (counter.get_total_flops() - masked_flops)


def test_a_branch_attends_to_its_trunk_and_itself():
    without = training_flops(PLAIN, [Segment(trunk=5), Segment(trunk=2), Segment(trunk=3)], 0)
    shared = training_flops(PLAIN, [Segment(trunk=5, branches=(2, 3))], 0)
    pair = 3 * PLAIN.num_layers * 4 * PLAIN.num_heads * PLAIN.head_dim
    assert shared - without == pair * (2 * 5 + 3 * 5)


def test_cache_holds_what_the_model_allocates():
    model = init_model(PLAIN, seed=0)
    cache = model.new_cache(num_slots=3, max_length=32)
    cache.fit(32)
    held = cache.keys.nbytes + cache.values.nbytes
    assert cache_bytes(PLAIN, num_slots=3, length=32, bytes_per_number=4) == held
