"""The only wiring: the stages of a run, one after the other, in the order in which data flows."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from dask.system import CPU_COUNT
from distributed import Client

from mas_batch import cluster, report, results
from mas_batch.agents.spec import agent_specs
from mas_batch.agents.work import RunRef
from mas_batch.aggregate.escalation import check_method
from mas_batch.aggregate.merge_spec import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, check_rule
from mas_batch.asking import Asking
from mas_batch.cards import card
from mas_batch.corpus import CorpusReader
from mas_batch.errors import ExitCode, JobError, RunError
from mas_batch.history import Memory
from mas_batch.incremental import Present, Settling, Since, asked_as, read_since, take_over
from mas_batch.job import Job
from mas_batch.latency.ledger import Ledger
from mas_batch.latency.phases import COUNTING, LEARNING, PUBLISHING, READING, STARTING, Phases
from mas_batch.learning import escalation, learned
from mas_batch.lock import RunLock, job_lock
from mas_batch.monitor.event_log import EventLog
from mas_batch.monitor.events import AnswersReused, Event, RunFinished
from mas_batch.monitor.feed import Feed, introduce
from mas_batch.partition import Partition, partition
from mas_batch.publishing import publish, remove_rest
from mas_batch.results import Plan, Run
from mas_batch.routing.scaling import Scaler
from mas_batch.routing.upkeep import run_span
from mas_batch.storage import Store
from mas_batch.tasks import make_task

logger = logging.getLogger(__name__)

Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of a run."""

    run: str
    """The run folder, as given to `open_run`."""
    manifest: dict[str, Any]
    wall_s: float
    """Of this execution; a resumed run's earlier executions are not in it."""
    already_complete: bool
    exit_code: int

    def _repr_html_(self) -> str:
        counts = self.manifest["counts"]
        done = "answered already, nothing was asked" if self.already_complete else None
        facts = {
            "results": counts["results"],
            "failures": counts["failures"],
            "exit code": f"{self.exit_code}: {_MEANINGS[self.exit_code]}",
            "took": f"{self.wall_s:.1f} s",
            "note": done,
            "folder": self.run,
        }
        return card("summary", self.manifest["run"], facts)


_MEANINGS = {
    ExitCode.ANSWERED: "no more records failed than the job allows",
    ExitCode.TOO_MANY_FAILED_RECORDS: "more records failed than the job allows",
}


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would do: the plan, made without asking a model."""

    run: str
    exists: bool
    earlier_runs: tuple[str, ...]
    num_files: int
    num_records: int
    num_unusable: int
    num_partitions: int
    estimated_tokens: int
    answers_per_record: int


def run(
    job: Job,
    *,
    client: Client | None = None,
    scaler: Scaler | None = None,
    emit: Emit = lambda event: None,
) -> Summary:
    """Execute the job, or what is left of it, and publish the result.

    Args:
        client: the user's own. None uses the job's `cluster` section, and if that names no
            scheduler, the client that is active in this process (a notebook's), if any.
        scaler: starts and ends workers of that cluster, between `count` and `max_count` of each
            agent; the embedded cluster has its own.
        emit: called with every event, from the calling thread and in order.

    Raises:
        JobError: the job cannot run as written; no task was started.
        RunLockedError: another process works on this run, or has taken it over; with `since`,
            also on any other run of the job.
        MasBatchError: the run failed; what is committed is kept and resumed next time.
    """
    start = time.perf_counter()
    phases = Phases(READING, start)
    merge, stopping = _merging(job)
    cluster.check_settings(job.cluster)
    if cluster.is_embedded(job.cluster, client):
        client = cluster.current_client()
    corpus = CorpusReader(job.corpus)
    store, name = open_store(job, corpus)
    if (summary := _published(job, store, start)) is not None:
        remove_rest(store)
        return summary
    one_at_a_time = job_lock(_output(job), job.name) if job.since else nullcontext()
    with one_at_a_time as job_held, RunLock(store, within=job_held) as lock:
        # Whoever held the lock before may have completed the run.
        if (summary := _published(job, store, start)) is not None:
            return summary
        plan = results.read_plan(store) or _stage(job, store, corpus, lock)
        is_embedded = cluster.is_embedded(job.cluster, client)
        since = _since(Present(job, _output(job), store, name, plan, is_embedded), lock)
        asked, origin = _asked(job, since), _origin(job, since)
        phases.begin(STARTING)
        specs = agent_specs(asked, embedded=is_embedded, num_cores=CPU_COUNT) if asked else {}
        # Of this execution, not of the run: late news of an earlier one's tasks is not for us.
        topic = f"mas-batch-{name}-{uuid.uuid4().hex[:8]}"
        memory = Memory(job, merge) if job.merge.history else None
        ref = RunRef(
            store, topic, job.task, merge, stopping, plan.passthrough, job.output.keep_text,
            reuses=since is not None and since.run is not None,
        )  # fmt: skip
        with (
            (
                cluster.connect(asked, specs, topic, client, scaler)
                if asked is not None
                else cluster.connect_to_merge(job, plan.num_partitions, client)
            ) as connection,
            Feed(connection.client, introduce(job, name, topic, time.time())) as feed,
            _logged(store, (feed, emit), phases) as log,
            run_span(name),
        ):
            asking = Asking(connection, job, specs, plan, name, log, lock, memory, phases)
            if since is not None:
                log(AnswersReused(since.run, since.records, since.answers, since.refused))
            ref, statistics = _answer_and_merge(asking, ref)
            lock.check()
            phases.begin(PUBLISHING)
            log.ledger.flush()
            agents = [agent.name for agent in job.agents]
            manifest = publish(ref, name, plan, agents, statistics, origin)
            phases.end()
            wall_s = time.perf_counter() - start
            counts = manifest["counts"]
            log(RunFinished(counts["results"], counts["failures"], wall_s))
        _write_report(store, manifest)
    return _summary(job, store, manifest, wall_s, already_complete=False)


def _write_report(store: Store, manifest: dict[str, Any]) -> None:
    """Write the report of a published run; the run is complete with it or without."""
    try:
        report.write(Run(store, manifest))
    except Exception as error:
        location = store.location(report.NAME)
        logger.warning("%s is not written: %s; `mas-batch report` tries again", location, error)


class _Log:
    """Every event goes to the run's event log, its ledger, and whoever else reads them."""

    def __init__(self, store: Store, readers: Sequence[Emit], start: float) -> None:
        self._events = EventLog(store)
        self._readers = readers
        self.ledger = Ledger(store, self._events.execution, start)

    def __call__(self, event: Event) -> None:
        self._events(event)
        self.ledger(event)
        for read in self._readers:
            read(event)

    def flush(self) -> None:
        self._events.flush()
        self.ledger.flush()


@contextmanager
def _logged(store: Store, readers: Sequence[Emit], phases: Phases) -> Iterator[_Log]:
    """Keep every event in the run as well, also of an execution that fails."""
    log = _Log(store, readers, phases.start)
    phases.tell(log)
    try:
        yield log
    except BaseException:
        with suppress(RunError):  # a full disk, say: what failed first is what people must read
            phases.end()
            log.flush()
        raise
    log.flush()


def preview(job: Job) -> Preview:
    """Read the corpus and cut it as a run would, without a cluster, a model or a write.

    Raises:
        JobError: the job cannot run as written.
    """
    _merging(job)
    corpus = CorpusReader(job.corpus)
    store, name = open_store(job, corpus)
    num_records = num_unusable = num_partitions = tokens = 0
    for part in _partitions(job, corpus):
        num_partitions += 1
        num_records += len(part.records)
        num_unusable += sum(record.reason is not None for record in part.records)
        tokens += part.estimated_tokens
    return Preview(
        run=store.url,
        exists=store.exists("job.yaml"),
        earlier_runs=tuple(results.earlier_runs(_output(job), job.name, name)),
        num_files=len(corpus.files),
        num_records=num_records,
        num_unusable=num_unusable,
        num_partitions=num_partitions,
        estimated_tokens=tokens,
        answers_per_record=job.answers_per_record,
    )


def open_store(job: Job, corpus: CorpusReader) -> tuple[Store, str]:
    """Return the store and the name of the run that this job on this corpus means."""
    name = results.run_name(job, corpus)
    return _output(job).child(name), name


def merge_spec(job: Job) -> MergeSpec:
    """Fill the job's merge section with the task's defaults."""
    task = make_task(job.task)
    return MergeSpec(
        method=job.merge.method or task.default_merge,
        utility=job.merge.utility or task.default_utility,
        accuracies=job.merge.accuracies,
        weights=job.merge.weights,
        abstain_below=job.merge.abstain_below,
        answer_kind=task.answer_kind,
        num_labels=len(job.task.labels) if job.task.labels else None,
        labels=job.task.labels,
        agents=tuple(agent.name for agent in job.agents),
        encoder=job.merge.encoder,
        covers_text=task.covers_text,
    )


def stopping_rule(job: Job) -> StoppingRule | None:
    """Return when a record needs no further answer; None: all that are asked for come.

    Raises:
        JobError: the job's merge method cannot be stopped early that way.
    """
    if job.routing.adaptive is None:
        return None
    # The last agent that is asked may give more than are wanted.
    most = job.answers_per_record + max(agent.samples for agent in job.first_agents) - 1
    rule = StoppingRule(job.routing.adaptive.confidence, most)
    check_rule(merge_spec(job).first_pass, rule)
    return rule


def _merging(job: Job) -> tuple[MergeSpec, StoppingRule | None]:
    """Check all of the job that has to do with merging."""
    merge = merge_spec(job)
    if job.routing.escalate is not None:
        check_method(merge.method)
    return merge, stopping_rule(job)


def _output(job: Job) -> Store:
    return Store(job.output.path, job.output.storage_options)


def _partitions(job: Job, corpus: CorpusReader) -> Iterator[Partition]:
    return partition(
        corpus,
        max_tokens=job.partition.max_tokens,
        max_records=job.partition.max_records,
        tokens_per_record=job.task.max_new_tokens,
    )


def _stage(job: Job, store: Store, corpus: CorpusReader, lock: RunLock) -> Plan:
    results.write_job(store, job)
    try:
        return results.stage(store, corpus, _partitions(job, corpus))
    except JobError:
        lock.remove_run()  # a wrong job leaves nothing behind
        raise


def _since(present: Present, lock: RunLock) -> Since | None:
    """Take over what an earlier run has answered, if the job says so; None: it does not."""
    job = present.job
    if job.since is None:
        return read_since(present.store)  # an execution that was cut short may have
    return take_over(present, Settling.of(job, *_merging(job)), lock.check)


def _asked(job: Job, since: Since | None) -> Job | None:
    """Return the job with those agents only that may have to be asked; None: there are none."""
    if since is None:
        return job
    return job.with_agents(since.to_ask) if since.to_ask else None


def _origin(job: Job, since: Since | None) -> dict[str, Any]:
    """Say in the manifest how the agents were asked, and what they were not asked."""
    facts: dict[str, Any] = {"asked_as": {a.name: asked_as(job, a) for a in job.agents}}
    if since is not None:
        facts["since"] = {"run": since.run, "records": since.records, "refused": since.refused}
    return facts


def _answer_and_merge(asking: Asking, ref: RunRef) -> tuple[RunRef, Any]:
    """Answer the corpus and merge it; returns how it was merged, and the statistics.

    Most merges are made as the answers come. One that needs the whole corpus, or whose least
    confident records are escalated, is made in two passes: a provisional merge, which tells
    which partitions are done, and the final one.
    """
    job, memory = asking.job, asking.memory
    escalate = job.routing.escalate
    first = tuple(agent.name for agent in job.first_agents)
    every = tuple(agent.name for agent in job.agents)
    if not ref.merge.needs_corpus and escalate is None:
        asking.answer(ref, first)
        asking.phases.begin(COUNTING)
        return ref, asking.corpus(ref, every).statistics(merge=False)
    provisional = replace(ref, merge=ref.merge.first_pass, into=results.FIRST_PASS)
    asking.answer(provisional, first)
    asking.phases.begin(LEARNING)
    corpus = asking.corpus(replace(ref, stopping=None, passes=(results.FIRST_PASS,)), first)
    prior = memory.prior(besides=asking.name) if memory else None
    if escalate is not None:
        ranked = learned(corpus, "learned-before-escalation.json", prior)
        chosen = escalation(ranked, escalate)
        asking.escalate(replace(ranked.run, escalation=chosen, into=results.SECOND_PASS))
        asking.phases.begin(LEARNING)
        both = replace(corpus.run, passes=(results.FIRST_PASS, results.SECOND_PASS))
        corpus = replace(corpus, run=both, agents=every)
    corpus = learned(corpus, "learned.json", prior)
    if memory is not None and corpus.run.merge.reliability is not None:
        memory.keep(asking.name, corpus.run.merge.reliability)
    asking.phases.begin(COUNTING)
    return corpus.run, corpus.statistics(merge=True)


def _published(job: Job, store: Store, start: float) -> Summary | None:
    """Return what came of the run if it is complete."""
    manifest = results.read_manifest(store)
    if manifest is None:
        return None
    return _summary(job, store, manifest, time.perf_counter() - start, already_complete=True)


def _summary(
    job: Job, store: Store, manifest: dict[str, Any], wall_s: float, *, already_complete: bool
) -> Summary:
    counts = manifest["counts"]
    failed = counts["failures"] / max(1, counts["results"] + counts["failures"])
    too_many = failed > job.output.max_failed_fraction
    exit_code = ExitCode.TOO_MANY_FAILED_RECORDS if too_many else ExitCode.ANSWERED
    return Summary(store.url, manifest, wall_s, already_complete, exit_code)
