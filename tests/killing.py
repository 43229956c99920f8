"""Runs a job in a process of its own that ends itself with SIGKILL at one operation of its storage.

All of a run happens in that process, its workers are threads: so every file that a run commits,
replaces or removes is an operation, whoever asks for it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE_S

MOMENTS = ("before", "inside", "after")
"""When it ends itself: `inside` is between the temporary file and its name."""
OPERATIONS = ("commit", "replace", "remove", "remove_folder")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "mas_batch.pipeline", "tests.clusters"])


@dataclass(frozen=True)
class Kill:
    """Where a process ends itself."""

    operation: int
    """Counted from 0."""
    moment: str


def begin(
    folder: Path,
    *overrides: str,
    kill: Kill | None = None,
    retry: bool = False,
    broken: Sequence[str] = (),
) -> BaseProcess:
    """Begin to submit `folder`/job.yaml in a process that may kill itself.

    Args:
        retry: ask again for what failed.
        broken: texts for which every agent fails.
    """
    arguments = (folder, overrides, kill, retry, tuple(broken))
    process = _CONTEXT.Process(target=_submit, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """Wait for its end; returns the exit code, negative for a signal."""
    process.join(PATIENCE_S)
    assert process.exitcode is not None, "it did not end"
    return process.exitcode


def count_operations(folder: Path) -> int:
    """Return how many operations the last process of this folder made."""
    return int((folder / "operations").read_text())


def _submit(
    folder: Path, overrides: Sequence[str], kill: Kill | None, retry: bool, broken: Sequence[str]
) -> None:
    from mas_batch import pipeline
    from mas_batch.engines.echo import EchoEngine
    from mas_batch.errors import RunLockedError
    from mas_batch.job_file import load_job
    from mas_batch.run_folder.storage import Store
    from tests.clusters import summarizers

    os.chdir(folder)
    counter = _Counter(kill)
    for name in OPERATIONS:
        setattr(Store, name, counter.counted(getattr(Store, name)))
    Store._write_temporary = counter.after_writing(Store._write_temporary)  # type: ignore[method-assign]
    if broken:
        EchoEngine._fault = (  # type: ignore[method-assign]
            lambda self, request: "error" if request.text in broken else None
        )
    try:
        job = load_job("job.yaml", overrides)
        with summarizers(len(job.agents), job.task.kind) as client:
            pipeline.run(job, client=client, retry_failed=retry)
    except RunLockedError:
        os._exit(4)
    Path("operations").write_text(str(counter.number))
    os._exit(0)


class _Counter:
    def __init__(self, kill: Kill | None) -> None:
        self.number = 0
        self._kill = kill
        self._lock = threading.Lock()
        self._here = threading.local()

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(operation)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._here.number = number = self.number
                self.number += 1
            self._end_if(number, "before")
            done = operation(*args, **kwargs)
            self._end_if(number, "after")
            return done

        return run

    def after_writing(self, write: Callable[..., Path]) -> Callable[..., Path]:
        @wraps(write)
        def run(*args: Any, **kwargs: Any) -> Path:
            written = write(*args, **kwargs)
            self._end_if(getattr(self._here, "number", -1), "inside")
            return written

        return run

    def _end_if(self, number: int, moment: str) -> None:
        if self._kill == Kill(number, moment):
            os.kill(os.getpid(), signal.SIGKILL)


def some_kills(num_operations: int, every: int, rng: random.Random) -> list[Kill]:
    """Choose every n-th operation, from a first one by lot, each at a moment by lot."""
    chosen = range(rng.randrange(every), num_operations, every)
    return [Kill(number, rng.choice(MOMENTS)) for number in chosen]
