"""Scratch folders: removed at the end, and by the next process after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mas_batch.scratch import scratch_folder

HOLD = """
import time
from mas_batch.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "spill").mkdir()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_killed_process_leaves_its_scratch_folder_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "mas-batch-of-somebody").mkdir()  # it names no process
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    try:
        with scratch_folder() as own:
            assert own.stat().st_mode & 0o777 == 0o700
            assert {left, own} <= set(tmp_path.iterdir()), "the other process lives"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert left.exists()
    with scratch_folder() as own:
        assert set(tmp_path.iterdir()) == {own, tmp_path / "mas-batch-of-somebody"}
    assert not own.exists()
