"""Sentence vectors on a worker, for merges that compare texts by meaning."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
    source = spec.encoder
    found = _THREAD.submit(lambda: _load(source).encode(texts)).result()
    vectors = dict(zip(texts, found, strict=True))

    def encode(asked: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.stack([vectors[text] for text in asked])

    return encode


_THREAD = ThreadPoolExecutor(1, thread_name_prefix="mas-batch-encoder")
"""Merges run in several threads; an encoder and torch's thread pool are for one."""


@lru_cache(maxsize=1)
def _load(source: str) -> Encoder:
    """Load the encoder once: it stays resident for all merges on this worker."""
    from mas_batch.engines.encoder import Encoder  # it imports torch: seconds, hundreds of MB

    return Encoder.load(fetch(source), EngineConfig())
