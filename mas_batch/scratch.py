"""Scratch folders of processes: the next process removes what a killed one has left."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mas_batch.run_folder.owner import Owner

_PREFIX = "mas-batch-"
_OWNER = "owner.json"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new private folder for this process, removed in the end; abandoned ones go now."""
    own = Owner.this_process(0)
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _is_abandoned(folder, own):
            shutil.rmtree(folder, ignore_errors=True)  # another process may do the same
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        (Path(name) / _OWNER).write_text(json.dumps(asdict(own)))
        yield Path(name)


def _is_abandoned(folder: Path, newcomer: Owner) -> bool:
    """Say whether its process has ended; a folder that names no process is left alone."""
    try:
        owner = Owner(**json.loads((folder / _OWNER).read_text()))
        return owner.is_dead(newcomer) is True
    except (OSError, ValueError, TypeError):
        return False
