"""What the submitting process tells the scheduler: events, or the state that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from mas_batch import events as kinds
from mas_batch.events import AgentReady, Event, PartitionAsked, RunStarted
from mas_batch.monitor.live import LiveRun
from mas_batch.safe_text import printable, without_credentials

VERSION = 1
"""Of the message and of `LiveRun`; a scheduler with another one takes nothing."""

MAX_TEXT = 500
"""Characters of an error's message that are sent."""


@dataclass(frozen=True, slots=True)
class Message:
    """A piece of the feed, which a scheduler can check against what it has."""

    run: str
    execution: str
    sent_at: float
    """Unix time on the submitting process's clock, as all times in it."""
    num_before: int
    """Events before these; a scheduler that has folded another number asks for the state."""
    events: list[tuple[float, dict[str, Any]]]
    """(Unix time, `Event.to_dict()`)."""
    state: LiveRun | None = None
    """After `events`, which are then empty."""
    failed: str | None = None
    """The execution has ended by this error."""

    def to_json(self) -> bytes:
        """Encode it."""
        return _MESSAGE.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> Message:
        """Decode it.

        Raises:
            ValueError: it is none.
        """
        return _MESSAGE.validate_json(data)


_MESSAGE = TypeAdapter(Message)


def slim(event: Event) -> Event:
    """Return the event without what the fold has no use for, its texts made `plain`."""
    values = ((f.name, getattr(event, f.name)) for f in fields(event))
    texts: dict[str, Any] = {name: plain(value) for name, value in values if isinstance(value, str)}
    match event:
        case PartitionAsked():
            return replace(event, **texts, candidates={})
        case AgentReady():
            facts = {key: plain(str(event.engine.get(key, ""))) for key in ("engine", "device")}
            return replace(event, **texts, engine=facts)
        case RunStarted():
            return replace(event, **texts, earlier_runs=())
    return replace(event, **texts)


def plain(text: str) -> str:
    """Return a text as anyone may see it on the dashboard: short, and without credentials."""
    shown = printable(without_credentials(text))[:MAX_TEXT]
    return shown.encode(errors="replace").decode()  # a lone surrogate, out of a file's name


def decode(events: Sequence[tuple[float, dict[str, Any]]]) -> list[tuple[float, Event]]:
    """Return the events of a message; one of a kind that is unknown here is a bare `Event`.

    Raises:
        ValueError: an event has not the fields of its kind.
    """
    return [(at, _decode(facts)) for at, facts in events]


def _decode(facts: dict[str, Any]) -> Event:
    values = {name: value for name, value in facts.items() if name != "event"}
    event: Event = _adapter(facts["event"]).validate_python(values)
    return event


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS.get(name, Event))


_KINDS = {
    name: kind
    for name, kind in vars(kinds).items()
    if isinstance(kind, type) and issubclass(kind, Event)
}
