"""Which run of a job is the last, whatever the clocks said."""

from __future__ import annotations

import base64
from pathlib import Path

import pyarrow as pa
import pytest

from mas_batch.incremental import last_published
from mas_batch.records import PLAN
from mas_batch.run_folder.manifest import write_manifest
from mas_batch.run_folder.names import FORMAT
from mas_batch.run_folder.plan import _PASSTHROUGH
from mas_batch.run_folder.storage import Store

EARLY, NOON, LATE = (f"2026-01-01T{hour}:00:00+00:00" for hour in ("01", "12", "23"))


def publish(output: Store, run: str, finished: str, since: str | None = None) -> None:
    store = output.child(f"job-{run * 16}")
    encoded = base64.b64encode(pa.schema([]).serialize().to_pybytes())
    plan = PLAN.empty_table().replace_schema_metadata({_PASSTHROUGH: encoded})
    store.commit_table("plan.parquet", plan)
    facts = {"since": {"run": f"job-{since * 16}"}} if since else {}
    name = f"job-{run * 16}"
    write_manifest(store, {"format": FORMAT, "run": name, "finished": finished, **facts})


@pytest.mark.parametrize(
    ("runs", "last"),
    [
        ([("a", LATE, None), ("b", EARLY, "a")], "b"),  # the clock was set back
        ([("a", LATE, None), ("b", NOON, "a"), ("c", EARLY, "b")], "c"),
        ([("a", EARLY, None), ("b", LATE, None)], "b"),  # without `since` the clock decides
        ([("a", EARLY, None), ("b", LATE, "a"), ("c", NOON, "a")], "b"),
        ([("b", LATE, "a"), ("c", EARLY, "b")], "c"),  # the first run was removed
    ],
)
def test_the_last_run_is_the_one_that_none_was_made_after(
    tmp_path: Path, runs: list[tuple[str, str, str | None]], last: str
) -> None:
    output = Store(str(tmp_path))
    for run in runs:
        publish(output, *run)
    found = last_published(output, "job", "job-" + "f" * 16)
    assert found is not None
    assert found.name == f"job-{last * 16}"
