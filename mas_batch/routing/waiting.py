"""Which open partition is placed next, and who may take it.

In this order: a task that must be alone at its host, if one is idle; a partition that a free host
has read for another of its agents; the first one that no other host is to go on with; and, rather
than to have a host idle, one that another host has read. State is O(window), as on the board.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from heapq import heapify, heappop, heappush

from mas_batch.routing.board import Board, OpenPartition
from mas_batch.routing.host import Host
from mas_batch.routing.hosts import Hosts

Candidate = tuple[Host, str]
"""A host, and which of its agents may be asked."""


class Waiting:
    """Finds what to place. Tell it of every partition that lacks answers, and who was sent it."""

    def __init__(self, board: Board, hosts: Hosts, agents: tuple[str, ...]) -> None:
        self._board = board
        self._hosts = hosts
        self._agents = agents
        self._anywhere: dict[str, list[int]] = {agent: [] for agent in agents}
        self._at_home: dict[str, list[int]] = {agent: [] for agent in agents}
        self._alone: dict[str, set[int]] = {agent: set() for agent in agents}
        self._read: defaultdict[str, set[int]] = defaultdict(set)
        """Host of several agents → partitions that it has read and that may lack answers."""

    # What it is told

    def add(self, state: OpenPartition) -> None:
        """The partition may lack answers."""
        if state.lacks <= 0:
            return
        for agent in state.wanted:
            if state.deaths[agent]:
                self._alone[agent].add(state.index)
            else:
                self._push(self._anywhere[agent], state.index, agent)
        for host_id in state.readers:
            self._note_read(state, self._hosts.get(host_id))

    def sent(self, state: OpenPartition, host: Host) -> None:
        """The host was sent the partition."""
        state.readers.add(host.host_id)
        self._note_read(state, host)

    def _note_read(self, state: OpenPartition, host: Host | None) -> None:
        if host is not None and len(host.agents) > 1:
            self._read[host.host_id].add(state.index)

    def closed(self, state: OpenPartition) -> None:
        """The partition is merged."""
        for host_id in state.readers & self._read.keys():
            self._read[host_id].discard(state.index)
            if not self._read[host_id]:
                del self._read[host_id]

    def leave(self, host_id: str, *, gone: bool = False) -> None:
        """The host cannot go on with what it has read: others may."""
        for index in sorted(self._read.get(host_id, ())):
            state = self._board.open[index]
            if gone:
                state.readers.discard(host_id)
            self.add(state)
        if gone:
            self._read.pop(host_id, None)

    # What it is asked

    def first(self, besides: set[int]) -> tuple[OpenPartition, list[Candidate]] | None:
        """Return what is placed next, and its candidates.

        Args:
            besides: partitions that are left out.
        """
        for find in (self._first_alone, self._first_read, self._first_new, self._first_at_home):
            found = find(besides)
            if found is not None:
                return found
        return None

    def has(self, agent: str) -> bool:
        """Whether anything waits for the agent."""
        if any(self._wants(index, agent) for index in self._alone[agent]):
            return True
        heaps = (self._anywhere[agent], self._at_home[agent])
        return any(next(self._in(heap, agent), None) is not None for heap in heaps)

    def alone(self) -> list[tuple[str, set[str]]]:
        """Return the tasks that must be alone and wait: agent, and hosts that they shall not go to.

        First come first.
        """
        waiting = []
        for agent, alone in self._alone.items():
            if alone:
                alone &= {index for index in alone if self._wants(index, agent)}
                waiting += [(index, agent) for index in alone]
        found = []
        for index, agent in sorted(waiting):
            failed_on = self._board.open[index].failed_on.get(agent, set())
            is_choosy = failed_on and self._hosts.has_healthy(agent, besides=failed_on)
            found.append((agent, failed_on if is_choosy else set()))
        return found

    # In turn

    def _first_alone(self, besides: set[int]) -> tuple[OpenPartition, list[Candidate]] | None:
        for agent, alone in self._alone.items():
            if not alone:
                continue
            idle = [host for host in self._hosts.free(agent).values() if not host.sent]
            for index in sorted(alone) if idle else ():
                if not self._wants(index, agent):
                    alone.discard(index)
                elif index not in besides:
                    state = self._board.open[index]
                    able = [(host, agent) for host in idle if self.may_take(state, host, agent)]
                    if able:
                        return state, able
        return None

    def _first_read(self, besides: set[int]) -> tuple[OpenPartition, list[Candidate]] | None:
        if not self._read:
            return None
        found: set[int] = set()
        for host in list(self._free_readers()):
            for index in sorted(self._read[host.host_id] - besides):
                wanted = [agent for agent in host.agents if self._wants(index, agent)]
                if not wanted:
                    self._read[host.host_id].discard(index)
                elif any(
                    host.host_id in self._hosts.free(agent)
                    and self._is_candidate(self._board.open[index], host, agent)
                    for agent in wanted
                ):
                    found.add(index)
                    break
            if not self._read[host.host_id]:
                del self._read[host.host_id]
        return self._with_candidates(min(found)) if found else None

    def _free_readers(self) -> Iterator[Host]:
        """Yield hosts that are free and have read something; of both there may be thousands."""
        seen: set[str] = set()
        for agent in self._agents:
            free = self._hosts.free(agent)
            for host_id in free if len(free) < len(self._read) else self._read:
                if host_id in free and host_id in self._read and host_id not in seen:
                    seen.add(host_id)
                    yield free[host_id]

    def _first_new(self, besides: set[int]) -> tuple[OpenPartition, list[Candidate]] | None:
        return self._first_of(self._anywhere, besides, self._leave_at_home)

    def _first_at_home(self, besides: set[int]) -> tuple[OpenPartition, list[Candidate]] | None:
        return self._first_of(self._at_home, besides, lambda state, agent: False)

    def _first_of(
        self,
        heaps: dict[str, list[int]],
        besides: set[int],
        is_moved: Callable[[OpenPartition, str], bool],
    ) -> tuple[OpenPartition, list[Candidate]] | None:
        firsts = []
        for agent in self._agents:
            free = self._hosts.free(agent)
            if not (free and heaps[agent]):
                continue
            waiting = self._in(heaps[agent], agent, is_moved)
            for state in waiting:
                if state.index not in besides and any(
                    self._is_candidate(state, host, agent) for host in free.values()
                ):
                    firsts.append(state.index)
                    break
            waiting.close()
        return self._with_candidates(min(firsts)) if firsts else None

    def _with_candidates(self, index: int) -> tuple[OpenPartition, list[Candidate]]:
        """Return the partition and who may take it: of an agent's hosts, those that have read it.

        If none of them is free, any other.
        """
        state, candidates = self._board.open[index], list[Candidate]()
        for agent in self._agents:
            if not self._wants(index, agent) or state.deaths[agent]:
                continue
            free = self._hosts.free(agent)
            readers = (free[host_id] for host_id in sorted(state.readers & free.keys()))
            able = [h for h in readers if self._is_candidate(state, h, agent)]
            if not able:
                able = [h for h in free.values() if self._is_candidate(state, h, agent)]
            candidates += [(host, agent) for host in able]
        return state, candidates

    def _is_candidate(self, state: OpenPartition, host: Host, agent: str) -> bool:
        return not (state.deaths[agent] or host.set_aside) and self.may_take(state, host, agent)

    def may_take(self, state: OpenPartition, host: Host, agent: str) -> bool:
        """Whether the agent has not failed on it there, or no host where it has not is well."""
        failed_on = state.failed_on.get(agent, ())
        return host.host_id not in failed_on or not self._hosts.has_healthy(
            agent, besides=failed_on
        )

    def _leave_at_home(self, state: OpenPartition, agent: str) -> bool:
        """Leave it to a host that has read it and should go on with it; False if there is none."""
        failed_on = state.failed_on.get(agent, ())
        for host_id in state.readers - set(failed_on):
            host = self._hosts.get(host_id)
            if host is None or len(host.agents) < 2 or agent not in host.agents:
                continue
            if host.is_closed(agent) and not (host.paused or host.hung):
                self._push(self._at_home[agent], state.index, agent)
                return True
        return False

    # Heaps

    def _wants(self, index: int, agent: str) -> bool:
        state = self._board.open.get(index)
        return state is not None and state.lacks > 0 and agent in state.wanted

    def _push(self, heap: list[int], index: int, agent: str) -> None:
        heappush(heap, index)
        if len(heap) > 64 + 2 * len(self._board.open):  # an agent without a host never looks
            heap[:] = {index for index in heap if self._wants(index, agent)}
            heapify(heap)

    def _in(
        self,
        heap: list[int],
        agent: str,
        is_moved: Callable[[OpenPartition, str], bool] = lambda state, agent: False,
    ) -> Generator[OpenPartition]:
        """Yield what waits for the agent, lowest number first; for a consumer that stops early.

        Args:
            is_moved: called with each; True: it has been moved to another heap.
        """
        passed: list[int] = []
        try:
            while heap:
                index = heappop(heap)
                if not self._wants(index, agent):
                    continue
                state = self._board.open[index]
                if not state.deaths[agent] and not is_moved(state, agent):
                    passed.append(index)
                    yield state
        finally:
            for index in passed:
                heappush(heap, index)
