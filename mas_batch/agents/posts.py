"""Which workers hold which engine: a job's posts, and the hosts that fill them. Pure.

A post is a wish: hosts of one engine. A host is who fulfils it: `Post.size` workers that hold the
engine together and answer for every agent of the post.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mas_batch.errors import JobError
from mas_batch.job import Agent, Job, fingerprint

_MAX_NAME = 64
"""Characters of a post's name; its workers are named after it."""
_NO_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What is known of a worker of a running cluster."""

    address: str
    name: str
    resources: Mapping[str, float]
    status: str = "running"
    """Dask's: `paused` by memory, `closing_gracefully` when it is being retired."""
    last_seen: float = 0.0
    """Unix time of its last heartbeat, on the scheduler's clock."""


@dataclass(frozen=True, slots=True)
class Post:
    """The wish for hosts of one engine."""

    name: str
    """The agent's; of several agents they are joined by `+`, which is in no agent's name."""
    agents: tuple[str, ...]
    """Whom its hosts answer for, in the job's order."""
    needs: Mapping[str, float]
    """Dask resources that each worker of a host must declare."""
    wanted: int
    """Hosts to begin with."""
    most: int
    """Hosts at most."""
    size: int = 1
    """Workers per host."""

    @property
    def worker_names(self) -> list[str]:
        """Names of the embedded workers of all hosts that it may have: `<post>-<number>`."""
        return [f"{self.name}-{number}" for number in range(self.most * self.size)]


@dataclass(frozen=True, slots=True)
class Host:
    """The workers that hold one engine of a post."""

    host_id: str
    """Address of its leading worker, which is the first member."""
    post: str
    members: tuple[str, ...]
    """Addresses."""


def posts_of(job: Job, names: Mapping[str, str] = _NO_NAMES) -> tuple[Post, ...]:
    """Return the job's posts, in the order of their first agents.

    Agents share hosts if all that says how their engine is held is the same, and they need the
    same of a worker. `count` and `max_count` are then the largest of theirs.

    Args:
        names: agent → name of its post in the whole job, for a pass that asks some of its agents.
    """
    shared: dict[str, list[Agent]] = {}
    for agent in job.agents:
        alone = "" if agent.share else agent.name
        key = fingerprint([agent.engine_settings, job.capabilities(agent), alone])
        shared.setdefault(key, []).append(agent)
    return tuple(
        Post(
            name=names.get(agents[0].name) or _name([agent.name for agent in agents]),
            agents=tuple(agent.name for agent in agents),
            needs=job.capabilities(agents[0]),
            wanted=max(agent.count for agent in agents),
            most=max(agent.most for agent in agents),
        )
        for agents in shared.values()
    )


def _name(agents: Sequence[str]) -> str:
    """Join the names; of many or long ones the first, and how many others there are.

    Either is unique in a job: an agent is in one post, and no agent's name has a `+`.
    """
    joined = "+".join(agents)
    is_short = len(agents) == 1 or len(joined) <= _MAX_NAME
    return joined if is_short else f"{agents[0]}+{len(agents) - 1}"


def can_host(worker: WorkerInfo, post: Post) -> bool:
    """Whether the worker declares all that the post needs."""
    return all(worker.resources.get(name, 0) >= amount for name, amount in post.needs.items())


def place(
    workers: Collection[WorkerInfo], posts: Sequence[Post], hosts: Collection[Host] = ()
) -> list[Host]:
    """Decide which hosts to form of the workers that are in none yet; returns the new ones.

    Called at the start and whenever workers have come or gone. What it promises:

    - A host is `size` workers that declare what its post needs, or it is not formed.
    - Hosts that are there stay as they are, and no post gets more than `most`.
    - Every post's first host comes before any post's second. With one worker per host, as many
      posts as possible get a first one (maximum bipartite matching, Kuhn 1955); with more, one is
      formed wherever workers for it can be found beside those of the posts before it.
    - Workers named `<post>-<number>` or `<agent>-<number>` then go to that post.
    - The rest go to whoever lacks the largest part of what it wants, then of the most it may have.
    - The order of the workers does not matter.

    Workers that the same posts can use are one vertex of a search, and from whom a search was in
    vain none is made again.
    """
    taken = {member for host in hosts for member in host.members}
    free = [worker for worker in workers if worker.address not in taken]
    placement = _Placement(free, posts, Counter(host.post for host in hosts))
    placement.give_first_hosts()
    placement.give_named_workers()
    placement.give_further_hosts()
    return placement.new_hosts()


def unserved(posts: Iterable[Post], hosts: Iterable[Host]) -> list[Post]:
    """Return the posts without a host."""
    served = {host.post for host in hosts}
    return [post for post in posts if post.name not in served]


def check_served(
    workers: Collection[WorkerInfo], posts: Sequence[Post], hosts: Collection[Host], job: Job
) -> None:
    """Check that every post has a host.

    Raises:
        JobError: one has none; lists what it needs, and what every worker declares.
    """
    for post in unserved(posts, hosts):
        names, needs = " and ".join(repr(name) for name in post.agents), _show(post.needs)
        verb = "needs" if len(post.agents) == 1 else "need"
        whom = "a worker" if post.size == 1 else f"{post.size} workers, each"
        is_short = "none is free" if post.size == 1 else "so many are not free"
        number = next(i for i, agent in enumerate(job.agents) if agent.name == post.agents[0])
        raise JobError(
            f"{names} {verb} {whom} with {needs}; {is_short}. "
            f"Workers there: {'; '.join(_describe(workers)) or 'none'}. "
            f"Start one with: dask worker SCHEDULER --resources '{needs}'",
            key=f"agents.{number}.capabilities",
        )


def _show(resources: Mapping[str, float]) -> str:
    return ",".join(f"{name}={amount:g}" for name, amount in sorted(resources.items()))


def _describe(workers: Iterable[WorkerInfo]) -> Iterator[str]:
    for worker in workers:
        declared = _show(worker.resources) or "no resources"
        yield f"{worker.name} ({worker.address}) declares {declared}"


@dataclass(slots=True, eq=False)
class _Group:
    """Free workers that the same posts can use, and that are named for the same one."""

    users: tuple[int, ...]
    """Numbers of the posts that can use them."""
    named_for: int | None
    workers: list[WorkerInfo] = field(default_factory=list)
    """Those that declare least come first."""
    held: Counter[int] = field(default_factory=Counter)
    """Post → how many of them it gets."""
    num_free: int = 0


class _Placement:
    """Gives workers to posts, one after the other; posts are known by their numbers here.

    Another post's worker can be taken over if that post finds one elsewhere: a worker's place is
    moved along the shortest such path, and everybody keeps as many as before.
    """

    def __init__(
        self, free: Iterable[WorkerInfo], posts: Sequence[Post], counts: Mapping[str, int]
    ) -> None:
        self._posts = posts
        self._counts = [counts.get(post.name, 0) for post in posts]
        self._groups = _groups(free, posts)
        self._choices = [_choices(self._groups, number) for number in range(len(posts))]
        self._first_free = [0] * len(posts)  # where in its choices a post may find a free worker
        self._hopeless: set[int] = set()  # posts that no search can help any more
        self._held_by: list[dict[int, dict[_Group, None]]] = [{} for _ in posts]
        """Post → another post → groups where the other one holds what the post can use."""

    def give_first_hosts(self) -> None:
        """Form a host for every post that has none, as far as there are workers."""
        for number, count in enumerate(self._counts):
            if count == 0:
                self._give_host(number)

    def give_named_workers(self) -> None:
        """Let posts have the workers that are named for them."""
        for group in self._groups:
            number = group.named_for
            if number is None or number not in group.users:
                continue
            post = self._posts[number]
            lacking = post.most - self._counts[number]
            num_hosts = min(lacking, group.num_free // post.size)
            if num_hosts > 0:
                group.num_free -= num_hosts * post.size
                self._hold(group, number, num_hosts * post.size)
                self._counts[number] += num_hosts

    def give_further_hosts(self) -> None:
        """Form hosts up to the most of every post; who lacks the largest part comes first."""
        claims = [claim for number in range(len(self._posts)) if (claim := self._claim(number))]
        heapq.heapify(claims)
        while claims:
            number = heapq.heappop(claims)[-1]
            # Who gets no further host now never will: what helps later was tried already.
            if self._give_host(number) and (claim := self._claim(number)):
                heapq.heappush(claims, claim)

    def new_hosts(self) -> list[Host]:
        """Return the hosts, those of a post together; each led by the first of its workers."""
        members: list[list[str]] = [[] for _ in self._posts]
        for group in self._groups:
            workers = iter(group.workers)
            for number in sorted(group.held):
                taken = (next(workers) for _ in range(group.held[number]))
                members[number].extend(worker.address for worker in taken)
        return [
            Host(addresses[i], post.name, tuple(addresses[i : i + post.size]))
            for post, addresses in zip(self._posts, members, strict=True)
            for i in range(0, len(addresses), post.size)
        ]

    def _claim(self, number: int) -> tuple[bool, float, int] | None:
        post, count = self._posts[number], self._counts[number]
        if count >= post.most:
            return None
        beyond = count >= post.wanted
        return beyond, count / (post.most if beyond else post.wanted), number

    def _give_host(self, number: int) -> bool:
        """Form one more host, or leave everything as it is."""
        done: list[_Move] = []
        for _ in range(self._posts[number].size):
            moves = self._find_worker(number, whole=not done)
            if moves is None:
                for move in reversed(done):
                    self._undo(move)
                return False
            for move in moves:
                self._do(move)
            done.extend(moves)
        self._counts[number] += 1
        return True

    def _find_worker(self, number: int, *, whole: bool) -> list[_Move] | None:
        """Return what has to move for one more worker; breadth first, so that the fewest do.

        Args:
            whole: nothing is taken yet that may have to be given back. Then whom a search in vain
                has reached can have nothing free later either: no path leads out of these, and
                none that others find leads through them.
        """
        if number in self._hopeless:
            return None
        reached: dict[int, tuple[int, _Group] | None] = {number: None}
        queue = deque([number])
        while queue:
            mover = queue.popleft()
            if (group := self._free_group(mover)) is not None:
                moves: list[_Move] = [(group, None, mover)]
                while (step := reached[mover]) is not None:
                    successor, left = step
                    moves.append((left, mover, successor))
                    mover = successor
                return moves
            for holder, groups in self._held_by[mover].items():
                if groups and holder not in reached and holder not in self._hopeless:
                    reached[holder] = (mover, next(iter(groups)))
                    queue.append(holder)
        if whole:
            self._hopeless.update(reached)
        return None

    def _free_group(self, number: int) -> _Group | None:
        choices, i = self._choices[number], self._first_free[number]
        while i < len(choices) and not choices[i].num_free:
            i += 1
        self._first_free[number] = i
        return choices[i] if i < len(choices) else None

    def _do(self, move: _Move) -> None:
        group, giver, taker = move
        if giver is None:
            group.num_free -= 1
        else:
            self._hold(group, giver, -1)
        self._hold(group, taker, 1)

    def _undo(self, move: _Move) -> None:
        group, giver, taker = move
        self._hold(group, taker, -1)
        if giver is None:
            group.num_free += 1
            self._first_free = [0] * len(self._posts)
        else:
            self._hold(group, giver, 1)

    def _hold(self, group: _Group, number: int, change: int) -> None:
        before = group.held[number]
        group.held[number] = before + change
        if (before == 0) == (before + change == 0):
            return
        for user in group.users:
            groups = self._held_by[user].setdefault(number, {})
            if before == 0:
                groups[group] = None
            else:
                del groups[group]


_Move = tuple[_Group, int | None, int]
"""A worker of a group goes from a post (None: it was free) to another."""


def _groups(free: Iterable[WorkerInfo], posts: Sequence[Post]) -> list[_Group]:
    named = {name: i for i, post in enumerate(posts) for name in (post.name, *post.agents)}
    users_of: dict[frozenset[tuple[str, float]], tuple[int, ...]] = {}
    groups: dict[tuple[tuple[int, ...], int | None], _Group] = {}
    for worker in sorted(free, key=lambda w: (len(w.resources), w.name, w.address)):
        declared = frozenset(worker.resources.items())
        users = users_of.get(declared)
        if users is None:
            users = tuple(i for i, post in enumerate(posts) if can_host(worker, post))
            users_of[declared] = users
        named_for = named.get(worker.name.rpartition("-")[0])
        group = groups.setdefault((users, named_for), _Group(users, named_for))
        group.workers.append(worker)
        group.num_free += 1
    return list(groups.values())


def _choices(groups: Iterable[_Group], number: int) -> list[_Group]:
    """Return the groups that a post can use: its own workers, nobody's, other posts'; of these
    first those that could do least for others."""

    def rank(group: _Group) -> tuple[int, int]:
        whose = 0 if group.named_for == number else 1 if group.named_for is None else 2
        return whose, len(group.users)

    return sorted((group for group in groups if number in group.users), key=rank)
