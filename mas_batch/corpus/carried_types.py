"""Types of carried columns: which stand for others, and whether a common type loses a value.

The types of a corpus' later files are not known while its first ones are staged. So the extreme
values of each column are kept, and looked at again whenever a later file widens the column's type:
what that type cannot hold is found before the first task, not by a merge on a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from mas_batch.errors import JobError

_PLAIN = {
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
}


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that a column is carried as: the same values, in a type that can be sliced.

    Views become what they are views of. The indices of categories become 32 bits wide: each file
    may have few, and all files together more than 8 bits can count. They lose their order: Parquet
    lists the categories of a file as they come, so no two files would have the same one.

    Raises:
        TypeError: the type cannot be carried; the message says why.
    """
    if kinds.is_dictionary(kind):
        return pa.dictionary(pa.int32(), plain_type(kind.value_type))
    if kinds.is_struct(kind):
        return pa.struct([_plain_field(kind.field(i)) for i in range(kind.num_fields)])
    if kinds.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field))
    if kinds.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if kinds.is_list_view(kind) or kinds.is_large_list_view(kind):
        raise TypeError(f"{kind}, which Arrow cannot slice")  # nor cast: the offsets are too few
    if kinds.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if kinds.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    return _PLAIN.get(kind, kind)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


_Part = tuple[str, pa.DataType, Callable[[pa.Array], pa.Array]]
"""Name, type, and what takes its values out of the whole column."""


class _Extreme(NamedTuple):
    value: pa.Scalar
    file: str


class Extremes:
    """The least and the greatest value of every column of numbers or times, by type and file."""

    def __init__(self) -> None:
        self._least: dict[tuple[str, pa.DataType], _Extreme] = {}
        self._greatest: dict[tuple[str, pa.DataType], _Extreme] = {}

    def note(self, batch: pa.RecordBatch, schema: pa.Schema, file: str) -> None:
        """Look at the values of a file.

        Args:
            schema: the common types of all files so far.

        Raises:
            JobError: a value that its column's common type cannot hold.
        """
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for leaf, values in _leaf_values(name, column):
                self._note_leaf(leaf, values, schema, file)

    def _note_leaf(self, leaf: str, values: pa.Array, schema: pa.Schema, file: str) -> None:
        if len(values) == values.null_count:
            return
        found, key = pc.min_max(values), (leaf, values.type)
        least, greatest = self._least.get(key), self._greatest.get(key)
        if least is None or _below(found["min"], least.value):
            self._least[key] = _Extreme(found["min"], file)
        if greatest is None or _below(greatest.value, found["max"]):
            self._greatest[key] = _Extreme(found["max"], file)
        if (self._least[key], self._greatest[key]) != (least, greatest):
            self._check_leaf(key, dict(_leaf_types(zip(schema.names, schema.types, strict=True))))

    def check(self, schema: pa.Schema) -> None:
        """Look at all files' extremes again.

        Raises:
            JobError: one is a value that its column's type in `schema` cannot hold.
        """
        common = dict(_leaf_types(zip(schema.names, schema.types, strict=True)))
        for key in self._least:
            self._check_leaf(key, common)

    def _check_leaf(self, key: tuple[str, pa.DataType], common: dict[str, pa.DataType]) -> None:
        leaf, kind = key
        wanted = common.get(leaf, kind)
        if wanted == kind:
            return
        for extreme in (self._least[key], self._greatest[key]):
            if problem := _problem(extreme.value, wanted):
                raise JobError(
                    f"column {leaf!r} of {extreme.file} holds {kind} where other files hold "
                    f"another type, and {wanted} cannot hold both: {problem}; rewrite the column "
                    "in one type, or leave it out with corpus.keep",
                    key="corpus.path",
                )


def _below(one: pa.Scalar, other: pa.Scalar) -> bool:
    return bool(pc.less(one, other).as_py())


def _problem(value: pa.Scalar, wanted: pa.DataType) -> str | None:
    if kinds.is_decimal(value.type) and kinds.is_floating(wanted):
        return "a decimal fraction would be rounded"
    try:
        value.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        return " ".join(str(error).split())
    return None


def _has_extremes(kind: pa.DataType) -> bool:
    return bool(kinds.is_integer(kind) or kinds.is_temporal(kind) or kinds.is_decimal(kind))


def _leaf_values(name: str, column: pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """Yield the columns of numbers and times in a column, each under its name there."""
    if _has_extremes(column.type):
        yield name, column
    for part, _, values_of in _parts(name, column.type):
        yield from _leaf_values(part, values_of(column))


def _leaf_types(fields: Iterable[tuple[str, pa.DataType]]) -> Iterator[tuple[str, pa.DataType]]:
    """Yield the types of the innermost columns, under the names that `_leaf_values` gives them."""
    for name, kind in fields:
        parts = [(part, own) for part, own, _ in _parts(name, kind)]
        yield from _leaf_types(parts) if parts else [(name, kind)]


def _parts(name: str, kind: pa.DataType) -> list[_Part]:
    """Return the columns that a column of that type is made of; none for a plain one."""
    if kinds.is_struct(kind):
        return [
            (f"{name}.{field.name}", field.type, partial(_field_values, place))
            for place, field in enumerate(kind.fields)
        ]
    if kinds.is_map(kind):
        return [
            (f"{name}.key", kind.key_type, lambda column: column.keys),
            (f"{name}.value", kind.item_type, lambda column: column.items),
        ]
    if _is_list(kind):
        return [(f"{name}[]", kind.value_type, lambda column: column.flatten())]
    return []


def _field_values(place: int, column: pa.Array) -> pa.Array:
    return column.flatten()[place]


def _is_list(kind: pa.DataType) -> bool:
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))
