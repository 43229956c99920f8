"""Reading a corpus: every format, every bad row, and ids that stay the same."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import importlib.util
import io
import json
import lzma
import math
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mas_batch import corpus as corpus_module
from mas_batch.corpus import CorpusReader, conform, records_table
from mas_batch.errors import JobError, Reason, RunError
from mas_batch.job import Corpus
from mas_batch.records import RECORD_FIELDS, Record

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": None}, {"text": "drei — ü", "n": 3}]


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(path: Any, **options: Any) -> list[Record]:
    return list(reader(path, **options))


def reader(path: Any, **options: Any) -> CorpusReader:
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    return CorpusReader(Corpus(path=path, **options))


def texts(records: list[Record]) -> list[str | None]:
    return [record.text for record in records]


def write(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def zipped(content: bytes, *names: str) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in names or ("a.jsonl",):
            file.writestr(name, content)
    return archive.getvalue()


def parquet(folder: Path, name: str, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


# --- Formats and codecs --------------------------------------------------------------------

CODECS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".zip": zipped,
}


@pytest.mark.parametrize("codec", CODECS)
def test_jsonl_in_every_codec(tmp_path: Path, codec: str) -> None:
    file = write(tmp_path, f"a.jsonl{codec}", CODECS[codec](jsonl(*ROWS)))
    records = read(file)
    assert texts(records) == ["one", "two", "drei — ü"]
    assert [record.passthrough for record in records] == [{"n": 1}, {"n": None}, {"n": 3}]


@pytest.mark.parametrize("codec", [".gz", ".bz2", ".xz", ".zst"])
def test_concatenated_streams_are_read_to_the_end(tmp_path: Path, codec: str) -> None:
    big = jsonl(*({"text": f"row {i} of a longer file"} for i in range(20_000)))
    compress = CODECS[codec]
    file = write(tmp_path, f"a.jsonl{codec}", compress(big) + compress(jsonl(*ROWS)))
    assert len(read(file)) == 20_003


@pytest.mark.parametrize("codec", [".gz", ".bz2", ".xz", ".zst", ".zip"])
def test_a_cut_file_stops_the_run_and_says_where(tmp_path: Path, codec: str) -> None:
    rows = jsonl(*({"text": f"{i} {hash(i * 7919) % 65537}"} for i in range(40_000)))
    file = write(tmp_path, f"a.jsonl{codec}", CODECS[codec](rows)[:-9])
    with pytest.raises(JobError, match=r"a\.jsonl\S+ cannot be read after row \d+: .*restore it"):
        read(file)


def test_explicit_codec_and_none(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", gzip.compress(jsonl(*ROWS)))
    assert len(read(file, compression="gzip")) == 3
    plain = write(tmp_path, "b.jsonl.gz", jsonl(*ROWS))
    assert len(read(plain, compression=None)) == 3


def test_codecs_that_cannot_be_read_are_refused_at_the_door(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", b"{}")
    with pytest.raises(JobError, match=r"corpus.compression: 'rar' is not allowed; allowed: infer"):
        reader(file, compression="rar")
    two = write(tmp_path, "b.jsonl.zip", zipped(b"{}", "a.jsonl", "b.jsonl"))
    with pytest.raises(JobError, match=r"holds 2 files, not one: a.jsonl, b.jsonl"):
        read(two)
    with pytest.raises(JobError, match="Parquet is compressed inside"):
        reader(write(tmp_path, "c.parquet.gz", b""))


@pytest.mark.skipif(importlib.util.find_spec("lz4") is not None, reason="lz4 is installed")
def test_a_missing_codec_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="pip install lz4") as caught:
        reader(write(tmp_path, "a.jsonl.lz4", b""))
    assert caught.value.key == "corpus.compression"


def test_csv_and_tsv(tmp_path: Path) -> None:
    rows = [["text", "note"], ["a, b", 'he said "hi"'], ["two\nlines", ""], ["x\r\ny", "é"]]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        records = read(tmp_path / name)
        assert texts(records) == ["a, b", "two\nlines", "x\r\ny"]
        assert [record.passthrough["note"] for record in records] == ['he said "hi"', "", "é"]


def test_csv_rows_of_the_wrong_width_or_quoting(tmp_path: Path) -> None:
    file = write(
        tmp_path, "a.csv", b'text,n\ngood,1\nshort\nlong,2,3\n\n"bad"x,4\nfine,5\n"open,6\n'
    )
    records = read(file)
    assert texts(records) == ["good", None, None, None, "fine", None]
    assert {r.reason for r in records if r.text is None} == {Reason.MALFORMED_ROW}
    assert records[1].message == "a.csv, row 2: 1 fields where the header has 2"
    assert records[5].message.endswith("unexpected end of data, in line 8")


def test_plain_text_lines_and_files(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", b"\xef\xbb\xbffirst\r\n\n  \nlast")
    write(tmp_path, "b.txt", b"")
    lines = read(tmp_path)
    assert texts(lines) == ["first", "last"]
    assert lines[1].record_id == read(write(tmp_path / "c", "a.txt", b"x\n\n\nlast"))[1].record_id
    assert texts(read(tmp_path / "a.txt", record="file")) == ["first\r\n\n  \nlast"]
    with pytest.raises(JobError, match=r"corpus.id: plain text has no columns"):
        reader(tmp_path / "a.txt", id="n")


def test_a_very_long_line(tmp_path: Path) -> None:
    text = "word " * 1_000_000
    assert texts(read(write(tmp_path, "a.jsonl", jsonl({"text": text})))) == [text]
    assert texts(read(write(tmp_path, "a.csv", f'text\n"{text}"\n'.encode()))) == [text]


def test_a_json_document_is_not_json_lines(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, "lines.json", jsonl(*ROWS)))) == 3
    for content in (json.dumps(ROWS), json.dumps(ROWS[0], indent=1)):
        with pytest.raises(JobError, match=r"corpus.format: .*one object a line"):
            read(write(tmp_path, "whole.json", content.encode()))


# --- Rows that cannot be asked about -------------------------------------------------------

BAD_ROWS = [
    (b'{"text": "cut', Reason.MALFORMED_ROW),
    (b'["a list"]', Reason.MALFORMED_ROW),
    (b'"\xff"', Reason.MALFORMED_ROW),
    (b'{"text": "a", "text": "b"}', Reason.MALFORMED_ROW),
    (b'{"text": ' + b"[" * 100_000, Reason.MALFORMED_ROW),
    (b'{"text": "a", "n": ' + b"[" * 400 + b"]" * 400 + b"}", Reason.MALFORMED_ROW),
    (b'{"text": 1' + b"0" * 5000 + b"}", Reason.MALFORMED_ROW),
    (b'{"other": 1}', Reason.MISSING_TEXT),
    (b'{"text": null}', Reason.MISSING_TEXT),
    (b'{"text": 5}', Reason.NOT_TEXT),
    (b'{"text": ["a"]}', Reason.NOT_TEXT),
    (b'{"text": ""}', Reason.EMPTY),
    (b'{"text": " \\t\\u00a0\\u3000"}', Reason.WHITESPACE),
    (b'{"text": "\\u200b\\ufeff\\u2060 "}', Reason.WHITESPACE),
    (b'{"text": "a\\u0000b"}', Reason.NUL_CHARACTER),
    (b'{"text": "a\xffb"}', Reason.INVALID_UTF8),
    (b'{"text": "\\ud800"}', Reason.INVALID_UTF8),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_a_record_and_the_stream_goes_on(
    tmp_path: Path, line: bytes, reason: Reason
) -> None:
    good = jsonl({"text": "good \U0001f600"})
    records = read(write(tmp_path, "a.jsonl", good + b"\n  \n" + line + b"\r\n" + good))
    assert texts(records) == ["good \U0001f600", None, "good \U0001f600"]
    assert records[1].reason is reason
    assert records[1].message.startswith("a.jsonl, row 4: ")
    records_table(records)  # whatever is wrong with a row, it can be stored


def test_bad_text_in_parquet_and_csv(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"a\xffb", None, b"", b"\x00"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 5, raw.buffers())
    reasons = [None, Reason.INVALID_UTF8, Reason.MISSING_TEXT, Reason.EMPTY, Reason.NUL_CHARACTER]
    for kind in (broken, raw, broken.cast(pa.binary()).cast(pa.large_binary())):
        records = read(parquet(tmp_path, "a.parquet", {"text": kind, "copy": broken}))
        assert [record.reason for record in records] == reasons
        assert records_table(records)["copy"].to_pylist() == ["ok", "a\\udcffb", None, "", "\x00"]
    nested = pa.StructArray.from_arrays([broken], names=["deep"])
    inside = parquet(tmp_path, "n.parquet", {"text": raw, "nested": nested})
    with pytest.raises(JobError, match=r"keep: .*'nested' of .* that are not UTF-8 inside"):
        read(inside)
    assert len(read(inside, keep=[])) == 5
    encoded = pa.array(["x", None, "y"]).dictionary_encode()
    assert texts(read(parquet(tmp_path, "b.parquet", {"text": encoded}))) == ["x", None, "y"]
    latin = write(tmp_path, "a.csv", "text,note\ncafé,é\n".encode("latin-1"))
    (record,) = read(latin)
    assert record.reason is Reason.INVALID_UTF8
    assert records_table([record])["note"].to_pylist() == ["\\udce9"]


# --- Listing -------------------------------------------------------------------------------


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl.gz", ".hidden/h.jsonl", "_tmp/t.jsonl", "a/_SUCCESS"):
        packed = gzip.compress if name.endswith("gz") else bytes
        write(tmp_path, name, packed(jsonl({"text": name})))
    write(tmp_path, "README.md", b"not data")
    everything = ["a/1.jsonl.gz", "b/2.jsonl"]
    folder = reader(tmp_path)
    assert [file.relative for file in folder.files] == everything
    assert texts(list(folder)) == everything
    assert texts(read(f"{tmp_path}/*/*.jsonl*")) == everything
    assert texts(read(f"{tmp_path}/[ab]")) == everything
    assert texts(read([tmp_path / "b", tmp_path / "a"])) == everything
    assert texts(read([tmp_path / "b", tmp_path])) == everything  # overlapping: read once
    assert texts(read(tmp_path / "_tmp/t.jsonl")) == ["_tmp/t.jsonl"]  # asked for by name
    assert texts(read(tmp_path, limit=1)) == everything[:1]
    odd = write(tmp_path, "x[1].jsonl", jsonl({"text": "odd name"}))
    assert texts(read(odd)) == ["odd name"]


def test_equal_names_in_a_list_are_told_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{year}/x.jsonl", jsonl({"text": year})) for year in ("2024", "2023")]
    listed = reader(paths)
    assert [file.relative for file in listed.files] == ["2023/x.jsonl", "2024/x.jsonl"]
    assert len({record.record_id for record in listed}) == 2


def test_other_filesystems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus_test/sub/a.jsonl", jsonl(*ROWS))
    listed = reader("memory://corpus_test/")
    assert [(f.url, f.relative, f.size_bytes) for f in listed.files] == [
        ("memory:///corpus_test/sub/a.jsonl", "sub/a.jsonl", len(jsonl(*ROWS)))
    ]
    local = read(write(tmp_path, "sub/a.jsonl", jsonl(*ROWS)).parents[1])
    assert list(listed) == local
    memory.rm("/corpus_test", recursive=True)


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ("none.jsonl", "corpus.path", "none.jsonl': no such file or folder"),
        ("*.csv", "corpus.path", "matches no data file"),
        ("empty", "corpus.path", "matches no data file .*jsonl"),
        ("odd.dat", "corpus.format", "odd.dat says nothing about its format; .*parquet, jsonl"),
        (["a.jsonl", "a.csv"], "corpus.format", "a.csv and .*a.jsonl differ"),
        ("nope://x/y.jsonl", "corpus.path", "cannot be opened"),
    ],
)
def test_paths_that_name_no_corpus(tmp_path: Path, path: Any, key: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.jsonl", "a.csv", "odd.dat"):
        write(tmp_path, name, b"{}" if name != "a.csv" else b"x\n")
    if message == "matches no data file":
        path = "*.nothing"
    path = [tmp_path / p for p in path] if isinstance(path, list) else path
    where = path if isinstance(path, list) or "://" in path else tmp_path / path
    with pytest.raises(JobError, match=message) as caught:
        reader(where)
    assert caught.value.key == key


def test_a_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # Python's own way to say: not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(JobError, match=r"pip install 'mas_batch\[s3\]'"):
        reader("s3://bucket/x.jsonl")


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    write(tmp_path / "one", "a.jsonl", jsonl(*ROWS))
    write(tmp_path / "one", "b.jsonl", jsonl(*ROWS))
    before = reader(tmp_path / "one")
    ids = [record.record_id for record in before]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    after = reader(tmp_path / "two")
    assert after.fingerprint == before.fingerprint
    assert [record.record_id for record in after] == ids
    write(tmp_path / "two", "b.jsonl", jsonl(*ROWS, *ROWS))
    assert reader(tmp_path / "two").fingerprint != before.fingerprint
    assert [record.record_id for record in read(tmp_path / "two")][:6] == ids


# --- Columns and ids -----------------------------------------------------------------------


def test_ids_from_position_are_fixed_for_ever(tmp_path: Path) -> None:
    (record, *_) = read(write(tmp_path, "a.jsonl", jsonl(*ROWS)))
    assert record.record_id == "e3613fd84cfe70c069b8c87a"


def test_given_ids_references_and_contexts(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "key": 7, "gold": 3.5, "ctx": {"a": [1]}},
        {"text": "b", "key": "x", "gold": None},
    ]
    file = write(tmp_path, "a.jsonl", jsonl(*rows))
    first, second = read(file, id="key", reference="gold", context="ctx")
    assert (first.record_id, first.reference, first.context) == ("7", "3.5", '{"a": [1]}')
    assert (second.record_id, second.reference, second.context) == ("x", None, None)
    assert first.passthrough == second.passthrough == {}
    sheet = write(tmp_path, "a.csv", b"text,key,gold\na,7,\n")
    (record,) = read(sheet, id="key", reference="gold")
    assert (record.record_id, record.reference) == ("7", None)


@pytest.mark.parametrize(
    ("row", "what"), [({"text": "b"}, "null or missing"), ({"text": "b", "key": " "}, "empty")]
)
def test_a_row_without_an_id_stops_the_run(tmp_path: Path, row: Any, what: str) -> None:
    file = write(tmp_path, "a.jsonl", jsonl({"text": "a", "key": "1"}, row))
    with pytest.raises(JobError, match=rf"a.jsonl, row 2: column 'key' is {what}"):
        read(file, id="key")


def test_a_doubled_id_names_both_places(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", jsonl(*({"text": "x", "key": i} for i in range(50))))
    write(tmp_path, "b.jsonl", jsonl({"text": "y", "key": "fifty"}, {"text": "z", "key": "31"}))
    with pytest.raises(
        JobError, match=r"'31' occurs twice: .*a.jsonl, row 32 and .*b.jsonl, row 2"
    ):
        read(tmp_path, id="key")
    assert len(read(tmp_path, id="key", limit=51)) == 51


def test_equal_hashes_are_not_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = corpus_module._id_hash
    monkeypatch.setattr(corpus_module, "_id_hash", lambda identity: whole(identity)[:1] + bytes(7))
    monkeypatch.setattr(corpus_module, "_MAX_SUSPECTS", 50)
    rows = [{"text": "x", "key": i} for i in range(1000)]
    file = write(tmp_path, "a.jsonl", jsonl(*rows))
    assert len(read(file, id="key")) == 1000
    file = write(tmp_path, "a.jsonl", jsonl(*rows, rows[500]))
    with pytest.raises(JobError, match="'500' occurs twice"):
        read(file, id="key")


@pytest.mark.parametrize("key", ["text", "id", "reference", "context", "keep"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_named_with_those_there(tmp_path: Path, kind: str, key: str) -> None:
    write(tmp_path, "a.jsonl", jsonl({"text": "a", "n": 1}))
    write(tmp_path, "a.csv", b"text,n\na,1\n")
    parquet(tmp_path, "a.parquet", {"text": ["a"], "n": [1]})
    option = {key: ["nope"] if key == "keep" else "nope"}
    expected = (
        "nope" if (kind, key) == ("jsonl", "id") else "'nope' in .*columns there: 'text', 'n'"
    )
    with pytest.raises(JobError, match=expected) as caught:
        read(tmp_path / f"a.{kind}", **option)
    assert caught.value.key == f"corpus.{key}"


def test_columns_are_kept_renamed_or_refused(tmp_path: Path) -> None:
    row = {"body": "a", "text": "b", "answer": 1, "n": 2}
    file = write(tmp_path, "a.jsonl", jsonl(row))
    (record,) = read(file, text="body")
    assert record.passthrough == {"source_text": "b", "source_answer": 1, "n": 2}
    (record,) = read(file, text="body", keep=["n", "body"])
    assert record.passthrough == {"body": "a", "n": 2}
    clash = write(tmp_path, "b.jsonl", jsonl({"text": "a", "answer": 1, "source_answer": 2}))
    with pytest.raises(JobError, match="'answer' and 'source_answer' would both be carried"):
        read(clash)
    twice = write(tmp_path, "c.csv", b"text,n,n\na,1,2\n")
    with pytest.raises(JobError, match="more than one column 'n'"):
        read(twice)


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    file = parquet(tmp_path, "a.parquet", {"text": [1, 2], "body": ["a", "b"]})
    with pytest.raises(JobError, match="holds int64, not text; columns of text there: body"):
        read(file)


def test_empty_files_and_empty_corpora(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", b"")
    with pytest.raises(JobError, match=r"corpus.path: .* holds no records"):
        read(tmp_path)
    write(tmp_path, "b.jsonl", jsonl(*ROWS))
    assert len(read(tmp_path)) == 3


def test_broken_parquet_names_file_and_row(tmp_path: Path) -> None:
    file = write(tmp_path, "a.parquet", b"PAR1 not really PAR1")
    with pytest.raises(JobError, match=r"a.parquet cannot be read after row 0: Arrow"):
        read(file)


# --- Types of the carried columns ----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "typed"),
    [
        ([True, None], pa.bool_(), [True, None]),
        ([1, -5], pa.int64(), [1, -5]),
        ([2**62, 1], pa.int64(), [2**62, 1]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**62, 2.5], pa.string(), [str(2**62), "2.5"]),
        ([2**64, 1], pa.string(), [str(2**64), "1"]),
        ([1, "a", 1.0, 1e30, True], pa.string(), ["1", "a", "1.0", "1e+30", "true"]),
        ([[1, {"é": None}], "x"], pa.string(), ['[1, {"é": null}]', "x"]),
        ([None, None], pa.string(), [None, None]),
        (["\ud800"], pa.string(), ["\\ud800"]),
    ],
)
def test_json_columns_take_the_type_of_all_their_values(
    tmp_path: Path, values: list[Any], kind: pa.DataType, typed: list[Any]
) -> None:
    rows = reader(write(tmp_path, "a.jsonl", jsonl(*({"text": "x", "v": v} for v in values))))
    staged = [records_table([record]) for record in rows]
    assert rows.passthrough_schema() == pa.schema([("v", kind)])
    table = pa.concat_tables(conform(t, rows.passthrough_schema()) for t in staged)
    assert table["v"].to_pylist() == typed


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=2), SCALARS)
NUMBERS = st.integers(-9, 9) | st.floats(-9, 9)
JSON_ROWS = st.lists(
    st.dictionaries(st.sampled_from("abé"), VALUES)
    | st.dictionaries(st.sampled_from("ab"), NUMBERS),
    min_size=1,
    max_size=12,
)


@given(JSON_ROWS, st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_staging_does_not_show_how_the_corpus_was_cut(rows: list[Any], sizes: list[int]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/staging/a.jsonl", jsonl(*({"text": "x", **row} for row in rows)))
    source = reader("memory://staging/a.jsonl")
    records = list(source)
    schema = source.passthrough_schema()
    whole = conform(records_table(records), schema)
    pieces = []
    while records:
        size = sizes[len(pieces) % len(sizes)]
        through = io.BytesIO()
        pq.write_table(records_table(records[:size]), through)
        pieces.append(conform(pq.read_table(through), schema))
        records = records[size:]
    together = pa.concat_tables(pieces)
    assert together.schema == whole.schema == pa.schema([*RECORD_FIELDS, *schema])
    assert repr(together.to_pylist()) == repr(whole.to_pylist())  # repr: NaN, and -0.0 is not 0.0
    for name in schema.names:
        for row, value in zip(rows, whole[name].to_pylist(), strict=True):
            assert same_value(row.get(name), value)


def same_value(given: Any, typed: Any) -> bool:
    if isinstance(given, str) or given is None:
        return (given is None and typed is None) or typed == given
    if isinstance(typed, str):
        return repr(json.loads(typed)) == repr(json.loads(json.dumps(given)))
    if isinstance(given, float) and math.isnan(given):
        return math.isnan(typed)
    return bool(typed == given)


def test_parquet_types_pass_unchanged(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 6, tzinfo=datetime.UTC)
    columns = {
        "text": pa.array(["a", "b", "c"]),
        "nanos": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
        "time": pa.array([1, 2, 3], pa.time64("ns")),
        "day": pa.array([day, None, day], pa.timestamp("us", "Europe/Paris")),
        "price": pa.array([decimal.Decimal("1.10"), None, None], pa.decimal128(9, 2)),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "nested": pa.array(
            [{"a": [1, 2]}, None, {"a": []}], pa.struct([("a", pa.list_(pa.int8()))])
        ),
        "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int16())),
        "view": pa.array(["a", None, "c"], pa.string_view()),
        "raw": pa.array([b"\xff", None, b""]),
    }
    source = reader(parquet(tmp_path, "a.parquet", columns))
    records = list(source)
    schema = source.passthrough_schema()
    assert source.has_schema
    expected = pa.table({**columns, "view": columns["view"].cast(pa.string())})
    expected = expected.drop_columns(["text"])
    assert schema == expected.schema
    for picked in ([0, 1, 2], [2, 0]):
        table = conform(records_table([records[i] for i in picked], schema), schema)
        for name in expected.column_names:
            assert (
                table[name]
                .cast(expected[name].type)
                .equals(
                    pa.chunked_array([expected[name].combine_chunks()[i : i + 1] for i in picked])
                )
            )
    assert records[0].passthrough["price"] == decimal.Decimal("1.10")


def test_parquet_files_of_unlike_types(tmp_path: Path) -> None:
    folder = tmp_path / "same"
    never_null = pa.field("n", pa.int32(), nullable=False)
    narrow = pa.table({"n": pa.array([1], pa.int32())}, schema=pa.schema([never_null]))
    folder.mkdir()
    pq.write_table(narrow.append_column("text", pa.array(["a"])), folder / "a.parquet")
    parquet(folder, "b.parquet", {"text": ["b"], "n": pa.array([2**40]), "m": [True]})
    source = reader(folder)
    staged = [records_table([record]) for record in source]
    schema = source.passthrough_schema()
    assert schema == pa.schema([("n", pa.int64()), ("m", pa.bool_())])
    table = pa.concat_tables(conform(t, schema) for t in staged)
    assert table.select(["n", "m"]).to_pylist() == [{"n": 1, "m": None}, {"n": 2**40, "m": True}]
    parquet(folder, "c.parquet", {"text": ["c"], "n": ["three"]})
    with pytest.raises(
        JobError, match=r"c.parquet does not fit the files before it: .*int64 vs string"
    ):
        read(folder)


def test_conform_refuses_what_it_would_lose() -> None:
    table = records_table([Record("r", "t", passthrough={"n": 2**60 + 1})])
    with pytest.raises(RunError, match="staged column 'n' is not in the corpus' schema"):
        conform(table, pa.schema([]))
    with pytest.raises(RunError, match="column 'n' cannot become double"):
        conform(table, pa.schema([("n", pa.float64())]))
