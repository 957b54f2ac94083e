"""Folder -> model and model -> folder, without loss in either direction."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strop.models.adapters import base_folder, is_adapter, read_adapter, save_adapter
from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, uninitialised
from strop.models.folders import (
    MAX_SHARD_BYTES,
    TensorFolder,
    check_folder,
    read_json,
    some,
    write_json,
    write_tensors,
)
from strop.models.huggingface import FAMILIES, config_from_dict, config_to_dict, disk_names
from strop.models.interface import CausalLM
from strop.models.lora import fold
from strop.models.native import check_int8
from strop.native.freed_memory import give_back_freed_memory


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    frozen: bool = False,
    adapter: Literal["merge", "keep"] = "merge",
    base: str | Path | None = None,
) -> CausalLM:
    """The causal language model in a Hugging Face folder: a Decoder, or a slower FallbackModel with a UserWarning.

    A folder with a LoRA adapter stands for its base with the adapter merged into the weights, or, with
    adapter="keep", beside them: then it alone is trainable. `base` names the base where the folder itself does not.

    dtype None keeps the one on disk, the widest where tensors differ. Tensors are read one by one into place, so that
    memory never holds the weights twice. frozen: no parameter takes a gradient. Raises ValueError for a folder that is
    not a model, a config that the family's decoder cannot honour, and missing, unexpected or misshapen tensors.
    """
    folder = Path(folder)
    if is_adapter(folder):
        return _load_adapted(
            folder, base or base_folder(folder), dtype=dtype, device=device, frozen=frozen, is_kept=adapter == "keep"
        )
    check_folder(folder)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") in FAMILIES:
        config = config_from_dict(raw, str(folder / "config.json"))
        model: CausalLM = read_module(Decoder, config, folder, dtype=dtype, device=device)
    else:
        from strop.models.fallback import load_fallback  # imports transformers' models

        warnings.warn(
            f"{folder}: model_type={raw.get('model_type')!r} runs through transformers, several times slower than "
            f"{', '.join(FAMILIES)}",
            stacklevel=2,
        )
        model = load_fallback(folder, raw, dtype=dtype, device=device)
    check_int8(model, folder)
    if frozen:
        model.requires_grad_(False).eval()
    return model


def _load_adapted(
    folder: Path,
    base: str | Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    frozen: bool,
    is_kept: bool,
) -> CausalLM:
    if is_adapter(base):
        raise ValueError(f"{folder}: its base {base} is an adapter itself: merge that one first (strop models merge)")
    model = load_model(base, dtype=dtype, device=device)
    if not isinstance(model, Decoder):
        raise ValueError(f"{folder}: adapters are read for {', '.join(FAMILIES)} only; merge it into {base} with peft")
    read_adapter(model, folder, base)
    if not is_kept:
        fold(model)
        model.requires_grad_(True)
    if frozen:
        model.requires_grad_(False).eval()
    return model


def save_model(
    model: CausalLM,
    folder: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and safetensors that transformers opens.

    weights: values by parameter name that replace the model's own, say an optimiser's float32 masters. All tensors are
    written in the widest dtype among them, which config.json records. A model that came from a folder keeps the fields
    of that folder's config that mean nothing here. Of a model with an adapter that alone is written (adapters.py).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Decoder) and model.adapter is not None:
        assert weights is None and max_shard_bytes == MAX_SHARD_BYTES, "an adapter is one file of its own values"
        save_adapter(model, folder)
        return
    if isinstance(model, Decoder):
        write_module(model, model.config, folder, weights=weights, max_shard_bytes=max_shard_bytes)
        return
    from strop.models.fallback import FallbackModel, save_fallback

    if not isinstance(model, FallbackModel):
        raise ValueError(f"save_model writes causal language models, not a {type(model).__name__}")
    save_fallback(model, folder, weights=weights, max_shard_bytes=max_shard_bytes)


def weight_hash(model: nn.Module | CausalLM) -> str:
    """SHA-256 over the names, dtypes, shapes and raw bytes of all weights: equal only if nothing at all changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_module(
    build: Any, config: ModelConfig, folder: Path, *, dtype: torch.dtype | None, device: torch.device | str
) -> Any:
    """build(config) with the folder's weights; build is a module class whose parameters disk_names knows."""
    tensors = TensorFolder(folder)
    with torch.device("meta"):
        layout = build(config)
    parts = {name: _parts(name, parameter, config) for name, parameter in layout.named_parameters()}
    _check_tensors(tensors, dict(part for group in parts.values() for part in group), config)
    if dtype is None:
        dtype = widest(tensors.dtype(disk_name) for group in parts.values() for disk_name, _ in group)
    module = uninitialised(build, config, dtype=dtype, device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            targets = parameter.split([shape[0] for _, shape in parts[name]])
            for target, (disk_name, _) in zip(targets, parts[name], strict=True):
                target.copy_(tensors.read(disk_name))
    module.source_config = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        module.source_generation_config = read_json(folder / "generation_config.json")
    return module


def write_module(
    module: Any,
    config: ModelConfig,
    folder: Path,
    *,
    task: str = "CausalLM",
    extra_config: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """The other direction of read_module.

    What training has freed goes back first: a checkpoint needs large pieces, which do not fit where activations were.
    """
    give_back_freed_memory()
    values = replace_weights(module, weights)
    dtype = widest(value.dtype for value in values.values())
    write_json(folder / "config.json", {**_config_json(module, config, task, dtype), **(extra_config or {})})
    generation = module.source_generation_config or {
        field: value
        for field in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := getattr(config, field)) is not None
    }
    write_json(folder / "generation_config.json", generation)

    def split() -> Iterator[tuple[str, Tensor]]:
        for name, value in values.items():
            parts = _parts(name, value, config)
            pieces = value.to(dtype).split([shape[0] for _, shape in parts])
            yield from zip((disk_name for disk_name, _ in parts), pieces, strict=True)

    write_tensors(folder, split(), max_shard_bytes=max_shard_bytes)


def replace_weights(module: nn.Module, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The module's parameters by name, with those in `weights` in their place; names and shapes must agree."""
    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, value in (weights or {}).items():
        if name not in values:
            raise ValueError(f"weights[{name!r}] is no parameter of the {type(module).__name__}")
        if value.shape != values[name].shape:
            raise ValueError(f"weights[{name!r}] has shape {tuple(value.shape)}, not {tuple(values[name].shape)}")
        values[name] = value.detach()
    return values


def widest(dtypes: Any) -> torch.dtype:
    """The narrowest dtype that holds every value of all of them."""
    result: torch.dtype | None = None
    for dtype in dtypes:
        result = dtype if result is None else torch.promote_types(result, dtype)
    assert result is not None
    return result


def _config_json(module: Any, config: ModelConfig, task: str, dtype: torch.dtype) -> dict[str, Any]:
    raw = config_to_dict(config, task=task)
    source = module.source_config
    if source is not None:
        same = config_from_dict(source) == config
        ours = {"architectures": raw["architectures"]} if same else raw
        # Where the config changed, the other spelling of the rotary fields must not overrule ours.
        kept = source if same else {field: value for field, value in source.items() if field != "rope_parameters"}
        raw = {**kept, **ours}
    name = str(dtype).removeprefix("torch.")
    raw.pop("torch_dtype", None)
    return {**raw, "dtype": name}


def _parts(name: str, parameter: Tensor, config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """[(tensor on disk, its shape)] of one of our parameters, in the order of its rows."""
    return [
        (disk_name, (parameter.shape[0] if rows is None else rows, *parameter.shape[1:]))
        for disk_name, rows in disk_names(name, config)
    ]


def _check_tensors(tensors: TensorFolder, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    problems = []
    missing = [name for name in shapes if name not in tensors]
    if missing:
        problems.append(f"missing {some(missing)}")
    # Old Llama checkpoints hold their rotary frequencies, which the config gives as well.
    unexpected = [name for name in tensors if name not in shapes and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and "lm_head.weight" in unexpected and "model.embed_tokens.weight" in tensors:
        unexpected.remove("lm_head.weight")
        if not torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
            problems.append("lm_head.weight differs from the embedding though the config ties them")
    if unexpected:
        problems.append(f"unexpected {some(unexpected)}")
    for name, shape in shapes.items():
        if name in tensors and tensors.shape(name) != shape:
            problems.append(f"{name} has shape {list(tensors.shape(name))} where the config asks for {list(shape)}")
    if problems:
        raise ValueError(f"{tensors.folder}: weights and config.json do not belong together: {some(problems, 4)}")
