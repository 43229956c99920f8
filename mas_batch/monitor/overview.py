"""What `/agents.json` says and the page shows: plain values with the rates worked out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from mas_batch.monitor.fleet import HostState, LiveAgent, LiveHost, LivePost
from mas_batch.monitor.inbox import HeardRun, Inbox
from mas_batch.monitor.live import LiveRun

FORMAT = 2
_SMOOTHED_S = 10.0


@dataclass(frozen=True, slots=True)
class PostRow:
    """Hosts of one engine, and the agents that share them."""

    post: str
    agents: list[str]
    hosts: dict[str, int]
    """State → hosts; see `fleet.HostState`."""
    hosts_wanted: int
    """Hosts that the job asks for; more may be there."""
    in_flight: int
    """Partitions at its hosts."""
    window: int
    """Partitions that may be at its hosts, those that are gone not counted."""
    peak_memory_bytes: int
    """Of its hosts in sum, those that are gone not counted."""


@dataclass(frozen=True, slots=True)
class AgentRow:
    """An agent of a run."""

    agent: str
    post: str
    """Whose hosts answer for it."""
    model: str
    engine: str
    device: str
    capabilities: list[str]
    in_flight: int
    """Its partitions at the hosts."""
    records: int
    """Records that it was asked about and has replied to, well or not."""
    answers: int
    failed_answers: int
    """Answers with a reason instead of a text."""
    failed_tries: int
    given_up: int
    """Partitions that came to nothing; of them, those that it is not asked about again."""
    prompt_tokens: int
    completion_tokens: int
    records_per_s: float
    tokens_per_s: float
    """Completion tokens; both over the last minute."""
    agreement: float | None
    """Share of its answers that say what was merged; null before there are any to compare."""
    compared: int
    compute_s: float
    transfer_s: float
    processing_s: float
    """Summed over its partitions."""
    waiting_s: float
    """Part of `processing_s`: for a worker, or for an engine that worked for others."""
    asked: dict[str, int]
    """Purpose (answer, retry, careful, copy, probe) → partitions."""
    last_failure: str


@dataclass(frozen=True, slots=True)
class HostRow:
    """What holds one engine, or did so."""

    worker: str
    """Name of its leading worker."""
    agents: list[str]
    """Those that it answers for."""
    state: str
    since_s: float
    """Seconds since its last change of state."""
    in_flight: int
    window: int
    asked: int
    answered: int
    failed: int
    """Partitions."""
    served_s: float
    """From when it held its engine to its last answers."""
    idle_s: float
    """Of that, how long its engine had nothing to do."""
    peak_memory_bytes: int
    """Of its process; 0: not known."""
    message: str


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """One step of a run's history; the step gets longer as the run does."""

    at_s: float
    """Seconds since the run's start, of the step's beginning."""
    waiting: int
    answering: int
    answered: int
    merged: int
    """Partitions."""
    records_per_s: float
    """Merged."""
    tokens_per_s: float
    """Generated; both over the ten seconds up to the step's end."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """An execution of a run."""

    run: str
    job: str
    task: str
    policy: str
    url: str
    status: str
    """`starting`, `answering`, `escalating`, `finished`, `failed`, `silent` (its process has said
    nothing for half a minute)."""
    message: str
    started: float
    """Unix time, on the scheduler's clock."""
    running_s: float
    progress: float
    """Share of the partitions that are merged; a cascade's second pass begins at 0 again."""
    partitions: dict[str, int]
    """`waiting`, `answering`, `answered`, `merged`."""
    records: int
    merged_records: int
    """With those of earlier executions."""
    failed_records: dict[str, int]
    """Reason → records without an answer."""
    undecided: int
    """Times that one more agent was asked about a record."""
    records_per_s: float
    """Merged, over the last minute."""
    posts: list[PostRow]
    agents: list[AgentRow]
    hosts: list[HostRow]
    history: list[HistoryPoint]


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything; the newest run comes first."""

    format: int
    time: float
    """Unix time, on the scheduler's clock."""
    runs: list[RunRow]

    def to_json(self) -> bytes:
        """Encode it."""
        return _OVERVIEW.dump_json(self)


_OVERVIEW = TypeAdapter(Overview)


def schema() -> dict[str, Any]:
    """Return the JSON schema of `/agents.json`."""
    return _OVERVIEW.json_schema()


def overview(inbox: Inbox, now: float) -> Overview:
    """Return how all runs are at this Unix time of the scheduler's clock."""
    return Overview(FORMAT, now, [_run_row(h, now) for h in reversed(inbox.runs.values())])


def _run_row(heard: HeardRun, now: float) -> RunRow:
    run = heard.run
    # All times in the run are those of the submitting process's clock.
    run_now = now - heard.clock_ahead_s if run.ended is None else run.ended
    hosts = sorted(run.hosts.values(), key=lambda host: (host.agents, host.worker))
    return RunRow(
        run=run.name,
        job=run.job_name,
        task=run.task,
        policy=run.policy,
        url=run.url,
        status=heard.status(now),
        message=run.message,
        started=run.started + heard.clock_ahead_s,
        running_s=max(0.0, run_now - run.started),
        progress=progress(run),
        partitions=dict(zip(PARTITION_STATES, run.states, strict=True)),
        records=run.num_records,
        merged_records=run.records_before + run.num_results + run.num_failures,
        failed_records=dict(run.reasons),
        undecided=run.num_undecided,
        records_per_s=run.recent.rates(run_now)[0],
        posts=[_post_row(run, post) for post in run.posts.values()],
        agents=[_agent_row(run, agent, run_now) for agent in run.agents.values()],
        hosts=[_host_row(host, run_now) for host in hosts],
        history=_history(run),
    )


PARTITION_STATES = ("waiting", "answering", "answered", "merged")
PURPOSES = ("answer", "retry", "careful", "copy", "probe")
"""Why an agent is asked; see `events.PartitionAsked`."""


def progress(run: LiveRun) -> float:
    """Return the share of the partitions that are merged; 0 while there is no plan."""
    return run.num_merged / run.num_partitions if run.num_partitions else 0.0


def hosts_of(run: LiveRun, post: LivePost) -> list[LiveHost]:
    """Return the hosts of a post, with those that are gone."""
    return [host for host in run.hosts.values() if set(host.agents) <= set(post.agents)]


def is_serving(host: LiveHost) -> bool:
    """Whether the host is there and its run goes on."""
    return host.state not in (HostState.LOST, HostState.RELEASED)


def window_of(run: LiveRun, post: LivePost) -> int:
    """Return how many partitions may be at the hosts of a post."""
    return sum(host.window for host in hosts_of(run, post) if is_serving(host))


def memory_of(run: LiveRun, post: LivePost) -> int:
    """Return the bytes that the hosts of a post had at their peaks, in sum."""
    return sum(host.peak_memory_bytes for host in hosts_of(run, post) if is_serving(host))


def _post_row(run: LiveRun, post: LivePost) -> PostRow:
    hosts = hosts_of(run, post)
    states = Counter(str(host.shown_state) for host in hosts)
    return PostRow(
        post=post.name,
        agents=post.agents,
        hosts=dict(sorted(states.items())),
        hosts_wanted=post.num_wanted,
        in_flight=sum(host.in_flight for host in hosts),
        window=window_of(run, post),
        peak_memory_bytes=memory_of(run, post),
    )


def _agent_row(run: LiveRun, agent: LiveAgent, run_now: float) -> AgentRow:
    records_per_s, tokens_per_s = agent.recent.rates(run_now)
    return AgentRow(
        agent=agent.agent_id,
        post=next((p.name for p in run.posts.values() if agent.agent_id in p.agents), ""),
        model=agent.model,
        engine=agent.engine,
        device=agent.device,
        capabilities=agent.capabilities,
        in_flight=agent.in_flight,
        records=agent.num_records,
        answers=agent.num_answers,
        failed_answers=agent.num_failed,
        failed_tries=agent.num_failed_tries,
        given_up=agent.num_given_up,
        prompt_tokens=agent.prompt_tokens,
        completion_tokens=agent.completion_tokens,
        records_per_s=records_per_s,
        tokens_per_s=tokens_per_s,
        agreement=agent.num_agreed / agent.num_compared if agent.num_compared else None,
        compared=agent.num_compared,
        compute_s=agent.compute_s,
        transfer_s=agent.transfer_s,
        processing_s=agent.processing_s,
        waiting_s=agent.waiting_s,
        asked=dict(agent.asked),
        last_failure=agent.last_failure,
    )


def _host_row(host: LiveHost, run_now: float) -> HostRow:
    return HostRow(
        worker=host.worker,
        agents=host.agents,
        state=host.shown_state,
        since_s=max(0.0, run_now - host.since),
        in_flight=host.in_flight,
        window=host.window,
        asked=host.num_asked,
        answered=host.num_answered,
        failed=host.num_failed,
        served_s=host.served_s,
        idle_s=host.idle_s,
        peak_memory_bytes=host.peak_memory_bytes,
        message=host.message,
    )


def _history(run: LiveRun) -> list[HistoryPoint]:
    """Return the run's history, its rates smoothed: a partition's records all come at once."""
    history, points = run.history, run.history.points
    width = math.ceil(_SMOOTHED_S / history.step_s)
    rows, first = [], 0
    for number, point in enumerate(points):
        while points[first].index <= point.index - width:
            first += 1
        last = points[first : number + 1]
        seconds = min(width, point.index + 1) * history.step_s
        rows.append(
            HistoryPoint(
                at_s=point.index * history.step_s,
                waiting=point.waiting,
                answering=point.answering,
                answered=point.answered,
                merged=point.merged,
                records_per_s=sum(each.num_records for each in last) / seconds,
                tokens_per_s=sum(each.num_tokens for each in last) / seconds,
            )
        )
    return rows
