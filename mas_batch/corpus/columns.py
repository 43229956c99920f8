"""The corpus' other columns: which are carried, under which name, with which type.

JSON has no column types, and partitions are staged to Parquet while the corpus is still
being read. So a staged column has the type of its own partition's values, and `conform`
gives it the type of the whole corpus later; staging loses nothing that the final type needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mas_batch.corpus.carried_types import Extremes
from mas_batch.errors import JobError, RunError
from mas_batch.records import RECORD_FIELDS, RESERVED_COLUMNS, Record

# What a JSON column has held so far, as bits.
_BOOL, _INT, _LONG, _FLOAT, _TEXT = 1, 2, 4, 8, 16
_EXACT_IN_DOUBLE = 2**53
_INT64 = 2**63


class ArrowRow(Mapping[str, Any]):
    """One row of a record batch, read on demand, so that Arrow values never change type.

    Python has no nanoseconds, for one: a detour over Python values would not be exact.
    """

    __slots__ = ("batch", "index")

    def __init__(self, batch: pa.RecordBatch, index: int) -> None:
        self.batch = batch
        self.index = index

    def __getitem__(self, name: str) -> Any:
        if name not in self.batch.schema.names:
            raise KeyError(name)
        return self.batch.column(name)[self.index].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch.schema.names)

    def __len__(self) -> int:
        return int(self.batch.num_columns)

    def __reduce__(self) -> tuple[Any, ...]:  # pickle the row, not the batch
        return dict, (dict(self),)


class Columns:
    """Collects the names and types of a corpus's columns while its rows are read."""

    def __init__(self, roles: Sequence[str], keep: Sequence[str] | None) -> None:
        self._roles = frozenset(roles)
        self._keep = None if keep is None else frozenset(keep)
        self._names: dict[str, str | None] = {}
        self._kinds: dict[str, int] = {}
        self._declared = pa.schema([])
        self._extremes = Extremes()

    @property
    def seen(self) -> Sequence[str]:
        """The corpus' own column names, in order of appearance."""
        return tuple(self._names)

    def name(self, column: str) -> str | None:
        """Return the name under which a column is carried, None if it is not carried.

        Raises:
            JobError: two columns would get one name.
        """
        if column not in self._names:
            self._names[column] = name = self._carried_name(column)
            if name is not None:
                self._kinds[name] = 0
        return self._names[column]

    def _carried_name(self, column: str) -> str | None:
        if column in self._roles if self._keep is None else column not in self._keep:
            return None
        name = valid_text(column)
        if name in RESERVED_COLUMNS:
            name = f"source_{name}"
        if name in self._kinds:
            other = next(c for c, n in self._names.items() if n == name)
            raise JobError(
                f"columns {other!r} and {column!r} would both be carried as {name!r}, because the "
                "results have columns of their own; keep only one of them",
                key="corpus.keep",
            )
        return name

    def take(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's carried values under their new names, and remember their types."""
        taken, names, kinds = {}, self._names, self._kinds
        for column, value in row.items():
            name = names[column] if column in names else self.name(column)
            if name is not None:
                taken[name] = value
                kinds[name] |= _kind_bits(value)
        return taken

    def declare(self, schema: pa.Schema, where: str) -> None:
        """Add the typed columns of one file, under their new names.

        Raises:
            JobError: a column's type has no common type with that of the files before, or one
                that cannot hold their values.
        """
        fields = [field.remove_metadata().with_nullable(True) for field in schema]
        try:
            # A wider type of the same sort, such as int64 for int32, loses nothing.
            self._declared = pa.unify_schemas(
                [self._declared, pa.schema(fields)], promote_options="permissive"
            )
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise JobError(
                f"{where} does not fit the files before it: {error}; rewrite the column in one "
                "type, or leave it out with corpus.keep",
                key="corpus.path",
            ) from error
        self._extremes.check(self._declared)

    def note(self, batch: pa.RecordBatch, where: str) -> None:
        """Look at the carried values of a file, under their new names.

        Raises:
            JobError: a value that its column's common type cannot hold.
        """
        self._extremes.note(batch, self._declared, where)

    def schema(self) -> pa.Schema:
        """Return the types of the carried columns, as far as the corpus has been read."""
        inferred = [
            pa.field(name, _final_type(kinds))
            for name, kinds in self._kinds.items()
            if name not in self._declared.names
        ]
        return pa.schema([*self._declared, *inferred])


def records_table(records: Sequence[Record], schema: pa.Schema | None = None) -> pa.Table:
    """Build the staged table of a partition: `RECORD_FIELDS`, then the carried columns.

    Args:
        schema: the carried columns' types if they are known already, as for Parquet; None
            takes the types from these records alone, for `conform` to settle later.
    """
    leading = {
        field.name: pa.array([getattr(record, field.name) for record in records], field.type)
        for field in RECORD_FIELDS
    }
    table = pa.table(leading, schema=pa.schema(RECORD_FIELDS))
    rows = [r.passthrough for r in records if isinstance(r.passthrough, ArrowRow)]
    carried = (
        _table_of_batch_rows(rows)
        if rows and len(rows) == len(records)
        else _inferred_table(records)
    )
    for name in carried.column_names:
        table = table.append_column(carried.schema.field(name), carried.column(name))
    return table if schema is None else conform(table, schema)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give a staged table's carried columns their corpus-wide types and order.

    Columns that the partition never saw become null. Tables staged from the same records
    come out the same however the corpus was cut into partitions.

    Raises:
        RunError: a column that `schema` lacks, or a value that its type cannot hold.
    """
    leading = [field.name for field in RECORD_FIELDS]
    unknown = sorted(set(table.column_names) - {*leading, *schema.names})
    if unknown:
        raise RunError(
            f"staged column {unknown[0]!r} is not in the corpus' schema; columns there: "
            f"{', '.join(schema.names)}"
        )
    columns = [table.column(name) for name in leading]
    columns += [_cast_column(table, field) for field in schema]
    return pa.table(columns, schema=pa.schema([*RECORD_FIELDS, *schema]))


def as_text(value: Any) -> str:
    """Return any value as text: strings as they are, the rest as JSON writes it."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, bytes):
        return valid_text(value.decode("utf-8", "surrogateescape"))
    if isinstance(value, (bool, int, float, list, dict)):
        return valid_text(json.dumps(value, ensure_ascii=False, default=str))
    return valid_text(str(value))


def valid_text(text: str) -> str:
    """Return `text` with what UTF-8 cannot hold (lone surrogates) written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind_bits(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        if -_EXACT_IN_DOUBLE <= value <= _EXACT_IN_DOUBLE:
            return _INT
        return _LONG if -_INT64 <= value < _INT64 else _TEXT
    return _FLOAT if isinstance(value, float) else _TEXT


def _final_type(kinds: int) -> pa.DataType:
    if kinds == _BOOL:
        return pa.bool_()
    if kinds and not kinds & ~(_INT | _LONG):
        return pa.int64()
    # A double would change integers that it cannot hold: text keeps them.
    if kinds and not kinds & ~(_INT | _FLOAT):
        return pa.float64()
    return pa.string()


def _staged_type(kinds: int) -> pa.DataType:
    # 1 and 2.5 in one partition: as doubles 1 becomes 1.0, which is not its text if the
    # column turns out to be a string. Staged as text it can still become either.
    return pa.string() if kinds == _INT | _FLOAT else _final_type(kinds)


def _inferred_table(records: Sequence[Record]) -> pa.Table:
    kinds: dict[str, int] = {}
    for record in records:
        for name, value in record.passthrough.items():
            kinds[name] = kinds.get(name, 0) | _kind_bits(value)
    fields = [pa.field(name, _staged_type(bits)) for name, bits in kinds.items()]
    arrays = [
        _array([record.passthrough.get(field.name) for record in records], field.type)
        for field in fields
    ]
    return pa.table(arrays, schema=pa.schema(fields))


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        values = [None if value is None else as_text(value) for value in values]
    return pa.array(values, kind)


def _table_of_batch_rows(rows: Sequence[ArrowRow]) -> pa.Table:
    """Build a table of rows of record batches; neighbouring rows are one slice."""
    slices: list[tuple[pa.RecordBatch, int, int]] = []
    for row in rows:
        if slices and slices[-1][0] is row.batch and slices[-1][2] == row.index:
            slices[-1] = (row.batch, slices[-1][1], row.index + 1)
        else:
            slices.append((row.batch, row.index, row.index + 1))
    tables = [pa.Table.from_batches([batch.slice(a, b - a)]) for batch, a, b in slices]
    return pa.concat_tables(tables, promote_options="permissive")


def _cast_column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    column = table.column(field.name)
    if column.type == field.type:
        return column
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    if field.type == pa.string() and not pa.types.is_dictionary(column.type):
        return pa.chunked_array([_array(column.to_pylist(), field.type)])
    if field.type == pa.float64() and column.type == pa.string():
        numbers = [None if text is None else float(text) for text in column.to_pylist()]
        return pa.chunked_array([pa.array(numbers, field.type)])
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RunError(
            f"column {field.name!r} cannot become {field.type}, the type of the whole corpus: "
            f"{error}; leave it out with corpus.keep, or rewrite it in one type"
        ) from error
