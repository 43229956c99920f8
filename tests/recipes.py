"""The recipes of `docs/scheduling.md` and `docs/deploy/`, as tests run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs/deploy"
BIN = Path(sys.executable).parent
PATH = f"{BIN}:{os.environ['PATH']}"
"""Finds this environment's commands first, as an activated one would."""

JOB: dict[str, Any] = {
    "name": "nightly",
    "corpus": {"path": "corpus.jsonl", "id": "id"},
    "task": {"kind": "summarize", "max_new_tokens": 4},
    "agents": [{"name": "plain", "model": "echo"}],
    "merge": {"method": "vote"},
    "partition": {"max_records": 3},
    "output": {"path": "runs"},
    "cluster": {"dashboard_address": None},
}


def tool(name: str, install: str) -> str:
    """Return the path of a program; the test is skipped where it is not installed."""
    path = shutil.which(name, path=PATH)
    if path is None:
        pytest.skip(f"needs {name}: {install}")
    return path


def block(heading: str, language: str) -> str:
    """Return the one block of code of that language under a heading of the page."""
    page = (ROOT / "docs/scheduling.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(found)


def write_job(folder: Path, num_records: int = 12, **sections: Any) -> Path:
    """Write a small job and its corpus; keywords replace sections."""
    rows = [{"id": f"r{i}", "text": f"record {i} has a few words"} for i in range(num_records)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**JOB, **sections}))
    return file
