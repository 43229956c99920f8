"""One submitter per run, and per job: a lock that a killed owner does not leave locked.

    locks/000001.json        the owner; created only if absent, so that one of several wins
    locks/000001.beat.json   the owner's heartbeat: a counter, and at the end the mark `released`

The owner of the highest generation holds the run until it has released it. A process that finds the
owner dead creates the next generation. An owner of the same user on the same boot of the same host
is looked up by its process id; any other owner is judged by its heartbeat, which the newcomer
watches for a while by its own clock, so that clocks need not agree. Host names must differ among
the machines that share a store.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from mas_batch.errors import OutputError, RunError, RunLockedError
from mas_batch.run_folder.owner import Owner
from mas_batch.run_folder.storage import Store

logger = logging.getLogger(__name__)

FOLDER = "locks"
"""Folder of a run that holds its lock."""

_LOCK = re.compile(r"(\d{6})\.json")
_HELD: set[str] = set()
"""Tokens of the locks that this process holds: that it is alive does not say that it holds one."""

_JOBS = ".locks"
"""Folder beside the runs that holds the locks of jobs; no job's name begins with a dot."""


def job_lock(output: Store, job_name: str) -> RunLock:
    """Return the lock of all runs of a job of that name in that output."""
    return RunLock(output.child(f"{_JOBS}/{job_name}"), what="job")


class RunLock:
    """Holds a run for this process while its `with` block lasts.

    Args:
        store: the run's folder, or the folder of whatever else the lock is for (`what`).
        beat_s: seconds between two heartbeats.
        patience_s: seconds without a heartbeat after which the lock of an owner that cannot be
            looked up is taken over; and seconds for which this process may fail to write its own
            heartbeat. Must be well above every submitter's `beat_s`.
        what: a noun for what is held, for messages.
        within: a wider lock that this process holds too; `check` checks both.

    Raises:
        RunLockedError: on entering, if another process works on the run.
        OutputError: on entering, if the lock cannot be written.
    """

    def __init__(
        self,
        store: Store,
        beat_s: float = 5.0,
        patience_s: float = 20.0,
        *,
        what: str = "run",
        within: RunLock | None = None,
    ) -> None:
        self._store = store
        self._what = what
        self._within = within
        self._beat_s = beat_s
        self._patience_s = patience_s
        self._own = Owner.this_process(0)
        self._count = 0
        self._last_beat = time.monotonic()
        self._error: RunError | None = None
        self._lost: str | None = None
        self._ended = threading.Event()
        self._beating = threading.Lock()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="run-lock")

    def __enter__(self) -> Self:
        try:
            self._acquire()
            self._last_beat = time.monotonic()
            self._beat()
            self._thread.start()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def check(self) -> None:
        """Make sure that this process still holds the run; cheap enough for every turn of a loop.

        Raises:
            RunLockedError: another process has taken the run over, or the lock was removed.
            OutputError: the heartbeat could not be written for `patience_s`: other processes may
                soon take this one for dead.
        """
        if self._within is not None:
            self._within.check()
        if self._since_beat_s > self._patience_s:
            self._beat()  # this process was stopped, or the filesystem failed: try again now
        if self._lost is not None:
            raise RunLockedError(self._lost)
        if self._error is not None and self._since_beat_s > self._patience_s:
            raise OutputError(
                f"the heartbeat of the {self._what}'s lock fails for {self._since_beat_s:.0f} s: "
                f"{self._error}"
            ) from self._error

    def remove_run(self) -> None:
        """Remove the run's whole folder, the lock last.

        Raises:
            RunLockedError: another process has taken the run over; nothing is removed.
        """
        self._stop_beating()
        self._beat()
        self.check()
        for name in self._store.list("") - {FOLDER}:
            self._store.remove_folder(name)
        self._store.remove_folder("")

    # Taking the lock

    def _acquire(self) -> None:
        """Create the generation after the highest, if its owner has released it or is dead."""
        last = self._newest_owner()
        if last is not None and not self._is_released_or_dead(last):
            raise self._locked_error(last)
        self._own = Owner.this_process(last.generation + 1 if last else 1)
        _HELD.add(self._own.token)
        name = _lock_name(self._own.generation)
        content = json.dumps(asdict(self._own), indent=1, ensure_ascii=False)
        is_created = self._store.commit(name, content.encode())
        # Meanwhile other processes may have taken that generation, released it and removed its
        # files, or removed the run and begun it anew: then this process does not hold the lock.
        newest = self._newest_owner()
        before = self._read_owner(last.generation) if last else None
        if newest is None or newest.token != self._own.token or before != last:
            if is_created:
                self._store.remove(name)
            raise self._locked_error(newest)
        if last is not None:
            self._remove_before(self._own.generation)

    def _is_released_or_dead(self, last: Owner) -> bool:
        """Say whether the owner has released its lock, or can do no more work."""
        beat = self._read_beat(last)
        if beat is not None and beat["released"]:
            return True
        if last.is_same_process(self._own):
            return last.token not in _HELD  # `released` could not be written: a full disk, say
        is_dead = last.is_dead(self._own)
        is_dead_or_silent = self._has_stopped(last, beat) if is_dead is None else is_dead
        if is_dead_or_silent:
            message = "%s has left this %s without releasing its lock; taking it over"
            logger.info(message, last, self._what)
        return is_dead_or_silent

    def _has_stopped(self, last: Owner, beat: dict[str, Any] | None) -> bool:
        """Watch a heartbeat for `patience_s`; say whether it has stopped or says `released`."""
        logger.info("watching for %g s whether %s is alive", self._patience_s, last)
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat_s))
            now = self._read_beat(last)
            if now != beat:
                return now is not None and bool(now["released"])
        return True

    def _locked_error(self, owner: Owner | None) -> RunLockedError:
        who = "another process" if owner is None else str(owner)
        return RunLockedError(
            f"{self._store.location('')}: {who} works on this {self._what}; "
            "wait until it is done, or end it: then the same command resumes"
        )

    # The lock's files

    def _newest_owner(self) -> Owner | None:
        """Return the owner of the highest generation, whether or not it has released it."""
        for _ in range(2):  # a listed file may be gone: its remover has created a newer generation
            matches = (_LOCK.fullmatch(name) for name in self._store.list(FOLDER))
            for number in sorted((int(match[1]) for match in matches if match), reverse=True):
                if (owner := self._read_owner(number)) is not None:
                    return owner
        return None

    def _read_owner(self, generation: int) -> Owner | None:
        facts = self._read_json(_lock_name(generation), Owner.__dataclass_fields__)
        return None if facts is None else Owner(**facts)

    def _read_beat(self, owner: Owner) -> dict[str, Any] | None:
        """Return the owner's last heartbeat; None: it has not written any yet."""
        beat = self._read_json(_beat_name(owner.generation), ("token", "count", "released"))
        return beat if beat is not None and beat["token"] == owner.token else None

    def _read_json(self, name: str, keys: Iterable[str]) -> dict[str, Any] | None:
        try:
            facts = json.loads(self._store.read_bytes(name))
        except FileNotFoundError:
            return None
        except ValueError:
            facts = None
        if not isinstance(facts, dict) or facts.keys() != set(keys):
            raise RunError(
                f"{self._store.location(name)} is no lock of this version of mas_batch; if no "
                "process works on this run, remove the file"
            )
        return facts

    def _remove_before(self, generation: int) -> None:
        for name in self._store.list(FOLDER):
            number = name.partition(".")[0]
            if number.isdigit() and int(number) < generation:
                self._store.remove(f"{FOLDER}/{name}")

    # Holding and releasing the lock

    @property
    def _since_beat_s(self) -> float:
        return time.monotonic() - self._last_beat

    def _keep_beating(self) -> None:
        while self._lost is None and not self._ended.wait(self._beat_s):
            self._beat()

    def _beat(self, *, released: bool = False) -> None:
        """Write the heartbeat if this process still holds the lock; `check` reports problems."""
        with self._beating:
            try:
                began = time.monotonic()  # the process may be stopped between any two lines
                self._lost = self._lost or self._why_lost()
                if self._lost is None:
                    self._count += 1
                    beat = {"token": self._own.token, "count": self._count, "released": released}
                    self._store.replace(_beat_name(self._own.generation), json.dumps(beat).encode())
                    self._last_beat, self._error = began, None
            except RunError as error:
                self._error = error
                logger.debug("no heartbeat: %s", error)

    def _why_lost(self) -> str | None:
        """Say how this process lost the lock; None: it holds the lock."""
        newest = self._newest_owner()
        if newest is not None and newest.token == self._own.token:
            return None
        if newest is None:
            what = f"the {self._what}'s lock was removed during this run"
        else:
            what = f"this {self._what} was taken over by {newest}"
        return f"{self._store.location('')}: {what}"

    def _stop_beating(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _release(self) -> None:
        self._stop_beating()
        self._beat(released=True)
        _HELD.discard(self._own.token)


def _lock_name(generation: int) -> str:
    return f"{FOLDER}/{generation:06d}.json"


def _beat_name(generation: int) -> str:
    return f"{FOLDER}/{generation:06d}.beat.json"
