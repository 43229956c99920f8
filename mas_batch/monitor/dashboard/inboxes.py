"""Which scheduler of this process has which inbox: how the page and the metrics find theirs."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from mas_batch.monitor.inbox import Inbox

INBOXES: WeakKeyDictionary[Any, Inbox] = WeakKeyDictionary()
"""By scheduler; rarely more than one."""
