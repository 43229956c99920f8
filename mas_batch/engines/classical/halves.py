"""Texts of two halves that are compared with each other: a summary and what it sums up."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from mas_batch.engines.classical.predicting import Prediction
from mas_batch.engines.options import EngineOptions
from mas_batch.errors import EngineError


class HalvesOptions(EngineOptions):
    """Options of whatever compares two halves."""

    model_config = ConfigDict(allow_inf_nan=False)

    separator: Annotated[str, Field(min_length=1)] = "\n\n"
    """What stands between the halves; the first one in the text counts."""
    minimum: float = 0.0
    maximum: float = 10.0
    """The task's range: nothing in common, and all."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum {self.minimum} must be below maximum {self.maximum}")
        return self


def halves(text: str, options: HalvesOptions) -> tuple[str, str]:
    """Cut a text in two.

    Raises:
        EngineError: it has no separator, or nothing on one side of it.
    """
    first, _, second = text.strip().partition(options.separator)
    if not first.strip() or not second.strip():
        raise EngineError(
            f"the text has no two halves with {options.separator!r} between them "
            "(options.separator)"
        )
    return first, second


def scaled(share: float, options: HalvesOptions) -> Prediction:
    """Write a share, from 0 to 1, as a number of the range, with three decimals."""
    value = options.minimum + (options.maximum - options.minimum) * min(1.0, max(0.0, share))
    return Prediction(f"{value:.3f}")
