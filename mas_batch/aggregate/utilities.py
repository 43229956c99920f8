"""Utilities: how well one text would do were another the right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mas_batch.aggregate.ballots import UNITS
from mas_batch.aggregate.bleu import bleu_matrix
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.rouge import rouge_l_matrix

Utility = Callable[[Sequence[str]], npt.NDArray[np.float64]]
"""N texts → [N, N] in [0, 1]: how well text i would do were text j the right one."""

UTILITIES: dict[str, Utility] = {
    "chrf": chrf_matrix,
    "bleu": bleu_matrix,
    "rouge-l": rouge_l_matrix,
}
"""By the name that a job gives; `embedding_utility` makes further ones from a model."""

EMBEDDING = "embedding"
"""The utility that needs a model: cosines of sentence vectors."""


def embedding_utility(encode: Callable[[Sequence[str]], npt.NDArray[np.floating]]) -> Utility:
    """Return the utility that compares texts by the cosine of their vectors.

    Args:
        encode: N texts → [N, d], the same vector for a text whatever else is in the list.
    """

    def utility(texts: Sequence[str]) -> npt.NDArray[np.float64]:
        if not texts:
            return np.zeros((0, 0))
        vectors = np.asarray(encode(texts))
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(
                f"encode gave an array of shape {vectors.shape} for {len(texts)} texts; "
                f"allowed: ({len(texts)}, d)"
            )
        return cosine_utility(vectors)

    return utility


def cosine_utility(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the cosine of every two vectors, [N, d] → [N, N]; what is below 0 is 0.

    A vector of zeros has no direction: it scores 0, against itself too.

    Raises:
        ValueError: a component is not finite.
    """
    scales = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
    if not np.isfinite(scales).all():
        bad = int(np.flatnonzero(~np.isfinite(scales))[0])
        raise ValueError(f"vector {bad} has a component that is not finite")
    # Two steps, so that squares neither overflow nor vanish.
    scaled = np.divide(vectors, scales, out=np.zeros(vectors.shape), where=scales > 0)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    units = np.divide(scaled, norms, out=np.zeros(vectors.shape), where=norms > 0)
    cosines: npt.NDArray[np.float64] = np.clip(units @ units.T, 0.0, 1.0)
    return cosines


def symmetric_units(utilities: npt.NDArray[np.float64]) -> list[list[int]]:
    """Symmetrise, in `UNITS`: a sum of Python's integers is exact and has no order."""
    units: list[list[int]] = np.rint((utilities + utilities.T) * (UNITS / 2)).astype(int).tolist()
    return units
