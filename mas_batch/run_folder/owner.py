"""Which process holds a run's lock, and whether it still runs."""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

_SAME_START_S = 2.0
"""Starts this close, under one process id, are one process: a start is read to the second, and an
id is not given again within seconds."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds, or held, a generation of a lock (see `lock`)."""

    generation: int
    token: str
    """Random; differs from that of an owner of the same generation in a run removed meanwhile."""
    host: str
    boot_id: str | None
    """Changes when the host is booted; None where the system has none."""
    pid_namespace: str | None
    """Containers may share their host's name, but each numbers its own processes."""
    pid: int
    started_s: float
    """When the process started: seconds since boot where there is a `boot_id`, else since 1970."""
    user: str
    since: str
    """When the process took the lock, by its own clock; for people."""

    @classmethod
    def this_process(cls, generation: int) -> Owner:
        """Describe the calling process as the owner of a generation."""
        boot_id = _boot_id()
        process = psutil.Process()
        return cls(
            generation=generation,
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot_id=boot_id,
            pid_namespace=_pid_namespace(),
            pid=process.pid,
            started_s=_started_s(process, boot_id),
            user=process.username(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_dead(self, newcomer: Owner) -> bool | None:
        """Say whether the process has ended, as `newcomer` can tell from where it runs.

        Returns:
            None if `newcomer` cannot tell: the process is on another host, in another container,
            or of another user, whose processes a system may hide.
        """
        if self.host != newcomer.host:
            return None
        if self.boot_id != newcomer.boot_id:
            return True
        if (self.pid_namespace, self.user) != (newcomer.pid_namespace, newcomer.user):
            return None
        try:
            process = psutil.Process(self.pid)
            is_another = abs(_started_s(process, self.boot_id) - self.started_s) > _SAME_START_S
            # A zombie has ended; its parent has only not read its exit status yet.
            return is_another or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True

    def is_same_process(self, other: Owner) -> bool:
        """Say whether both are generations of one process."""
        return self.pid == other.pid and self.is_dead(other) is False

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host} (since {self.since})"


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _started_s(process: psutil.Process, boot_id: str | None) -> float:
    """Return when a process started, where possible independent of changes of the clock."""
    created: float = process.create_time()
    return created if boot_id is None else created - psutil.boot_time()
