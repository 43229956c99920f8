"""Native mode: groups of partitions go to Dask's own scheduler, which places and steals them.

For very short or very many partitions under the `capability` policy. The window mode costs a
decision and two messages per partition; here a group is one message, Dask fans it out, and
merges wait for their answers as ordinary dependencies. What Dask cannot do (policies, blame,
speculation, quarantine) stays with the dispatcher: at the first sign of trouble the feed stops
and hands over what is not merged.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import dask
from distributed import Client, Future

from mas_batch.agents.spec import AgentSpec
from mas_batch.agents.work import answer_partition, merge_partition
from mas_batch.routing.instructions import Work
from mas_batch.run_folder.ref import RunRef

NATIVE_PATIENCE_S = 600.0
_PARTITIONS_PER_WORKER = 16
_MAX_GROUPS = 2
"""The next group is at the scheduler while one is worked on, so that no worker runs dry."""


@dataclass(slots=True)
class _Group:
    open: dict[int, Work]
    """Not merged yet."""
    futures: list[Future]
    sent: float
    """By `time.monotonic`."""


class NativeFeed:
    """A bounded backlog of groups of partitions at the scheduler.

    Args:
        agents: who answers every partition.
        patience_s: how long no partition may be merged before that is trouble.
    """

    def __init__(
        self,
        client: Client,
        run: RunRef,
        specs: Mapping[str, AgentSpec],
        agents: Sequence[str],
        patience_s: float = NATIVE_PATIENCE_S,
    ) -> None:
        self._client = client
        self._run = run
        self._specs = specs
        self._agents = agents
        self._patience_s = patience_s
        self._last_news = time.monotonic()
        self._groups: list[_Group] = []
        self.in_trouble = False
        """A worker was lost or a task failed: the dispatcher shall go on."""

    def fill(self, work: Iterator[Work], ready: Mapping[str, str]) -> None:
        """Send further groups while there is room.

        Args:
            ready: worker address → agent whose model it holds.
        """
        while len(self._groups) < _MAX_GROUPS:
            size = _PARTITIONS_PER_WORKER * len(ready)
            group = {each.index: each for each in islice(work, size)}
            if not group:
                return
            self._groups.append(_Group(group, self._send(list(group), ready), time.monotonic()))

    def _send(self, partitions: list[int], ready: Mapping[str, str]) -> list[Future]:
        answers = [
            self._send_answers(agent_id, partitions, [w for w, a in ready.items() if a == agent_id])
            for agent_id in self._agents
        ]
        # The answers are dependencies only: what they say lies in the run's storage.
        merges = self._client.map(
            merge_when_answered,
            partitions,
            *answers,
            run=self._run,
            agents=tuple(self._agents),
            pure=False,
            priority=10,
        )
        return [*merges, *(future for each in answers for future in each)]

    def _send_answers(
        self, agent_id: str, partitions: list[int], workers: list[str]
    ) -> list[Future]:
        with dask.annotate(executor=self._run.topic):
            futures: list[Future] = self._client.map(
                answer_when_free,
                partitions,
                run=self._run,
                spec=self._specs[agent_id],
                workers=workers,
                pure=False,
            )
        return futures

    def sent(self, partition: int) -> float | None:
        """Return when the partition went to Dask; None: it is not there any more."""
        return next((group.sent for group in self._groups if partition in group.open), None)

    def merged(self, partition: int) -> bool:
        """Take the news of a merge; False if it is a second copy's."""
        for group in self._groups:
            if group.open.pop(partition, None) is not None:
                self._last_news = time.monotonic()
                if not group.open:
                    self._groups.remove(group)
                return True
        return False

    def look(self) -> None:
        """See whether a task has failed, or nothing has come for too long."""
        if time.monotonic() - self._last_news > self._patience_s:
            self.in_trouble = True
        if any(f.status in ("error", "cancelled", "lost") for g in self._groups for f in g.futures):
            self.in_trouble = True

    @property
    def is_empty(self) -> bool:
        """Nothing is at the scheduler."""
        return not self._groups

    def take_back(self) -> list[Work]:
        """Let go of all tasks (those that run go on); returns what is not merged, in order."""
        left = [work for group in self._groups for work in group.open.values()]
        for group in self._groups:
            for future in group.futures:
                future.release()
        self._groups.clear()
        return sorted(left, key=lambda work: work.index)


def agents_asked(samples: Mapping[str, int], answers_per_record: int) -> list[str]:
    """Return the first agents of the job whose answers are enough: the policy `capability`."""
    chosen: list[str] = []
    num_answers = 0
    for agent_id, count in samples.items():
        if num_answers >= answers_per_record:
            break
        chosen.append(agent_id)
        num_answers += count
    return chosen


def answer_when_free(partition: int, *, run: RunRef, spec: AgentSpec) -> None:
    """Ask the agent about the partition (named for the dashboard)."""
    answer_partition(run, spec, partition, attempt=1)


def merge_when_answered(
    partition: int, *answered: None, run: RunRef, agents: Iterable[str]
) -> None:
    """Merge the partition; its answers are dependencies (named for the dashboard)."""
    merge_partition(run, partition, tuple(agents))
