"""A run of mas_batch on an embedded cluster: a way of `peers.py`.

Timed is from the moment when the last host holds its engine to the published manifest.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mas_batch
from mas_batch.events import Event, HostReady, RunFinished
from mas_batch.job_file import check_job


def make_job(settings: dict[str, Any], folder: str) -> Any:
    agent = {
        "name": "a",
        "model": settings["model"],
        "engine": settings["engine"],
        "dtype": settings["dtype"],
        "options": settings["options"],
        "count": settings["hosts"],
        "threads": settings["threads"] // settings["hosts"],
    }
    return check_job(
        {
            "name": "peers",
            "corpus": {
                "path": settings["documents"],
                "id": "id",
                "limit": len(settings["prompts"]),
            },
            "task": {"kind": "summarize", "max_new_tokens": settings["new_tokens"]},
            "agents": [agent],
            "merge": {"method": "vote"},
            "partition": {"max_records": 16, "max_tokens": 1_000_000},
            "output": {"path": folder},
            "cluster": {"dashboard_address": None},
        }
    )


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    times: dict[type, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, HostReady | RunFinished):
            times[type(event)] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        summary = mas_batch.run(make_job(settings, folder), emit=note)
        rows = mas_batch.open_run(summary.run).arrow()
    ids, answers = rows["record_id"].to_pylist(), rows["answer"].to_pylist()
    by_id = dict(zip(ids, answers, strict=True))
    ready = times[HostReady]
    answer = {
        "load_s": ready - begun,
        "seconds": times[RunFinished] - ready,
        "texts": [by_id[prompt["record_id"]] or "" for prompt in settings["prompts"]],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
