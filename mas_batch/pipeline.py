"""The only wiring: the stages of a run, one after the other, in the order in which data flows."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from dask.system import CPU_COUNT
from distributed import Client

from mas_batch import cluster, results
from mas_batch.agents.spec import AgentSpec, agent_specs
from mas_batch.agents.work import COMMITTED, RunRef, partition_statistics
from mas_batch.aggregate.merge import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, check_rule
from mas_batch.aggregate.tree import tree_reduce
from mas_batch.corpus import CorpusReader
from mas_batch.errors import ExitCode, JobError, RunError
from mas_batch.job import Job
from mas_batch.lock import RunLock
from mas_batch.monitor.event_log import EventLog
from mas_batch.monitor.events import Event, RunFinished, RunStarted
from mas_batch.partition import Partition, partition
from mas_batch.results import Committed, Plan
from mas_batch.routing.dask import DaskRouter
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Rules, Work
from mas_batch.routing.policies import POLICIES
from mas_batch.routing.scaling import Scaler
from mas_batch.storage import Store, parquet_bytes, without_credentials
from mas_batch.tasks import make_task

Emit = Callable[[Event], None]

PARTITIONS_PER_LEAF = 16
"""Partitions that one leaf of the statistics tree reads, at least."""

MAX_LEAVES = 1024
"""Of the statistics tree: the scheduler keeps some kB of each until it is done."""


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
        RunLockedError: another process works on this run, or has taken it over.
        MasBatchError: the run failed; what is committed is kept and resumed next time.
    """
    start = time.perf_counter()
    merge, stopping = merge_spec(job), stopping_rule(job)
    cluster.check_settings(job.cluster)
    if cluster.is_embedded(job.cluster, client):
        client = cluster.current_client()
    corpus = CorpusReader(job.corpus)
    store, name = open_store(job, corpus)
    if (summary := _published(job, store, start)) is not None:
        return summary
    with RunLock(store) as lock:
        # Whoever held the lock before may have completed the run.
        if (summary := _published(job, store, start)) is not None:
            return summary
        plan = results.read_plan(store) or _stage(job, store, corpus, lock)
        specs = agent_specs(
            job, embedded=cluster.is_embedded(job.cluster, client), num_cores=CPU_COUNT
        )
        # Of this execution, not of the run: late news of an earlier one's tasks is not for us.
        topic = f"mas-batch-{name}-{uuid.uuid4().hex[:8]}"
        ref = RunRef(
            store, topic, job.task, merge, stopping, plan.passthrough, job.output.keep_text
        )
        with (
            cluster.connect(job, specs, topic, client, scaler) as connection,
            _logged(store, emit) as log,
        ):
            _answer(connection, job, ref, specs, plan, name, log, lock)
            statistics = _statistics(connection.client, ref, specs, plan)
            lock.check()
            manifest = _publish(job, ref, name, plan, statistics)
            wall_s = time.perf_counter() - start
            counts = manifest["counts"]
            log(RunFinished(counts["results"], counts["failures"], wall_s))
    return _summary(job, store, manifest, wall_s, already_complete=False)


@contextmanager
def _logged(store: Store, emit: Emit) -> Iterator[Emit]:
    """Keep every event in the run as well, also of an execution that fails."""
    log = EventLog(store)

    def emit_and_keep(event: Event) -> None:
        log(event)
        emit(event)

    try:
        yield emit_and_keep
    except BaseException:
        with suppress(RunError):  # a full disk, say: what failed first is what people must read
            log.flush()
        raise
    log.flush()


def preview(job: Job) -> Preview:
    """Read the corpus and cut it as a run would, without a cluster, a model or a write.

    Raises:
        JobError: the job cannot run as written.
    """
    merge_spec(job)
    stopping_rule(job)
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
    )


def stopping_rule(job: Job) -> StoppingRule | None:
    """Return when a record needs no further answer; None: all that are asked for come.

    Raises:
        JobError: the job's merge method cannot be stopped early that way.
    """
    if job.routing.adaptive is None:
        return None
    # The last agent that is asked may give more than are wanted.
    most = job.answers_per_record + max(agent.samples for agent in job.agents) - 1
    rule = StoppingRule(job.routing.adaptive.confidence, most)
    check_rule(merge_spec(job), rule)
    return rule


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


def _answer(
    connection: cluster.Connection,
    job: Job,
    ref: RunRef,
    specs: dict[str, AgentSpec],
    plan: Plan,
    name: str,
    emit: Emit,
    lock: RunLock,
) -> None:
    """Ask the agents about everything that is not committed yet."""
    client = connection.client
    done = results.committed(ref.store, plan, specs)
    emit(_started(client, job, ref.store, plan, done, name))
    if done.num_merged == plan.num_partitions:
        return  # killed between the last merge and the manifest
    ref.store.remove_folder(results.JOURNAL)
    with DaskRouter(
        client, job, ref, specs, emit, check=lock.check, scaler=connection.scaler
    ) as router:
        router.host()
        results.write_engines(ref.store, router.engine_facts)
        work = _work(plan, done)
        if job.routing.mode == "native":
            work = router.run_native(work)
        dispatcher = Dispatcher(
            {agent.name: agent.samples for agent in job.agents},
            _rules(job),
            POLICIES[job.routing.policy](),
            work,
            plan.num_partitions - done.num_merged,
        )
        for agent_id in done.answered:
            if done.answered[agent_id].any():  # it works, as far as an earlier execution knows
                dispatcher.trust(agent_id)
        router.run(dispatcher)
        results.write_engines(ref.store, router.engine_facts)  # also of those that came later


def _rules(job: Job) -> Rules:
    routing = job.routing
    return Rules(
        answers_per_record=job.answers_per_record,
        first=routing.adaptive.first if routing.adaptive else None,
        window=routing.window,
        max_attempts=routing.max_attempts,
        weights=routing.weights,
        accuracies=job.merge.accuracies,
        speculate=routing.speculate,
        timeout_s=routing.timeout_s,
    )


def _work(plan: Plan, done: Committed) -> Iterator[Work]:
    for index, num_records, tokens in plan.sizes():
        if not done.merged[index]:
            yield Work(index, tokens, num_records, done.agents(index))


def _started(
    client: Client, job: Job, store: Store, plan: Plan, done: Committed, name: str
) -> RunStarted:
    return RunStarted(
        run=without_credentials(store.url),
        num_partitions=plan.num_partitions,
        num_records=plan.num_records,
        partitions_done=done.num_merged,
        records_done=plan.num_records_in(done.merged),
        answers_done=done.num_answers_to_open,
        answers_per_record=job.answers_per_record,
        earlier_runs=tuple(results.earlier_runs(_output(job), job.name, name)),
        dashboard_link=client.dashboard_link if job.cluster.dashboard_address else None,
    )


def _statistics(
    client: Client, ref: RunRef, specs: Sequence[str] | dict[str, AgentSpec], plan: Plan
) -> Any:
    """Count the committed tables and find their failures files, by a tree of tasks on workers."""
    indices = range(plan.num_partitions)
    per_leaf = max(PARTITIONS_PER_LEAF, -(-plan.num_partitions // MAX_LEAVES))
    groups = (
        (ref, indices[first : first + per_leaf], tuple(specs)) for first in indices[::per_leaf]
    )
    partial = tree_reduce(client, partition_statistics, groups, COMMITTED)
    return COMMITTED.combine([]) if partial is None else partial


def _publish(job: Job, ref: RunRef, name: str, plan: Plan, partial: Any) -> dict[str, Any]:
    """Check the invariant, write the agents table and the manifest."""
    store = ref.store
    statistics = COMMITTED.finalize(partial)
    counts = statistics["counts"]
    results.check_invariant(plan, counts["results"], counts["failures"])
    agents = [{"agent_id": agent_id, **facts} for agent_id, facts in counts.pop("agents").items()]
    store.replace("agents.parquet", parquet_bytes(pa.Table.from_pylist(agents)))
    manifest = {
        "format": results.FORMAT,
        "run": name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": counts,
        "agents": agents,
        "engines": results.read_engines(store),
        "merge": _merge_facts(ref.merge),
        "versions": {
            "python": platform.python_version(),
            **{
                package: version(package)
                for package in ("mas_batch", "dask", "distributed", "pyarrow")
            },
        },
        "files": results.manifest_files(
            store, plan, [agent.name for agent in job.agents], statistics["failures_files"]
        ),
    }
    store.remove_folder(results.JOURNAL)
    store.remove_orphans()  # all is committed: a temporary file is a killed or beaten writer's
    results.publish(store, manifest)
    return manifest


def _merge_facts(spec: MergeSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {"method": spec.method, "accuracies": dict(spec.accuracies)}
    if spec.method == "mbr":
        facts["utility"] = spec.utility
    return facts


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
