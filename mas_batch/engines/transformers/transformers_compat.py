"""Every name of transformers that we use and that it does not document.

They may change in any release. Each stands here once, with what breaks without it, and
`tests/test_transformers_compat.py` asks each of them for what we need. `pyproject.toml` bounds the
versions that no test has seen.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GgufConfig
from transformers.cache_utils import DynamicLayer

_NO_LIMIT = 10**9
"""A tokenizer that does not know its model's length says a number above (`VERY_LARGE_INTEGER`)."""


def accepted(model: Any, **optional: Any) -> dict[str, Any]:
    """Leave out what the model's forward does not take, e.g. positions of an ALiBi model.

    Architectures differ in the arguments of `forward`, which are documented one by one. Without
    it an architecture is called with an argument that it does not know.
    """
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in optional.items() if name in known}


def cache_argument(model: Any) -> str:
    """Return the name by which the model's forward takes a cache; empty if it takes none.

    Renamed in transformers 5.24. Without it every step reads the whole past again, or fails.
    """
    return next(iter(accepted(model, cache=None, past_key_values=None)), "")


def model_length(tokenizer: Any) -> int | None:
    """Return the length that a tokenizer knows of its model; None if it says none.

    Without it a model whose configuration is silent has no limit.
    """
    length = int(tokenizer.model_max_length)
    return length if length < _NO_LIMIT else None


def dequantized() -> GgufConfig:
    """Return how a .gguf is loaded so that its model can be saved as safetensors.

    Without `dequantize` the loaded model refuses to be saved.
    """
    return GgufConfig(dequantize=True)


def silence_torchao() -> None:
    """Have torchao, which transformers imports where it is installed, say errors only.

    Without it every process that loads a model prints of kernels for other devices than its own,
    and of what PyTorch will do in its own code some day.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_joinable(cache: DynamicCache) -> bool:
    """Whether each layer of the cache is one column per token, and nothing else.

    Layers of another kind (sliding window, linear attention) cannot be put together from groups
    of rows. Without `cache.layers` all prompts would have to be padded to the longest.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def join_rows(
    parts: Sequence[tuple[Tensor, DynamicCache]], *, num_rows: int, width: int, capacity: int
) -> DynamicCache:
    """Make the first of several caches hold the rows of all, right-aligned at `width`.

    Layer by layer, and all parts are given up: there is never room for two of more than one
    layer. After an exception the first cache has its own rows at the old width.

    Args:
        parts: joinable caches, each with the numbers, of `num_rows`, that its rows get.
        capacity: columns that there is room for.
    """
    whole = parts[0][1]
    rows, old_width = len(parts[0][0]), whole.layers[0].keys.shape[2]
    done = 0
    try:
        for i in range(len(whole.layers)):
            layer = GrowingLayer(whole.layers[i], num_rows, width, capacity)
            for own, part in parts:
                layer.fill(own, part.layers[i])
            for _, part in parts:
                part.layers[i] = layer
            done = i + 1
    except BaseException:
        for layer in whole.layers[:done]:
            layer.cut(rows, old_width)
        raise
    return whole


def drop_columns(cache: DynamicCache, number: int) -> None:
    """Forget the leftmost columns of a cache that was put together."""
    for layer in cache.layers:
        layer.drop_columns(number)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [rows, heads, columns, size], allocated once for all steps.

    A subclass, because attention asks a layer for more than is overridden here. Without
    `lazy_initialization`, `update` and `reorder_cache`, or with keys and values elsewhere than in
    attributes of these names, the past is copied whole at every step.
    """

    def __init__(self, like: DynamicLayer, num_rows: int, width: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        # Zeros, because padding is masked but still multiplied: it has to be finite.
        self._buffers = [
            tensor.new_zeros(num_rows, tensor.shape[1], capacity, tensor.shape[3])
            for tensor in (like.keys, like.values)
        ]
        self._set_width(width)

    def fill(self, rows: Tensor, part: DynamicLayer) -> None:
        """Put a group's columns at the right end of these rows."""
        own = slice(self._width - part.keys.shape[2], self._width)
        for buffer, tensor in zip(self._buffers, (part.keys, part.values), strict=True):
            buffer[rows, :, own] = tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a column per new token; return all keys and values."""
        new = slice(self._width, self._width + key_states.shape[2])
        for buffer, tensor in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, new] = tensor
        self._set_width(new.stop)
        return self.keys, self.values

    def drop_columns(self, number: int) -> None:
        """Forget the leftmost columns."""
        self._buffers = [buffer[:, :, number:] for buffer in self._buffers]
        self._set_width(self._width - number)

    def cut(self, num_rows: int, width: int) -> None:
        """Go on with the first rows and the rightmost columns."""
        columns = self._width - width
        self._buffers = [buffer[:num_rows, :, columns:] for buffer in self._buffers]
        self._set_width(width)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, in this order."""
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._set_width(self._width)

    def _set_width(self, width: int) -> None:
        self._width = width
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)
