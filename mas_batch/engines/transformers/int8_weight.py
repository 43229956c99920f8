"""Weights that torchao has made int8 of, as a CPU multiplies them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PART_ELEMENTS = 1 << 20
"""So many weights are made whole at a time: 4 MB in float32."""


def is_rounded(weight: Any) -> bool:
    """Whether torchao has made int8 of it, with one scale per row."""
    scale = getattr(weight, "scale", None)
    return scale is not None and weight.qdata.dtype == torch.int8 and scale.shape[1:] == (1,)


class Int8Weight:
    """Matrices that torchao has rounded, one below the other."""

    def __init__(self, weights: Sequence[Any]) -> None:
        self._values = weights[0].qdata
        if len(weights) > 1:
            self._values = torch.cat([weight.qdata for weight in weights])
            owned = self._values.split([len(weight) for weight in weights])
            for weight, own in zip(weights, owned, strict=True):
                weight.qdata = own  # the module's too: there is one of each
        self._scales = torch.cat([weight.scale for weight in weights]).to(weights[0].dtype)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows, and what they are in the model's dtype: valid until the next.

        A part stays in the cache where it is made until it has been multiplied by. A CPU has no
        kernel that multiplies int8 by floats as fast as this is at more than a few rows.
        """
        num_rows, size = self._values.shape
        most = max(1, PART_ELEMENTS // size)
        for start in range(0, num_rows, most):
            rows = slice(start, min(start + most, num_rows))
            values = self._values[rows]
            whole = _scratch(values.numel(), self._scales.dtype).view(values.shape)
            yield rows, whole.copy_(values).mul_(self._scales[rows])


def _scratch(number: int, dtype: torch.dtype) -> Tensor:
    kept: dict[torch.dtype, Tensor] = vars(_local).setdefault("kept", {})
    if dtype not in kept or len(kept[dtype]) < number:
        with torch.inference_mode(False):
            kept[dtype] = torch.empty(max(number, PART_ELEMENTS), dtype=dtype)
    return kept[dtype][:number]


_local = threading.local()
