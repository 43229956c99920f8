"""Weights in fewer bits, for the engine `transformers`: int8 with one scale per row, by torchao.

Only weights are rounded: numbers that are computed with stay in the model's dtype. Embeddings and
the vocabulary's projection stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TorchAoConfig

from mas_batch.engines.torch_device import free_caches, run_freeing
from mas_batch.engines.transformers.perplexity import (
    Passage,
    module_logits,
    passages,
    perplexity,
)
from mas_batch.errors import JobError, OutOfMemoryError

MAX_WORSE = 0.02
"""A perplexity that has grown by more than this share is a warning."""

SENTENCES = (
    "The library opens at nine in the morning. Visitors who want to borrow books need a card, "
    "which is free for people who live in the town.",
    "Water expands when it freezes, so a full bottle that is left outside on a cold night may "
    "break before the sun comes up.",
    "To change the size of a picture, select it, choose Properties from the menu, and enter the "
    "width and the height in centimetres.",
    "She said that the meeting had been moved to Thursday, because two of the engineers were "
    "still on their way back from the factory.",
    "In 1969 the first message between two distant computers was cut off after two letters; an "
    "hour later the whole word arrived.",
    'def mean(values):\n    """Return their mean."""\n    return sum(values) / len(values)',
    "Der Zug nach Hamburg hat heute zwanzig Minuten Verspätung und fährt von einem anderen Gleis.",
    "O relatório foi enviado ontem à noite, mas ninguém respondeu até agora.",
)
"""Written for this: about 200 words, mostly English."""


def load_settings(quantize: str, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` is to be told: weights are rounded one by one, on the device.

    Raises:
        JobError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ModuleNotFoundError as error:
        raise JobError(
            f"{quantize!r} needs the package {error.name!r}: pip install 'mas_batch[quantize]'",
            key="agents.quantize",
        ) from error
    # Its settings of PyTorch's compiler would be the whole process's.
    kind = Int8WeightOnlyConfig(set_inductor_config=False)
    return {"quantization_config": TorchAoConfig(kind), "device_map": str(device)}


@dataclass(frozen=True, slots=True)
class Whole:
    """What is known of the model with all its bits."""

    asked: Sequence[Passage]
    perplexity: float


def measure_whole(load: Callable[[], Any], tokenizer: Any) -> Whole | None:
    """Load the model as it is, and ask it; None: it does not fit into the device's memory."""

    def measure() -> Whole:
        with torch.inference_mode():
            model = load()
            asked = passages(model, tokenizer, SENTENCES)
            return Whole(asked, perplexity(module_logits(model), asked))

    try:
        return run_freeing(measure)
    except OutOfMemoryError:
        return None
    finally:
        free_caches()


def quantized_facts(
    source: str, quantize: str, before: Whole | None, after: float | None
) -> dict[str, Any]:
    """Return facts for the manifest; `warnings` are among them if fewer bits have cost too much."""
    found: dict[str, Any] = {"quantize": quantize}
    name = f"{source} with quantize: {quantize}"
    if before is None or after is None:
        said = "was not compared with its whole weights, which do not fit into the memory."
        return {**found, "warnings": [f"{name} {said}"]}
    found["perplexity"] = {"whole": round(before.perplexity, 4), "quantized": round(after, 4)}
    worse = after / before.perplexity - 1
    if worse <= MAX_WORSE:
        return found
    figures = f"{before.perplexity:.4g} → {after:.4g}"
    warning = (
        f"{name}: its perplexity is {worse:.1%} worse than that of the whole weights ({figures}, "
        f"on a few sentences; up to {MAX_WORSE:.0%} is usual). Compare its answers with those of "
        "a run without quantize, or leave it out."
    )
    return {**found, "warnings": [warning]}
