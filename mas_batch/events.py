"""Events: the facts of a run, which the progress, the event log and the dashboards read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Event:
    """One fact of a run; the class name is its kind in the run's `events.jsonl`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain data."""
        return {"event": type(self).__name__, **asdict(self)}


Emit: TypeAlias = Callable[[Event], None]
"""Takes every event of a run, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnded(Event):
    """A task on a worker has ended; its seconds are those of `TaskTimes.heard_after`.

    compute + transfer + processing = wall, and transfer = read + write, processing = queue +
    wait + process, compute = prefill + decode.
    """

    wall_s: float = 0.0
    """From sending the task to hearing of its end."""
    compute_s: float = 0.0
    transfer_s: float = 0.0
    processing_s: float = 0.0
    queue_s: float = 0.0
    """Waiting at the scheduler and the worker, and the time that the report travels."""
    read_s: float = 0.0
    write_s: float = 0.0
    wait_s: float = 0.0
    """With the engine, which worked for other tasks, or had not begun."""
    process_s: float = 0.0
    prefill_s: float | None = None
    decode_s: float | None = None
    idle_s: float = 0.0
    """How long the engine had nothing to do since the host's task before."""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The plan is made; work begins, or goes on where an earlier execution has stopped."""

    run: str
    num_partitions: int
    num_records: int
    partitions_done: int
    records_done: int
    answers_done: int
    """Pairs of agent and partition that an earlier execution has answered but not merged."""
    answers_per_record: int
    earlier_runs: tuple[str, ...]
    """Other runs of a job of this name: another job file or corpus; empty with `since`."""
    dashboard_link: str | None


@dataclass(frozen=True, slots=True)
class HostLoading(Event):
    """A host begins to load its engine."""

    worker: str
    """Name of its leading worker."""
    agents: tuple[str, ...]
    """Those that it answers for."""


@dataclass(frozen=True, slots=True)
class AnswersReused(Event):
    """`since: last`: agents are not asked again what the last published run has answered."""

    run: str | None
    """Name of that run; None: there is no earlier run."""
    records: Mapping[str, int]
    """Numbers of records that are `unchanged`, `changed`, `new` and `gone` since that run."""
    answers: Mapping[str, int]
    """Agent → number of its answers that are reused."""
    refused: Mapping[str, str]
    """Agent → why none of its answers is reused."""


@dataclass(frozen=True, slots=True)
class HostReady(Event):
    """A host holds its engine."""

    worker: str
    agents: tuple[str, ...]
    load_s: float
    engine: dict[str, Any] = field(default_factory=dict)
    concurrent: int = 1
    """Partitions at once that keep its engine busy."""
    max_in_flight: int | None = None
    """Partitions that its worker has task slots for."""


@dataclass(frozen=True, slots=True)
class HostLost(Event):
    """A host is gone, or could not load its engine."""

    worker: str
    agents: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class HostDraining(Event):
    """The router asks a host nothing further; the host may finish what it has in flight."""

    worker: str
    agents: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class BreakerChanged(Event):
    """An agent that only fails at a worker is left alone there for a while, then probed."""

    agent_id: str
    worker: str
    state: str
    """`open` (left alone), `probing`, `closed` (it answers again)."""
    message: str


@dataclass(frozen=True, slots=True)
class ServerAway(Event):
    """The server that an agent asks is away, starting or overloaded: the run waits for it.

    Nothing is committed; the partition goes back, and the router asks the worker again later.
    """

    partition: int
    agent_id: str
    worker: str
    message: str
    """Which server, and what came instead of an answer."""
    away_s: float
    """Since the worker first found it away."""
    again_in_s: float
    """Until the worker is asked again."""
    wait_s: float
    """The run ends when the server has been away for so long, to be resumed."""


@dataclass(frozen=True, slots=True)
class HostsScaled(Event):
    """The numbers of hosts that the backlogs call for have changed."""

    wanted: dict[str, int]
    """Post → hosts."""
    backlog: dict[str, int]
    """Post → partitions that wait for one of its agents or are in flight at one of its hosts."""


@dataclass(frozen=True, slots=True)
class PartitionAsked(Event):
    """The router's decision: which worker it asks, of which, by which policy, and why."""

    partition: int
    agent_id: str
    worker: str
    attempt: int
    purpose: str
    """`answer`, `retry`, `careful` (record by record, after its worker died), `copy` (of a slow
    task near the end) or `probe` (of a worker that kept failing)."""
    policy: str
    candidates: dict[str, dict[str, dict[str, float]]]
    """Agent → worker → what the policy saw of them: `in_flight` partitions, `in_flight_tokens`,
    `tokens_per_s`, `agreement`, and so on; what was chosen and up to 15 others."""
    num_busy: int
    """Capable workers that could not be chosen because their windows were full; one of several
    agents counts for each that could be asked there."""


@dataclass(frozen=True, slots=True)
class PartitionUndecided(TaskEnded):
    """The first answers to some records differ too much: one more agent is asked about them."""

    partition: int
    num_undecided: int
    num_records: int
    worker: str = ""


@dataclass(frozen=True, slots=True)
class PartitionAnswered(TaskEnded):
    """One agent's answers to one partition are committed."""

    partition: int
    agent_id: str
    worker: str
    attempt: int
    num_records: int
    num_answers: int
    num_failed: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    """Of the prompts' tokens, those that had been read for others; None: not known."""
    peak_memory_bytes: int | None = None
    """Most memory of the worker's process so far."""


@dataclass(frozen=True, slots=True)
class AnswerFailed(Event):
    """An attempt of one agent on one partition has failed."""

    partition: int
    agent_id: str
    worker: str
    attempt: int
    message: str
    given_up: bool
    wall_s: float = 0.0
    """From asking to hearing of the failure."""


@dataclass(frozen=True, slots=True)
class PartitionMerged(TaskEnded):
    """A partition's results and failures are committed."""

    partition: int
    num_results: int
    num_failures: int
    worker: str = ""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason (see `errors.Reason`) → records that failed for it."""
    agreement: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Agent → (number of its answers that equal the merged one, number of its valid answers)."""


@dataclass(frozen=True, slots=True)
class Learned(Event):
    """The merge has learned from the whole corpus how far each agent can be trusted."""

    method: str
    weights: dict[str, float]
    """Agent → estimated accuracy, or weight, depending on the method."""
    why: str
    """Explanation for people."""
    warnings: tuple[str, ...] = ()
    """Sentences for people: what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Escalated(Event):
    """All other agents have answered: the least confident records go to one more agent."""

    agent_id: str
    num_records: int
    num_records_of_all: int
    why: str = ""
    """Explanation for people: by what sample and with which guarantee; empty: the job's limit."""


@dataclass(frozen=True, slots=True)
class EscalationSampled(Event):
    """All other agents have answered: a sample goes to one more agent, to find which must."""

    agent_id: str
    num_records: int
    num_records_of_all: int


@dataclass(frozen=True, slots=True)
class PhaseEnded(Event):
    """The submitting process goes on to its next phase; see `latency.phases`."""

    phase: str
    at_s: float
    """When the phase began, in seconds after the execution's start."""
    wall_s: float


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """All partitions are merged and the manifest is published."""

    num_results: int
    num_failures: int
    wall_s: float
