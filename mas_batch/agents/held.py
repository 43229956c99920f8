"""What a host has read of its last partitions, kept for the other agents that it answers for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.engines.base import Engine, Message, Request, TokenizedPrompt
from mas_batch.records import Record
from mas_batch.run_folder.names import staged_name
from mas_batch.run_folder.storage import Store

_MAX_TOKENS = 500_000
"""Tokens of a partition's prompts that are kept, about 18 MB; those of longer texts are not."""

_Key = tuple[int, str, tuple[Message, ...], str | None]


class HeldPartition:
    """A partition's records, read once, and their prompts, tokenised once. Several threads use it.

    An agent is asked about all records or some of them: whichever, they are cut from here.
    """

    def __init__(self, store: Store, partition: int) -> None:
        self._store = store
        self._name = staged_name(partition)
        self._lock = threading.RLock()
        self._prompts: dict[_Key, TokenizedPrompt] = {}
        self._num_tokens = 0

    @property
    def table(self) -> pa.Table:
        """All records as they were staged."""
        with self._lock:  # whoever comes while another reads it waits for that one
            return self._table

    @cached_property
    def _table(self) -> pa.Table:
        return self._store.read_table(self._name)

    @property
    def usable(self) -> list[Record]:
        """The records that can be asked about."""
        with self._lock:
            return self._usable

    @cached_property
    def _usable(self) -> list[Record]:
        return usable_records(self._table)

    def tokenize(self, engine: Engine, request: Request) -> TokenizedPrompt:
        """Render and tokenise a request, unless that was done for another agent.

        Args:
            engine: the agent's view; agents that differ in sampling alone have the same one.
        """
        key = (id(engine), request.text, request.messages, request.context)
        with self._lock:
            if (known := self._prompts.get(key)) is not None:
                return known
            prompt = engine.tokenize(request)
            if self._num_tokens + prompt.num_tokens <= _MAX_TOKENS:
                self._prompts[key] = prompt
                self._num_tokens += prompt.num_tokens
            return prompt


class HeldPartitions:
    """The partitions that were read last. Several threads use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], HeldPartition] = OrderedDict()

    def get(self, store: Store, partition: int, keep: int) -> HeldPartition:
        """Return a partition of a run, which is read when it is first used.

        Args:
            store: the run's folder.
            keep: how many to keep, this one among them; 0: it is not kept.
        """
        key = (store.url, partition)
        with self._lock:
            held = self._held.pop(key, None) or HeldPartition(store, partition)
            self._held[key] = held
            while len(self._held) > keep:
                self._held.popitem(last=False)
            return held


def usable_records(table: pa.Table) -> list[Record]:
    """Return the records of a staged table that can be asked about."""
    good = table.filter(pc.is_null(table["reason"]))
    columns = good.select(["record_id", "text", "context"]).to_pylist()
    return [Record(row["record_id"], row["text"], row["context"]) for row in columns]
