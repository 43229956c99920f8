"""Vectors of the texts that were read lately: the agents of one encoder read a text once."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_ENTRY_BYTES = 300
"""About what Python takes for an entry beside the vector's numbers."""


class RecentVectors:
    """Text → vector, up to `max_bytes`; what was not asked for the longest goes first.

    Texts are kept as hashes of 128 bits: they may be long. Not safe for threads.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._vectors: dict[bytes, NDArray[np.float32]] = {}  # the latest at the end

    def get(self, text: str) -> NDArray[np.float32] | None:
        """Return the text's vector; None if it is not, or no longer, known."""
        key = _key(text)
        vector = self._vectors.pop(key, None)
        if vector is not None:
            self._vectors[key] = vector
        return vector

    def add(self, text: str, vector: NDArray[np.float32]) -> None:
        """Keep the vector of a text that is not known."""
        self._vectors[_key(text)] = vector.copy()  # a row would keep its whole batch in memory
        self._num_bytes += vector.nbytes + _ENTRY_BYTES
        while self._num_bytes > self._max_bytes:
            oldest = self._vectors.pop(next(iter(self._vectors)))
            self._num_bytes -= oldest.nbytes + _ENTRY_BYTES


def _key(text: str) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
