"""Positions of an earlier run's records by content and id: 48 bytes of memory per record.

A record's key is a hash of what an agent is shown, text and context, followed by a hash of its
id. Keys are sorted, so that equal contents stand together and an id is found among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_CONTENT_BYTES = 16
_ID_BYTES = 8
_KEY = np.dtype(f"S{_CONTENT_BYTES + _ID_BYTES}")
"""NumPy drops zeros at the end of such strings; the order stays, because all have one length."""

COLUMNS = ("record_id", "text", "context")
"""Columns of a staged partition that `record_keys` reads."""

Keys = NDArray[np.bytes_]


def record_keys(records: pa.Table) -> Keys:
    """Hash every record: [n], content before id.

    Args:
        records: `COLUMNS`; unusable records have no text.
    """
    columns = (records[name].to_pylist() for name in COLUMNS)
    keys = (
        _content_hash(text, context) + _hash(record_id, _ID_BYTES)
        for record_id, text, context in zip(*columns, strict=True)
    )
    return np.fromiter(keys, _KEY, records.num_rows)


def _content_hash(text: str | None, context: str | None) -> bytes:
    # With the lengths in front, different pairs of text and context never give the same string.
    lengths = " ".join("-" if part is None else str(len(part)) for part in (text, context))
    return _hash(f"{lengths} {text or ''}{context or ''}", _CONTENT_BYTES)


def _hash(text: str, size: int) -> bytes:
    # Usable texts hold no surrogates, but ids and contexts may.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """What an index finds for some records; arrays of one length, in the records' order."""

    position: NDArray[np.int64]
    """Position in the earlier corpus of a record of the same content; -1: there is none."""
    same_id: NDArray[np.bool_]
    """Whether that earlier record also has the same id."""
    changed: NDArray[np.int64]
    """Position of an earlier record of the same id and other content; -1: there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordIndex:
    """Finds the records of an earlier corpus by content and id."""

    _keys: Keys
    """[n], sorted."""
    _positions: NDArray[np.int64]
    """[n], position in the earlier corpus of each key's record."""
    _ids: Keys
    """[n], the id parts of the keys, sorted on their own."""
    _id_positions: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Iterable[Keys]) -> RecordIndex:
        """Build the index from the keys of all records, in the earlier corpus's order."""
        keys = np.concatenate([np.empty(0, _KEY), *parts])
        ids = _cut_bytes(keys, _CONTENT_BYTES, _ID_BYTES)
        by_key, by_id = np.argsort(keys, kind="stable"), np.argsort(ids, kind="stable")
        return cls(keys[by_key], by_key, ids[by_id], by_id)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Keys) -> Matches:
        """Look records up; of several equal earlier records the first counts."""
        exact = _lookup(self._keys, self._positions, keys)
        content = _cut_bytes(keys, 0, _CONTENT_BYTES).astype(_KEY)  # sorts before it with any id
        found = np.searchsorted(self._keys, content)
        found[found == len(self)] = 0
        same = np.zeros(len(keys), np.bool_)
        if len(self):
            same = _cut_bytes(self._keys[found], 0, _CONTENT_BYTES) == content
        position = np.where(same, self._positions[found] if len(self) else -1, -1)
        position = np.where(exact >= 0, exact, position)
        by_id = _lookup(self._ids, self._id_positions, _cut_bytes(keys, _CONTENT_BYTES, _ID_BYTES))
        return Matches(position, exact >= 0, np.where(exact >= 0, -1, by_id))


def _cut_bytes(keys: Keys, start: int, size: int) -> Keys:
    """Cut `size` bytes out of every key."""
    width = keys.dtype.itemsize
    cut = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, width)[:, start : start + size]
    return np.ascontiguousarray(cut).view(f"S{size}").reshape(-1)


def _lookup(keys: Keys, positions: NDArray[np.int64], wanted: Keys) -> NDArray[np.int64]:
    """Return the first position of every wanted key; -1 for a key that is not there."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    found = np.searchsorted(keys, wanted)
    found[found == len(keys)] = 0
    return np.where(keys[found] == wanted, positions[found], -1)
