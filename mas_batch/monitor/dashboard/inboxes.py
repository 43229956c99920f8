"""Which scheduler of this process has which inbox: how the page and the metrics find theirs."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from mas_batch.monitor.inbox import Inbox

_INBOXES: WeakKeyDictionary[Any, Inbox] = WeakKeyDictionary()


def add_inbox(scheduler: Any) -> Inbox:
    """Give a scheduler an empty inbox, in place of any it had."""
    inbox = _INBOXES[scheduler] = Inbox()
    return inbox


def remove_inbox(scheduler: Any) -> None:
    """Forget a scheduler."""
    _INBOXES.pop(scheduler, None)


def inbox_of(scheduler: Any) -> Inbox:
    """Return a scheduler's inbox; an empty one if it has none."""
    return _INBOXES.get(scheduler, Inbox())


def all_inboxes() -> list[Inbox]:
    """Return the inboxes of all schedulers of this process; rarely more than one."""
    return list(_INBOXES.values())
