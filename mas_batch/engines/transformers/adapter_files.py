"""A LoRA adapter's files, in the layout of the library peft, read and checked against its base.

`adapter_config.json` says how strong the additions are, `adapter_model.safetensors` has two
matrices for each linear layer that they are added to. What would be something else than such an
addition is refused by its name: to leave it out would be another model.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mas_batch.errors import ModelError
from mas_batch.models import ModelFiles

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

HEEDED = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
IN_TRAINING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules"}
    | {"fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"}
    | {"layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size"}
    | {"revision", "runtime_config", "target_modules", "task_type"}
)
"""They say how the weights came about, or repeat what the weights' names say."""
ALLOWED = {
    "bias": ("none",),
    # Others take something out of the base's weights first.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
"""Of some of these not every value can be had."""

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
OTHER_WEIGHTS = {
    "lora_magnitude_vector": "use_dora",
    "lora_embedding_": "an adapter of embeddings",
    "lora_B.bias": "lora_bias",
}
"""Parts of names → what they are weights of."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to what a linear layer makes of x: `up · (down · x)`.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    down: Tensor
    """[rank, inputs]"""
    up: Tensor
    """[outputs, rank], times the scale."""


def read_adapter(files: ModelFiles, model: Any, base: ModelFiles) -> dict[str, LowRank]:
    """Return what is added to which of the model's layers, by the layers' names.

    A base of another name than the adapter was trained on is only warned of: names differ between
    copies of one model.

    Raises:
        ModelError: a file is missing or damaged, holds what is not supported, or is of a model
            with other layers.
    """
    try:
        return _read(files, model, base)
    except (ModelError, re.error) as error:  # of a pattern
        raise ModelError(f"{files.source}: {error}") from error


def _read(files: ModelFiles, model: Any, base: ModelFiles) -> dict[str, LowRank]:
    config = _config(files.path)
    _warn_of_base(config.get("base_model_name_or_path"), files, base)
    sides = _sides(_weights(files.path))
    found = {}
    for name, pair in sides.items():
        if missing := {"A", "B"}.difference(pair):
            raise ModelError(f"{WEIGHTS}: {name} has no lora_{missing.pop()}")
        down, up = pair["A"], pair["B"]
        _check_shapes(name, model, down, up)
        up = up.float() * _scale(config, name, len(down))
        found[name] = LowRank(_like(model, down), _like(model, up))
    return found


def _like(model: Any, weight: Tensor) -> Tensor:
    return weight.to(device=model.device, dtype=model.dtype).contiguous()


def read_config(path: Path | None) -> Mapping[str, Any]:
    """Read the configuration of an adapter in a folder.

    Raises:
        ModelError: it is missing, damaged, or of another kind of adapter.
    """
    try:
        config: Any = json.loads(existing(path, CONFIG).read_bytes())
    except ValueError as error:
        raise ModelError(f"{CONFIG}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{CONFIG}: not a mapping")
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{CONFIG}: peft_type {kind!r} is not supported; allowed: 'LORA'")
    return config


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank that a configuration speaks of.

    Raises:
        ModelError: one is no number.
    """
    ranks: list[Any] = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if wrong := [rank for rank in ranks if not isinstance(rank, int)]:
        raise ModelError(f"{CONFIG}: r: {wrong[0]!r} is no number")
    largest: int = max(ranks)
    return largest


def _config(path: Path | None) -> Mapping[str, Any]:
    """Read the configuration; refuse what is not supported."""
    config = read_config(path)
    for key, allowed in ALLOWED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise _unsupported(key, config[key], ", ".join(map(repr, allowed)))
    for key in sorted(config.keys() - HEEDED - IN_TRAINING):
        if config[key]:
            raise _unsupported(key, config[key], "none")
    return config


def _unsupported(key: str, value: Any, allowed: str) -> ModelError:
    return ModelError(f"{CONFIG}: {key}: {value!r} is not supported; allowed: {allowed}")


def _weights(path: Path | None) -> Mapping[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(existing(path, WEIGHTS))
    except SafetensorError as error:
        raise ModelError(f"{WEIGHTS}: {error}") from error
    return weights


def existing(path: Path | None, name: str) -> Path:
    """Return one of the files of an adapter in a folder.

    Raises:
        ModelError: it is not there.
    """
    if path is None or not (path / name).is_file():
        raise ModelError(f"no {name}; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    return path / name


def _sides(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return both matrices of each layer: name → A or B → weight."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if match := _NAME.fullmatch(name):
            sides.setdefault(match["layer"], {})[match["side"]] = weight
            continue
        of = next((what for part, what in OTHER_WEIGHTS.items() if part in name), "modules_to_save")
        raise ModelError(f"{WEIGHTS}: {name} is not supported: {of}")
    if not sides:
        raise ModelError(f"{WEIGHTS}: it is empty")
    return sides


def _check_shapes(name: str, model: Any, down: Tensor, up: Tensor) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if isinstance(layer, torch.nn.Linear):
        inputs, outputs = layer.in_features, layer.out_features
    elif isinstance(layer, Conv1D):
        inputs, outputs = layer.nx, layer.nf
    else:
        what = type(model).__name__
        raise ModelError(f"{WEIGHTS}: {name}: the base, {what}, has no linear layer of that name")
    rank = len(down) if down.dim() == 2 else 0
    if not rank or tuple(down.shape) != (rank, inputs) or tuple(up.shape) != (outputs, rank):
        raise ModelError(
            f"{WEIGHTS}: {name}: A {list(down.shape)} and B {list(up.shape)} do not fit the "
            f"base's layer, which wants [{rank}, {inputs}] and [{outputs}, {rank}]"
        )


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return how strong an addition is, as peft has it."""
    said = _of_layer(config.get("rank_pattern"), name, config.get("r"))
    if said != rank:
        raise ModelError(f"{WEIGHTS}: {name} is of rank {rank}; {CONFIG} says r: {said!r}")
    alpha = _of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise ModelError(f"{CONFIG}: lora_alpha: {alpha!r} is no number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that is the end of a layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _warn_of_base(trained_on: Any, files: ModelFiles, base: ModelFiles) -> None:
    def short(name: str) -> str:
        return name.rstrip("/").rpartition("/")[2].casefold()

    own = f"{short(base.family_id)}."  # a .gguf's name goes on: `.Q4_1`
    if isinstance(trained_on, str) and not own.startswith(f"{short(trained_on)}."):
        log.warning(
            "the adapter %s was trained on %s; the agent's model is %s",
            files.source, trained_on, base.source,
        )  # fmt: skip
