"""Typed columns of Parquet files: carried as they came, or refused with column and file."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

import mas_batch
from mas_batch import pipeline
from mas_batch.corpus import CorpusReader, records_table
from mas_batch.errors import JobError
from mas_batch.job import Corpus, Job

MakeJob = Callable[..., Job]


def write(folder: Path, **files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, columns in files.items():
        num_rows = len(next(iter(columns.values())))
        texts = [f"text {i} of {name}" for i in range(num_rows)]
        table = pa.table({"text": texts, **columns})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def category(values: list[str | None], index: pa.DataType, ordered: bool = False) -> pa.Array:
    return pa.array(values).dictionary_encode().cast(pa.dictionary(index, pa.string(), ordered))


def test_all_types_go_through_a_whole_run(
    tmp_path: Path, make_job: MakeJob, cluster_client: Client
) -> None:
    first, second = ([f"{name}{i}" for i in range(100)] for name in "ab")
    big, far = 2**63 - 1, 2**62

    def columns(names: list[str]) -> dict[str, Any]:
        size = len(names)
        return {
            "kind": category([*names[:-1], None], pa.int8()),
            "grade": category(names, pa.uint8(), ordered=True),
            "view": pa.array([*names[:-1], None], pa.string_view()),
            "raw_view": pa.array([name.encode() for name in names], pa.binary_view()),
            "views": pa.array([[name] for name in names], pa.list_(pa.string_view())),
            "field": pa.array([{"v": n} for n in names], pa.struct([("v", pa.string_view())])),
            "big": pa.array([big] * size, pa.int64()),
            "unsigned": pa.array([2**64 - 1] * size, pa.uint64()),
            "far": pa.array([far] * size, pa.timestamp("us")),
        }

    folder = write(tmp_path / "corpus", a=columns(first), b=columns(second))
    job = make_job(corpus={"path": str(folder)}, partition={"max_records": 70})
    run = mas_batch.open_run(pipeline.run(job, client=cluster_client).run)
    table = run.arrow()
    both = [*first, *second]
    assert table["kind"].to_pylist() == [*first[:-1], None, *second[:-1], None]
    assert table["grade"].to_pylist() == both
    assert not table["grade"].type.ordered  # each file would have an order of its own
    assert table["view"].to_pylist() == table["kind"].to_pylist()
    assert table["raw_view"].to_pylist() == [name.encode() for name in both]
    assert table["views"].to_pylist() == [[name] for name in both]
    assert table["field"].to_pylist() == [{"v": name} for name in both]
    assert table["big"].to_pylist() == [big] * 200
    assert table["unsigned"].to_pylist() == [2**64 - 1] * 200
    assert table["far"].cast(pa.int64()).to_pylist() == [far] * 200
    frame = run.pandas()
    assert frame["kind"].dtype == "category"
    assert list(frame["kind"].dropna()) == [*first[:-1], *second[:-1]]
    assert len(run.dask().compute()) == 200


def typed(kind: pa.DataType, *values: Any) -> dict[str, pa.Array]:
    return {"n": pa.array(values, kind)}


ODD = 2**53 + 1
FAR = 2**62  # µs: some 146,000 years
TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "large integer, then double": (typed(pa.int64(), ODD), typed(pa.float64(), 0.5)),
    "double, then large integer": (typed(pa.float64(), 0.5), typed(pa.int64(), 1, ODD)),
    "large unsigned beside signed": (typed(pa.uint64(), 2**64 - 1), typed(pa.int64(), -1)),
    "signed, then large unsigned": (typed(pa.int32(), -1), typed(pa.uint64(), 2**63)),
    "far timestamp beside nanoseconds": (
        typed(pa.timestamp("us"), FAR),
        typed(pa.timestamp("ns"), 1),
    ),
    "nanoseconds, then a far timestamp": (
        typed(pa.timestamp("ns"), 1),
        typed(pa.timestamp("us"), 1, FAR),
    ),
    "large integers in lists": (
        typed(pa.list_(pa.int64()), [1, ODD]),
        typed(pa.list_(pa.float64()), [0.5]),
    ),
    "large integers in fields": (
        typed(pa.struct([("a", pa.float64())]), {"a": 0.5}),
        typed(pa.struct([("a", pa.int64())]), {"a": ODD}),
    ),
    "decimal beside double": (
        typed(pa.decimal128(9, 2), decimal.Decimal("1.10")),
        typed(pa.float64(), 0.5),
    ),
    "more digits than the decimal": (
        typed(pa.int64(), 2**62),
        typed(pa.decimal128(9, 2), decimal.Decimal("1.10")),
    ),
}


@pytest.mark.parametrize("case", TOGETHER.values(), ids=TOGETHER.keys())
def test_what_no_common_type_can_hold_names_column_and_file(
    tmp_path: Path, case: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    folder = write(tmp_path / "corpus", a=case[0], b=case[1])
    with pytest.raises(JobError, match=r"column 'n[^']*' of \S+\.parquet .*corpus\.keep"):
        _stage_all(folder)


def test_list_views_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "corpus", a=typed(pa.list_view(pa.int64()), [1]))
    with pytest.raises(JobError, match=r"column 'n' of \S+a\.parquet holds list_view"):
        _stage_all(folder)


def test_integers_that_doubles_hold_go_with_doubles(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "corpus", a=typed(pa.int64(), 2**53, None), b=typed(pa.float64(), 0.5)
    )
    assert _stage_all(folder)["n"].to_pylist() == [2.0**53, None, 0.5]


def test_structures_may_gain_fields(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "corpus",
        a=typed(pa.struct([("a", pa.int64())]), {"a": ODD}),
        b=typed(pa.struct([("a", pa.int64()), ("b", pa.string())]), {"a": 1, "b": "x"}),
    )
    assert _stage_all(folder)["n"].to_pylist() == [{"a": ODD, "b": None}, {"a": 1, "b": "x"}]


def _stage_all(folder: Path) -> pa.Table:
    """Stage a partition per record, then all records as one, as a run might."""
    reader = CorpusReader(Corpus(path=str(folder)))
    records = list(reader)
    schema = reader.passthrough_schema()
    for record in records:
        records_table([record], schema)
    return records_table(records, schema)
