"""What happens in a run, as facts. Progress, log and event file are readers of these."""

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
    """A task on a worker is done; its seconds, as `latency.times.TaskTimes.heard_after` has them.

    compute + transfer + processing = wall, and transfer = read + write, processing = queue +
    process, compute = prefill + decode.
    """

    wall_s: float = 0.0
    """From sending the task to hearing of it."""
    compute_s: float = 0.0
    transfer_s: float = 0.0
    processing_s: float = 0.0
    queue_s: float = 0.0
    """Not the task's own: waiting at scheduler and worker, and the news on its way."""
    read_s: float = 0.0
    write_s: float = 0.0
    process_s: float = 0.0
    prefill_s: float | None = None
    decode_s: float | None = None
    idle_s: float = 0.0
    """Before it, the replica had nothing to do for so long."""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The plan is made; work begins (or goes on, when partitions are already done)."""

    run: str
    num_partitions: int
    num_records: int
    partitions_done: int
    records_done: int
    answers_done: int
    """Partition answers that an earlier execution committed and that are not asked again."""
    answers_per_record: int
    earlier_runs: tuple[str, ...]
    """Runs of a job of this name whose job or corpus was another; empty with `since`."""
    dashboard_link: str | None


@dataclass(frozen=True, slots=True)
class AgentLoading(Event):
    """A worker begins to load an agent's model."""

    agent_id: str
    worker: str


@dataclass(frozen=True, slots=True)
class AnswersReused(Event):
    """`since: last`: what the last published run has answered is not asked again."""

    run: str | None
    """Its name; None: there is no earlier run."""
    records: Mapping[str, int]
    """How many are `unchanged`, `changed`, `new` and `gone` since."""
    answers: Mapping[str, int]
    """Agent → answers that it need not give again."""
    refused: Mapping[str, str]
    """Agent → why it is asked about every record."""


@dataclass(frozen=True, slots=True)
class AgentReady(Event):
    """A worker holds an agent's model."""

    agent_id: str
    worker: str
    load_s: float
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentLost(Event):
    """A worker that held an agent is gone or could not load it."""

    agent_id: str
    worker: str
    message: str


@dataclass(frozen=True, slots=True)
class AgentDraining(Event):
    """The router asks a worker nothing further; the worker may finish what it has in flight."""

    agent_id: str
    worker: str
    message: str


@dataclass(frozen=True, slots=True)
class BreakerChanged(Event):
    """The router leaves a worker that only fails alone for a while, then probes it."""

    agent_id: str
    worker: str
    state: str
    """`open` (left alone), `probing`, `closed` (it answers again)."""
    message: str


@dataclass(frozen=True, slots=True)
class AgentsScaled(Event):
    """The number of replicas that the agents' backlog asks for has changed."""

    wanted: dict[str, int]
    backlog: dict[str, int]
    """Agent → partitions that wait for it or are at one of its workers."""


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
    candidates: dict[str, dict[str, float]]
    """What the policy saw of the workers that could have been chosen (the chosen one and up to 15
    others): `in_flight` partitions, `in_flight_tokens`, `tokens_per_s`, `agreement`, and so on."""
    num_busy: int
    """Capable workers that could not be chosen because their windows were full."""


@dataclass(frozen=True, slots=True)
class PartitionUndecided(TaskEnded):
    """The first answers to some records differ too much: one more agent is asked about these."""

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
    peak_memory_bytes: int | None = None
    """Of the worker's process, so far."""


@dataclass(frozen=True, slots=True)
class AnswerFailed(Event):
    """One try of one agent on one partition came to nothing."""

    partition: int
    agent_id: str
    worker: str
    attempt: int
    message: str
    given_up: bool
    wall_s: float = 0.0
    """From asking to hearing of it."""


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
    """Agent → (its answers that say what was merged, its valid answers)."""


@dataclass(frozen=True, slots=True)
class Learned(Event):
    """The merge has learned from the whole corpus how far each agent can be trusted."""

    method: str
    weights: dict[str, float]
    """Agent → estimated accuracy, or weight, as the method has it."""
    why: str
    """In words, for people."""


@dataclass(frozen=True, slots=True)
class Escalated(Event):
    """All others have answered: the least confident records go to one more agent."""

    agent_id: str
    num_records: int
    num_records_of_all: int


@dataclass(frozen=True, slots=True)
class PhaseEnded(Event):
    """The submitting process goes on to its next phase; see `latency.phases`."""

    phase: str
    at_s: float
    """When it began, in seconds after the execution's start."""
    wall_s: float


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """All partitions are merged and the manifest is published."""

    num_results: int
    num_failures: int
    wall_s: float
