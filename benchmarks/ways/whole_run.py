"""A run of mas_batch on an embedded cluster: a way of `peers.py`.

Timed is from the moment when the last host holds its engine to the published manifest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from timed_run import timed_run

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
    with tempfile.TemporaryDirectory() as folder:
        run = timed_run(make_job(settings, folder))
    answer = {
        "load_s": run.load_s,
        "seconds": run.seconds,
        "texts": [run.answers[prompt["record_id"]] or "" for prompt in settings["prompts"]],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
