"""Read Marian's binary model files, as Mozilla's tiny translation models ship them.

Layout, little endian: uint64 version (1) and uint64 n; n headers of four uint64 (length of the
name, type, number of dimensions, length of the data in bytes); the zero-terminated names; the
shapes (int32 each); uint64 padding and that many bytes; then the data blocks in order.
Source: Marian's `binary.cpp` and `types.h`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mas_batch.errors import ModelError

VERSION = 1
FLOAT32 = 0x0404
INT8 = 0x0101
INTGEMM8 = 0x4101
"""int8 values, then one float32 multiplier: value = int8 / multiplier."""
EMBEDDING = "Wemb"
CONFIG = "special:model.yml"
ACTIVATION_SCALE = "_QuantMultA"
"""Suffix of the scales that int8 arithmetic needs for activations; float arithmetic does not."""

_HEADER = np.dtype([("name_length", "<u8"), ("type", "<u8"), ("rank", "<u8"), ("num_bytes", "<u8")])


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor is in the file, as its header says."""

    name: str
    type: int
    """One of `FLOAT32`, `INT8`, `INTGEMM8`."""
    shape: tuple[int, ...]
    start: int
    """Byte position of the data."""


@dataclass(frozen=True, slots=True)
class MarianFile:
    """A model file, memory-mapped; tensors are converted one by one as they are asked for."""

    path: Path
    entries: Mapping[str, Entry]
    data: NDArray[np.uint8]
    """The whole file."""
    _taken: set[str] = field(default_factory=set)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return the tensor as float32, in the shape of its header; a view where it can be.

        Raises:
            ModelError: the file has no such tensor.
        """
        entry = self._entry(name)
        size = prod(entry.shape)
        if entry.type == FLOAT32:
            return np.frombuffer(self.data, "<f4", size, entry.start).reshape(entry.shape)
        values = np.frombuffer(self.data, np.int8, size, entry.start).astype(np.float32)
        if entry.type == INTGEMM8:
            values /= np.frombuffer(self.data, "<f4", 1, entry.start + size)
        # intgemm wants weights column by column, but the embedding is also looked up row by row.
        if entry.type == INTGEMM8 and name != EMBEDDING:
            return values.reshape(entry.shape[::-1]).T
        return values.reshape(entry.shape)

    def config(self) -> dict[str, Any]:
        """Return the training options that Marian keeps in the file.

        Raises:
            ModelError: there are none, or they are not a YAML mapping.
        """
        entry = self._entry(CONFIG)
        text = self.data[entry.start : entry.start + prod(entry.shape)].tobytes().rstrip(b"\0")
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ModelError(f"{self.path}: {CONFIG} is not YAML: {error}") from error
        if not isinstance(config, dict):
            raise ModelError(f"{self.path}: {CONFIG} is not a mapping")
        return config

    def check_all_used(self) -> None:
        """Raise ModelError if a weight was never asked for: the network would lack a part."""
        unused = sorted(n for n in self.entries.keys() - self._taken if not _is_optional(n))
        if unused:
            raise ModelError(f"{self.path}: no use is known for {_first_names(unused)}")

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ModelError(
                f"{self.path}: no tensor {name!r}; it has {_first_names(self.entries)}"
            )
        self._taken.add(name)
        return self.entries[name]


def read_marian(path: Path) -> MarianFile:
    """Map a model file and read its table of contents.

    Raises:
        ModelError: it is of another version, truncated or inconsistent, or a tensor has a type
            other than float32, int8 and intgemm's portable int8.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path}: cannot be read: {error}") from error
    reader = _Reader(path, data)
    version, count = (int(value) for value in reader.take("<u8", 2, "the version"))
    if version != VERSION:
        raise ModelError(f"{path}: version {version} of Marian's format; only {VERSION} is known")
    headers = reader.take(_HEADER, count, "the headers")
    names = [reader.name(int(header["name_length"])) for header in headers]
    shapes = [
        reader.shape(int(header["rank"]), n) for header, n in zip(headers, names, strict=True)
    ]
    reader.skip(int(reader.take("<u8", 1, "the padding")[0]), "the padding")
    entries: dict[str, Entry] = {}
    for header, name, shape in zip(headers, names, shapes, strict=True):
        entry = Entry(name, int(header["type"]), shape, reader.position)
        _check_size(path, entry, int(header["num_bytes"]))
        reader.skip(int(header["num_bytes"]), name)
        if name in entries:
            raise ModelError(f"{path}: two tensors are called {name!r}")
        entries[name] = entry
    return MarianFile(path, entries, data)


class _Reader:
    """A position in the file that never passes its end."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def skip(self, num_bytes: int, what: str) -> int:
        """Step over `num_bytes` and return where they began."""
        start = self.position
        if num_bytes > len(self.data) - start:
            raise ModelError(
                f"{self.path}: truncated: {what} needs {num_bytes} bytes from byte {start}, "
                f"the file ends at {len(self.data)}"
            )
        self.position += num_bytes
        return start

    def take(self, dtype: str | np.dtype[np.void], count: int, what: str) -> NDArray[Any]:
        start = self.skip(np.dtype(dtype).itemsize * count, what)
        return np.frombuffer(self.data, dtype, count, start)

    def name(self, length: int) -> str:
        raw = self.take("u1", length, "a name").tobytes()
        try:
            return raw.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: a tensor's name is not text: {raw!r}") from error

    def shape(self, rank: int, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self.take("<i4", rank, f"the shape of {name}"))
        if any(size < 1 for size in shape):
            raise ModelError(f"{self.path}: {name}: impossible shape {list(shape)}")
        return shape


def _check_size(path: Path, entry: Entry, num_bytes: int) -> None:
    size = prod(entry.shape)
    needed = {FLOAT32: 4 * size, INT8: size, INTGEMM8: size + 4}.get(entry.type)
    if needed is None:
        raise ModelError(
            f"{path}: {entry.name}: unknown tensor type {entry.type:#06x}; allowed: "
            f"{FLOAT32:#06x} (float32), {INT8:#06x} (int8), {INTGEMM8:#06x} (intgemm int8)"
        )
    if num_bytes < needed:
        raise ModelError(
            f"{path}: {entry.name}: {num_bytes} bytes for shape {list(entry.shape)} of type "
            f"{entry.type:#06x}, which needs {needed}"
        )


def _is_optional(name: str) -> bool:
    return name.endswith(ACTIVATION_SCALE) or name.startswith("special:")


def _first_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more
