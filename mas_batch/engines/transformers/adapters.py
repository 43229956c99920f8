"""LoRA adapters beside one model: rows of several in one batch, the base's weights left alone.

A row is the first dimension of what a layer reads. What an adapter adds is computed for its own
rows only: rows without one get, bit for bit, what they get when nobody has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mas_batch.engines.transformers.adapter_files import LowRank, read_adapter
from mas_batch.models import ModelFiles


@dataclass(frozen=True, slots=True)
class Adapted:
    """The rows of a forward pass that have one adapter."""

    layers: Mapping[str, LowRank]
    """By the names of the model's layers."""
    rows: Tensor | None
    """Their numbers; None: all."""

    def of(self, states: Tensor) -> Tensor:
        """Return its rows."""
        return states if self.rows is None else states[self.rows]

    def num_rows(self, states: Tensor) -> int:
        """Return how many of those of a pass they are."""
        return len(states) if self.rows is None else len(self.rows)

    def add(self, layer: str, states: Tensor, found: Tensor, times: Tensor | None = None) -> None:
        """Add what it adds to what a layer has found in states, perhaps times something."""
        low = self.layers.get(layer)
        if low is None:
            return
        inner = linear(self.of(states), low.down)
        if self.rows is None and times is None and found.dim() == 2:
            found.addmm_(inner, low.up.T)
            return
        added = linear(inner, low.up)
        if times is not None:
            added *= self.of(times)
        if self.rows is None:
            found += added
        else:
            found.index_add_(0, self.rows, added)


class Adapters:
    """The adapters of one model, and which rows of the next forward pass have which."""

    def __init__(self, model: Any, base: ModelFiles) -> None:
        self._model = model
        self._base = base
        self._layers: dict[str, dict[str, LowRank]] = {}
        self._hooked: set[str] = set()
        self._names: Sequence[str | None] = ()
        self._now: list[Adapted] = []
        self.facts: dict[str, Any] = {}
        """For the manifest, by name."""

    def __contains__(self, name: str) -> bool:
        return name in self._layers

    def add(self, name: str, files: ModelFiles) -> None:
        """Load an adapter; see `read_adapter`."""
        layers = read_adapter(files, self._model, self._base)
        for layer in layers.keys() - self._hooked:
            self._hook(layer)
        self._layers[name] = layers
        self.facts[name] = {
            "sha256": files.sha256,
            "rank": max(len(low.down) for low in layers.values()),
            "layers": len(layers),
        }

    @contextmanager
    def used(self, names: Sequence[str | None]) -> Iterator[None]:
        """Have the rows of what runs within use these adapters.

        Args:
            names: of each row; if all are the same, however many rows there are.
        """
        before = self._names, self._now
        try:
            self._names = names
            self._now = self.in_order(None)
            yield
        finally:
            self._names, self._now = before

    def in_order(self, order: Tensor | None) -> list[Adapted]:
        """Return who has which, for a pass whose rows stand in another order.

        Args:
            order: which of the rows each one is; None: as they were named.
        """
        names = self._names
        different = sorted({name for name in names if name is not None})
        if not different:
            return []
        if len(set(names)) == 1:
            return [Adapted(self._layers[different[0]], None)]
        if order is not None:
            names = [names[row] for row in order.tolist()]
        device = self._model.device
        return [
            Adapted(
                self._layers[own],
                torch.tensor([i for i, name in enumerate(names) if name == own], device=device),
            )
            for own in different
        ]

    def _hook(self, layer: str) -> None:
        def add(_: Any, inputs: tuple[Tensor, ...], found: Tensor) -> None:
            for adapted in self._now:
                adapted.add(layer, inputs[0], found)

        self._model.get_submodule(layer).register_forward_hook(add)
        self._hooked.add(layer)
