"""Sends the scheduler snapshots of a run, for its dashboard, from a thread of its own.

The run neither waits for that nor fails by it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from distributed import Client

from mas_batch.agents.posts import posts_of
from mas_batch.dask_compat import call_scheduler
from mas_batch.events import Event
from mas_batch.job import Job
from mas_batch.monitor.dashboard.plugin import HANDLER, AgentsDashboard
from mas_batch.monitor.fleet import LiveAgent, LivePost
from mas_batch.monitor.fold import Fold, public_text
from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.rings import Timeline
from mas_batch.monitor.snapshot import VERSION, Snapshot

logger = logging.getLogger(__name__)

EVERY_S = 0.5
_SIGN_OF_LIFE_S = 5.0
_CALL_S = 5.0
_LAST_WORDS_S = 3.0


def introduce(job: Job, name: str, execution: str, at: float) -> LiveRun:
    """Return a run of which nothing has happened yet."""
    agents = {
        agent.name: LiveAgent(
            agent.name,
            model=public_text(agent.model),
            capabilities=list(agent.capabilities or (job.task.kind,)),
        )
        for agent in job.agents
    }
    posts = {p.name: LivePost(p.name, list(p.agents), p.wanted) for p in posts_of(job)}
    return LiveRun(
        name,
        execution,
        job.name,
        task=job.task.kind,
        policy=job.routing.policy,
        window=job.routing.window or 0,
        started=at,
        posts=posts,
        agents=agents,
        hosts={},
        history=Timeline(start=at),
    )


class Feed:
    """A reader of events that sends what they come to; a context manager."""

    def __init__(self, client: Client, run: LiveRun) -> None:
        self._client = client
        self._run = run
        self._fold = Fold(run)
        self._events: deque[tuple[float, Event]] = deque()
        self._closing = threading.Event()
        self._error: str | None = None
        self._num_sent = 0
        self._last_heard: float | None = None
        """When the scheduler last answered; None: it must be sent the whole state again."""
        self._given_up = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="mas-batch-feed")

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._error = public_text(f"{type(error).__name__}: {error}")
        self._closing.set()
        self._thread.join(_LAST_WORDS_S)

    def __call__(self, event: Event) -> None:
        """Take an event; the scheduler hears of it within half a second."""
        if not self._given_up:
            self._events.append((time.time(), event))

    def _work(self) -> None:
        try:
            # Where the plugin is (by the preload, by an earlier run) this does nothing.
            self._client.register_plugin(AgentsDashboard())
            while not self._closing.wait(EVERY_S):
                self._send()
            self._send()
            if self._last_heard is None:  # the last words were not heard
                self._send()
        except Exception as error:  # a scheduler with an older package, or that lets no plugin in
            logger.debug("the scheduler shows no agents: %s", error)
        finally:
            self._given_up = True
            self._events.clear()

    def _send(self) -> None:
        """Fold what has come and send a snapshot, if the scheduler is to hear something.

        Raises:
            Exception: the scheduler does not want snapshots of this version.
        """
        events = [self._events.popleft() for _ in range(len(self._events))]
        for at, event in events:
            self._fold.take(at, event)
        if self._error is not None:
            self._fold.close(time.time(), self._error)
        is_silent = (
            self._last_heard is None or time.monotonic() - self._last_heard >= _SIGN_OF_LIFE_S
        )
        if events or is_silent or self._error is not None:
            self._deliver()

    def _deliver(self) -> None:
        self._num_sent += 1
        data = Snapshot(self._num_sent, time.time(), self._run).to_json()
        try:
            call_scheduler(self._client, HANDLER, _CALL_S, version=VERSION, data=data)
        except (OSError, TimeoutError) as error:
            logger.debug("the scheduler has not taken a snapshot of the run: %s", error)
            self._last_heard = None
        else:
            self._last_heard = time.monotonic()
