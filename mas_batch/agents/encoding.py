"""Sentence vectors on a worker, for merges that compare texts by meaning."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mas_batch.aggregate.method import Encode, MergeSpec
from mas_batch.aggregate.normalise import nfc
from mas_batch.engines.base import EngineConfig
from mas_batch.models import fetch

if TYPE_CHECKING:
    from mas_batch.engines.encoder import Encoder


_loading = threading.Lock()
"""Merges run in several threads of a worker: one loads, the others wait for it."""


def encoder_for(spec: MergeSpec, answers: pa.Table) -> Encode | None:
    """Encode all answers of a partition at once; None if the merge needs no vectors.

    Raises:
        ModelError: the encoder's model cannot be fetched or loaded.
    """
    if not spec.needs_encoder or spec.encoder is None:
        return None
    texts = sorted({nfc(text) for text in answers["text"].to_pylist() if text is not None})
    if not texts:
        return None
    with _loading:
        encoder = _load(spec.encoder)
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))

    def encode(asked: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.stack([vectors[text] for text in asked])

    return encode


@lru_cache(maxsize=1)
def _load(source: str) -> Encoder:
    """Load the encoder once: it stays resident for all merges on this worker."""
    from mas_batch.engines.encoder import Encoder  # it imports torch: seconds, hundreds of MB

    return Encoder.load(fetch(source), EngineConfig())
