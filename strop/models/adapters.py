"""LoRA adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors, beside no base weights.

    base_model.model.<module of the base>.lora_A.weight   (rank, inputs)
    base_model.model.<module of the base>.lora_B.weight   (outputs, rank)

Our folders also hold strop_base.json: where the base lies relative to the folder, and the hash of its weights.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from strop.models.decoder import Decoder
from strop.models.folders import TensorFolder, read_json, some, write_json
from strop.models.lora import TARGET_MODULES, LoraConfig, adapted_linears, attach, fresh_parts, projections

CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "strop_base.json"

_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
"""Fields of adapter_config.json that are honoured or change nothing. Any other one that is set is refused."""

_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Of init_lora_weights: others (PiSSA, OLoRA, LoftQ ...) subtract the adapter's beginning from the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOrigin:
    """Which base a model's adapter belongs to, and the adapter_config.json that it is written with."""

    base: Path
    base_hash: str
    """tensors_hash of the base's folder."""
    raw: Mapping[str, Any]


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter and no model of its own."""
    return (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def base_folder(folder: str | Path) -> Path:
    """The folder of the base model that an adapter folder belongs to; its weights are not looked at.

    Looked for where strop_base.json says (relative to the folder, so that runs can be moved together), then where
    adapter_config.json does. Raises ValueError when neither is a folder with a config.json.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG)
    named = raw.get("base_model_name_or_path")
    candidates = [folder / _recorded_base(folder)["folder"]] if (folder / BASE).is_file() else []
    candidates += [Path(named).expanduser(), folder / named] if isinstance(named, str) and named else []
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return Path(os.path.normpath(candidate.absolute()))
    tried = some(dict.fromkeys(str(path) for path in candidates)) or "nothing: base_model_name_or_path is not set"
    raise ValueError(
        f"{folder}: the base model of this adapter is not here (looked at {tried}); write the path of its folder into "
        f"base_model_name_or_path of {folder / CONFIG}"
    )


def tokenizer_folder(folder: str | Path, *, base: Path | None = None) -> Path:
    """Where the tokenizer lies that a model or adapter folder is used with: its own, else the base's.

    base: the base model's folder, where the adapter itself does not name it.
    """
    folder = Path(folder)
    has_own = (folder / "tokenizer_config.json").is_file()
    return folder if has_own or not is_adapter(folder) else base or base_folder(folder)


def tensors_hash(folder: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model folder's tensors, in whatever shards they lie."""
    tensors = TensorFolder(folder)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors.read(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def add_adapter(model: Decoder, config: LoraConfig, *, seed: int, base: str | Path) -> None:
    """A fresh adapter on a model that was loaded from the folder `base`; it changes nothing until it has learned.

    Everything else is frozen. Raises ValueError where the model has an adapter already.
    """
    if model.adapter is not None:
        raise ValueError(f"the model has an adapter already, of the base {model.adapter.base}")
    base = Path(os.path.abspath(base))
    attach(model, fresh_parts(model, config, seed=seed))
    model.adapter = AdapterOrigin(base=base, base_hash=tensors_hash(base), raw=_raw_config(config))


def read_adapter(model: Decoder, folder: str | Path, base: str | Path) -> None:
    """Give a model that was loaded from the folder `base` the adapter in `folder`, and freeze everything else.

    Raises ValueError for an adapter of another base (modules, shapes, or the recorded hash of its weights), for kinds
    of adapters that are not computed here, and for damaged files.
    """
    folder, base = Path(folder), Path(os.path.abspath(base))
    raw = read_json(folder / CONFIG)
    config = _read_config(raw, folder / CONFIG)
    base_hash = tensors_hash(base)
    if (folder / BASE).is_file() and _recorded_base(folder)["weights_sha256"] != base_hash:
        raise ValueError(
            f"{folder} was trained on a base with other weights than {base} (weights_sha256 in {folder / BASE}): "
            "restore that base, or name its folder"
        )
    attach(model, _read_parts(model, folder, raw, config))
    model.adapter = AdapterOrigin(base=base, base_hash=base_hash, raw=raw)


def adapter_parts(model: Decoder, folder: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The adapter in a folder as {module: (A, B, scale)}, checked against the model; errors as read_adapter."""
    raw = read_json(Path(folder) / CONFIG)
    return _read_parts(model, Path(folder), raw, _read_config(raw, Path(folder) / CONFIG))


def save_adapter(model: Decoder, folder: str | Path) -> None:
    """Write the model's adapter as a folder that peft and AutoModelForCausalLM open; the base is named, not copied."""
    origin = model.adapter
    assert origin is not None, "the model has no adapter"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    linears = adapted_linears(model)
    tensors: dict[str, Tensor] = {}
    for module, (name, leaf, _) in projections(model).items():
        adapter = linears[name].adapter if name in linears else None
        if adapter is not None and leaf in adapter.parts():
            part = adapter.parts()[leaf]
            tensors[_key(module, "A")] = part.A.detach().cpu().contiguous()
            tensors[_key(module, "B")] = part.B.detach().cpu().contiguous()
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / CONFIG, {**origin.raw, "base_model_name_or_path": str(origin.base)})
    relative = os.path.relpath(os.path.realpath(origin.base), os.path.realpath(folder))
    write_json(folder / BASE, {"folder": Path(relative).as_posix(), "weights_sha256": origin.base_hash})


def check_same_config(model: Decoder, config: LoraConfig, where: str) -> None:
    """ValueError naming the first field in which the model's adapter differs from the [lora] that shall go on."""
    assert model.adapter is not None
    raw = model.adapter.raw
    wanted = _raw_config(config)
    for ours, theirs in (
        ("rank", "r"), ("alpha", "lora_alpha"), ("target_modules", "target_modules"), ("rslora", "use_rslora"),
        ("dropout", "lora_dropout"), (None, "rank_pattern"), (None, "alpha_pattern"),
    ):  # fmt: skip
        found, asked = _plain(raw.get(theirs)), _plain(wanted.get(theirs))
        if found != asked:
            field = f"lora.{ours} = {asked!r}" if ours else f"[lora], which has no {theirs},"
            raise ValueError(
                f"{where} is an adapter with {theirs} = {found!r}: {field} does not fit. Train on with its own values, "
                "or merge it into its base first (strop models merge) and start from that"
            )


def _plain(value: Any) -> Any:
    """Comparable: lists in any order, and everything that is off (False, 0, {}, absent) alike."""
    return sorted(value) if isinstance(value, list | tuple) else value or None


def _raw_config(config: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.target_modules),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _read_config(raw: Mapping[str, Any], where: Path) -> LoraConfig:
    """rank, alpha and scaling rule of an adapter_config.json; ValueError for anything that is not computed here."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type={raw.get('peft_type')!r} is not supported, only LORA")
    for field, value in raw.items():
        if field == "bias" and value in (None, "none"):
            continue
        if field not in _HARMLESS and value:
            raise ValueError(f"{where}: {field}={value!r} is not supported: merge this adapter with peft instead")
    if raw.get("init_lora_weights", True) not in _INITS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"{where}: init_lora_weights={raw['init_lora_weights']!r} changes the base's weights: convert the adapter "
            "to plain LoRA with peft first"
        )
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(f"{where}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(field) or {}
        if not isinstance(pattern, dict) or not all(isinstance(value, int | float) for value in pattern.values()):
            raise ValueError(f"{where}: {field} must be a table of numbers")
        for key in pattern:
            # PEFT reads them as regular expressions, of which one can be written that never ends.
            if not re.fullmatch(r"\^?[\w.]+", key):
                raise ValueError(f"{where}: {field} has the key {key!r}; only names of modules are read")
    try:
        return LoraConfig(rank=rank, alpha=float(alpha), rslora=bool(raw.get("use_rslora")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_parts(
    model: Decoder, folder: Path, raw: Mapping[str, Any], config: LoraConfig
) -> dict[str, tuple[Tensor, Tensor, float]]:
    tensors = _open_tensors(folder)
    places = projections(model)
    modules: set[str] = set()
    for key in tensors:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        if match is None or match[1] not in places:
            raise ValueError(
                f"{folder / TENSORS}: {key} adapts nothing that this base has; adapters of {', '.join(TARGET_MODULES)} "
                "in its layers are read"
            )
        modules.add(match[1])
    missing = [module for module in _promised(raw, places) if module not in modules]
    if missing:
        raise ValueError(f"{folder / TENSORS}: nothing for {some(missing)}: the adapter belongs to another base")
    if not modules:
        raise ValueError(f"{folder / TENSORS} holds no adapter")
    parts: dict[str, tuple[Tensor, Tensor, float]] = {}
    for module in sorted(modules):
        name, _, rows = places[module]
        rank = int(_patterned(raw.get("rank_pattern"), module, config.rank))
        shapes = {"A": (rank, model.get_submodule(name).in_features), "B": (rows.stop - rows.start, rank)}
        for which, shape in shapes.items():
            found = tensors.get(_key(module, which))
            if found is None or tuple(found.shape) != shape:
                has = "is missing" if found is None else f"has shape {list(found.shape)}, not {list(shape)}"
                raise ValueError(
                    f"{folder / TENSORS}: {_key(module, which)} {has}: the adapter belongs to another base, or its "
                    "config to another adapter"
                )
        alpha = float(_patterned(raw.get("alpha_pattern"), module, config.alpha))
        scale = config.scale(rank=rank, alpha=alpha)
        parts[module] = tensors[_key(module, "A")], tensors[_key(module, "B")], scale
    return parts


def _promised(raw: Mapping[str, Any], places: Mapping[str, Any]) -> list[str]:
    """The modules that target_modules speaks of, where it is a plain list of names for all layers."""
    targets = raw.get("target_modules")
    narrowed = any(raw.get(field) for field in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if not isinstance(targets, list) or narrowed:
        return []
    return [module for module in places if any(module == name or module.endswith(f".{name}") for name in targets)]


def _patterned(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: the first key that, as a regular expression, ends the module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _key(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"


def _open_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which could run any code and is never opened)"
        raise ValueError(f"{path} is missing{pickled if (folder / 'adapter_model.bin').is_file() else ''}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): copy or download it again") from error


def _recorded_base(folder: Path) -> dict[str, str]:
    recorded = read_json(folder / BASE)
    if not all(isinstance(recorded.get(field), str) for field in ("folder", "weights_sha256")):
        raise ValueError(f"{folder / BASE} must have folder and weights_sha256")
    return recorded
