"""Sends a run's events to the scheduler, for its dashboard, from a thread of its own.

The run neither waits for it nor fails by it. What the scheduler has missed (it did not answer, it
was told of the run too late) it gets as one copy of the state that the events come to.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from distributed import Client

from mas_batch.events import Event
from mas_batch.job import Job
from mas_batch.monitor.board import TAKEN, WANTED
from mas_batch.monitor.dashboard.plugin import HANDLER, AgentsDashboard
from mas_batch.monitor.fleet import LiveAgent
from mas_batch.monitor.live import LiveRun
from mas_batch.monitor.messages import VERSION, Message, plain, slim
from mas_batch.monitor.rings import History

logger = logging.getLogger(__name__)

EVERY_S = 0.5
MAX_EVENTS = 200
"""Per message; where more have come, the state they come to is the shorter message."""
_SIGN_OF_LIFE_S = 5.0
_CALL_S = 5.0
_LAST_WORDS_S = 3.0


def introduce(job: Job, name: str, execution: str, at: float) -> LiveRun:
    """Return the state of a run of which nothing has happened yet."""
    agents = {
        agent.name: LiveAgent(
            agent.name,
            model=plain(agent.model),
            capabilities=list(agent.capabilities or (job.task.kind,)),
            num_wanted=agent.count,
        )
        for agent in job.agents
    }
    window = 2 if job.routing.window is None else job.routing.window
    kind, policy = job.task.kind, job.routing.policy
    return LiveRun(
        name, execution, job.name, kind, policy, window, at, agents, {}, History(start=at)
    )


class Feed:
    """A reader of events that passes them on; a context manager."""

    def __init__(self, client: Client, run: LiveRun) -> None:
        self._client = client
        self._run = run
        self._events: deque[tuple[float, Event]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._failed: str | None = None
        self._state_wanted = True
        self._last_sent = 0.0
        self._given_up = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="mas-batch-feed")

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._failed = plain(f"{type(error).__name__}: {error}")
        self._closing = True
        self._wake.set()
        self._thread.join(_LAST_WORDS_S)

    def __call__(self, event: Event) -> None:
        """Take an event, to be sent within half a second."""
        if not self._given_up:
            self._events.append((time.time(), slim(event)))
            if len(self._events) >= MAX_EVENTS:
                self._wake.set()

    def _work(self) -> None:
        try:
            # Where the plugin is (by the preload, by an earlier run) this does nothing.
            self._client.register_plugin(AgentsDashboard())
            while not self._closing:
                self._wake.wait(EVERY_S)
                self._wake.clear()
                self._send()
            self._send()
            if self._state_wanted:  # the last words were not heard
                self._send()
        except Exception as error:  # a scheduler with an older package, or that lets no plugin in
            logger.debug("the scheduler shows no agents: %s", error)
        finally:
            self._given_up = True
            self._events.clear()

    def _send(self) -> None:
        """Fold what has come and send it, if there is something to be said.

        Raises:
            Exception: the scheduler does not want messages of this version.
        """
        batch = [self._events.popleft() for _ in range(len(self._events))]
        num_before = self._run.num_events
        for at, event in batch:
            self._run.fold(at, event)
        is_due = time.monotonic() - self._last_sent >= _SIGN_OF_LIFE_S
        if not (batch or is_due or self._state_wanted or self._failed):
            return
        by_events = not self._state_wanted and len(batch) <= MAX_EVENTS
        if by_events and self._deliver(self._message(num_before, batch)) != WANTED:
            return
        self._deliver(self._message(state=self._run))

    def _message(
        self,
        num_before: int = 0,
        batch: Sequence[tuple[float, Event]] = (),
        state: LiveRun | None = None,
    ) -> Message:
        return Message(
            run=self._run.name,
            execution=self._run.execution,
            sent_at=time.time(),
            num_before=num_before,
            events=[(at, event.to_dict()) for at, event in batch],
            state=state,
            failed=self._failed,
        )

    def _deliver(self, message: Message) -> str | None:
        """Return the scheduler's reply; None if there was none: it may have it, or not."""
        call = getattr(self._client.scheduler, HANDLER)
        try:
            reply: str = self._client.sync(
                call, version=VERSION, data=message.to_json(), callback_timeout=_CALL_S
            )
        except (OSError, TimeoutError) as error:
            logger.debug("the scheduler has not taken news of the run: %s", error)
            self._state_wanted = True
            return None
        self._last_sent = time.monotonic()
        self._state_wanted = reply != TAKEN
        return reply
