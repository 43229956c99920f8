"""The only wiring: the stages of a run, one after the other, in the order in which data flows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from dask.system import CPU_COUNT
from distributed import Client

from mas_batch import cluster, report
from mas_batch.agents.spec import agent_specs
from mas_batch.cards import card
from mas_batch.corpus import CorpusReader, open_corpus
from mas_batch.engines.classical import examples
from mas_batch.engines.job_options import check_options
from mas_batch.errors import CorpusChangedError, ExitCode, JobError
from mas_batch.events import AnswersReused, Emit, RunFinished
from mas_batch.execution import execute, new_topic
from mas_batch.incremental import (
    Present,
    Settling,
    Since,
    asked_as,
    begin_retry,
    last_published,
    latest_version,
    read_since,
    take_over,
)
from mas_batch.incremental.earlier import EarlierRun
from mas_batch.job import Job
from mas_batch.latency.phases import COUNTING, LEARNING, PUBLISHING, READING, STARTING, Phases
from mas_batch.merging import check_merging, labels_met, labels_version, merge_spec
from mas_batch.monitor.feed import introduce
from mas_batch.partition import Partition, partition
from mas_batch.routing.scaling import Scaler
from mas_batch.run_folder.lock import RunLock, job_lock
from mas_batch.run_folder.manifest import read_manifest, write_job
from mas_batch.run_folder.names import (
    FIRST_PASS,
    SAMPLE_PASS,
    SECOND_PASS,
    earlier_runs,
    first_version,
    run_name,
)
from mas_batch.run_folder.plan import Plan, read_plan, stage
from mas_batch.run_folder.read import Run
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.stages.asking import Asking
from mas_batch.stages.memory import Memory
from mas_batch.stages.publishing import publish, remove_leftovers
from mas_batch.stages.whole_corpus import (
    AllAnswers,
    escalation,
    guaranteed_escalation,
    learned,
    sample_to_escalate,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """The outcome of a run."""

    run: str
    """The run folder, as given to `open_run`."""
    manifest: dict[str, Any]
    wall_s: float
    """Time of this execution; earlier executions of a resumed run are not in it."""
    already_complete: bool
    """Whether the run was complete before; no agent was asked."""
    exit_code: int

    def _repr_html_(self) -> str:
        counts = self.manifest["counts"]
        done = "complete already, no agent was asked" if self.already_complete else None
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
    retry_failed: bool = False,
) -> Summary:
    """Execute the job, or what is left of it, and publish the run.

    Args:
        client: the user's own. None uses the job's `cluster` section, and if that names no
            scheduler, the client that is active in this process (a notebook's), if any.
        scaler: starts and ends workers of the client's cluster, between `count` and `max_count`
            of each agent; the embedded cluster has a scaler of its own.
        emit: called with every event, from the calling thread and in order.
        retry_failed: ask again for what failed in the published run, where that may help, and
            publish a whole new version of it, NAME-retry-1 and so on.

    Raises:
        JobError: the job cannot run as written; no task was started. Or there is nothing that is
            published to retry.
        RunLockedError: another process works on this run, or has taken it over; with `since`,
            also on any other run of the job.
        MasBatchError: the run failed; what is committed is kept and resumed next time.
    """
    start = time.perf_counter()
    phases = Phases(READING, start)
    merge, stopping = check_merging(job)
    check_options(job)
    cluster.check_settings(job.cluster)
    if cluster.is_embedded(job.cluster, client):
        client = cluster.current_client()
    corpus = open_corpus(job)
    store, name = open_store(job, corpus)
    output = _output_store(job)
    retry = begin_retry(output, job.name, first_version(name)) if retry_failed else None
    if retry is not None and (retry.earlier.name != name or not retry.is_in_vain):
        store, name = output.child(retry.name), retry.name
    if (summary := _published_summary(job, store, start)) is not None:
        remove_leftovers(store)
        if not store.exists(report.NAME):  # an execution was killed before it wrote the report
            _write_report(store, summary.manifest)
        return summary
    is_embedded = cluster.is_embedded(job.cluster, client)
    if job.since is None:
        check_options(job, environment=is_embedded)
    one_at_a_time = job_lock(output, job.name) if job.since else nullcontext()
    with one_at_a_time as job_held, RunLock(store, within=job_held) as lock:
        # The process that held the lock before may have completed the run.
        if (summary := _published_summary(job, store, start)) is not None:
            return summary
        plan = read_plan(store) or _stage_corpus(job, store, corpus, lock)
        present = Present(job, store, plan, is_embedded)
        since: Since | None
        if retry is not None:
            since = _take_over(present, lambda: retry.earlier, lock)
        elif job.since:
            since = _take_over(present, lambda: last_published(output, job.name, name), lock)
        else:
            since = read_since(store)  # an earlier execution may have taken answers over
        job_to_ask, facts = _job_of_agents_to_ask(job, since), _manifest_facts(job, since)
        if job_to_ask is not None:
            check_options(job_to_ask, environment=is_embedded)
        phases.begin(STARTING)
        specs = (
            agent_specs(job_to_ask, embedded=is_embedded, num_cores=CPU_COUNT) if job_to_ask else {}
        )
        topic = new_topic(name)
        live = introduce(job, name, topic, time.time())
        memory = Memory(job, merge) if job.merge.history else None
        ref = RunRef(
            store, topic, job.task, merge, stopping, plan.passthrough, job.output.keep_text,
            reuses=since is not None and since.run is not None, code=job.cluster.code,
        )  # fmt: skip
        connecting = (
            cluster.connect(job_to_ask, specs, topic, client, scaler)
            if job_to_ask is not None
            else cluster.connect_to_merge(job, plan.num_partitions, client)
        )
        with execute(live, store, lock, connecting, phases, emit) as execution:
            asking = Asking(execution, job, specs, plan, memory)
            if since is not None:
                reused = AnswersReused(since.run, since.records, since.answers, since.refused)
                execution.log(reused)
            ref, statistics = _answer_and_merge(asking, ref)
            lock.check()
            phases.begin(PUBLISHING)
            execution.log.ledger.flush()
            agents = [agent.name for agent in job.agents]
            manifest = publish(ref, name, plan, agents, statistics, facts, job)
            phases.end()
            wall_s = time.perf_counter() - start
            counts = manifest["counts"]
            execution.log(RunFinished(counts["results"], counts["failures"], wall_s))
        _write_report(store, manifest)
    return _summary(job, store, manifest, wall_s, already_complete=False)


def _write_report(store: Store, manifest: dict[str, Any]) -> None:
    """Write the report of a published run; a run is complete even if that fails."""
    try:
        report.write(Run(store, manifest))
    except Exception as error:
        location = store.location(report.NAME)
        logger.warning("%s is not written: %s; `mas-batch report` tries again", location, error)


def preview(job: Job) -> Preview:
    """Read the corpus and cut it as a run would, without a cluster, a model or a write.

    Raises:
        JobError: the job cannot run as written.
    """
    check_merging(job)
    check_options(job)
    corpus = open_corpus(job)
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
        earlier_runs=tuple(earlier_runs(_output_store(job), job.name, name)),
        num_files=len(corpus.files),
        num_records=num_records,
        num_unusable=num_unusable,
        num_partitions=num_partitions,
        estimated_tokens=tokens,
        answers_per_record=job.answers_per_record,
    )


def open_store(job: Job, corpus: CorpusReader) -> tuple[Store, str]:
    """Return the store and the name of this job's run on this corpus: of its latest version."""
    taught = [examples.fingerprint(agent.options) for agent in job.agents]
    if job.merge.calibrate is not None:
        taught.append(labels_version(job))
    output = _output_store(job)
    name = latest_version(output, run_name(job, corpus.fingerprint, taught))
    return output.child(name), name


def _output_store(job: Job) -> Store:
    return Store(job.output.path, job.output.storage_options)


def _partitions(job: Job, corpus: CorpusReader) -> Iterator[Partition]:
    found = partition(
        corpus,
        max_tokens=job.partition.max_tokens,
        max_records=job.partition.max_records,
        tokens_per_record=job.task.max_new_tokens,
    )
    return found if job.merge.calibrate is None else labels_met(merge_spec(job), found)


def _stage_corpus(job: Job, store: Store, corpus: CorpusReader, lock: RunLock) -> Plan:
    write_job(store, job)
    try:
        return stage(store, corpus, _partitions(job, corpus))
    except (JobError, CorpusChangedError):
        lock.remove_run()  # what is wrong leaves nothing behind, and the next try has another name
        raise


def _take_over(present: Present, earlier: Callable[[], EarlierRun | None], lock: RunLock) -> Since:
    settling = Settling.of(present.job, *check_merging(present.job))
    return take_over(present, settling, earlier, lock.check)


def _job_of_agents_to_ask(job: Job, since: Since | None) -> Job | None:
    """Return the job with only the agents that may have to be asked; None: there are none."""
    if since is None:
        return job
    return job.with_agents(since.to_ask) if since.to_ask else None


def _manifest_facts(job: Job, since: Since | None) -> dict[str, Any]:
    """Return the manifest's facts about how agents are asked and what was reused."""
    facts: dict[str, Any] = {"asked_as": {a.name: asked_as(job, a) for a in job.agents}}
    if since is not None:
        facts["since"] = {"run": since.run, "records": since.records, "refused": since.refused}
        if since.is_retry:
            facts["since"]["is_retry"] = True
    return facts


def _answer_and_merge(asking: Asking, ref: RunRef) -> tuple[RunRef, Any]:
    """Answer the corpus and merge the answers; returns how they were merged, and the statistics.

    Most partitions are merged as their answers come. A merge that needs the whole corpus, or an
    escalation of the least confident records, takes two passes: a provisional merge, which marks
    the partitions that are done, and the final one.
    """
    job, memory = asking.job, asking.memory
    escalate = job.routing.escalate
    phases, name = asking.execution.phases, first_version(asking.execution.name)
    first = tuple(agent.name for agent in job.first_agents)
    every = tuple(agent.name for agent in job.agents)
    if not ref.merge.needs_corpus and escalate is None:
        asking.answer(ref, first)
        phases.begin(COUNTING)
        return ref, asking.all_answers(ref, every).statistics(merge=False)
    provisional = replace(ref, merge=ref.merge.first_pass, into=FIRST_PASS)
    asking.answer(provisional, first)
    phases.begin(LEARNING)
    answers = asking.all_answers(replace(ref, stopping=None, passes=(FIRST_PASS,)), first)
    prior = memory.prior(besides=name) if memory else None
    if escalate is None:
        answers = learned(answers, "learned.json", prior)
    elif escalate.target is None:
        ranked = learned(answers, "learned-before-escalation.json", prior)
        chosen = escalation(ranked, escalate)
        asking.escalate(replace(ranked.run, escalation=chosen, into=SECOND_PASS))
        phases.begin(LEARNING)
        answers = learned(_with_escalated(answers, every), "learned.json", prior)
    else:
        # Nothing is learned of the escalated answers: what they were compared with stays.
        ranked = learned(answers, "learned.json", prior)
        # By the job's name: with `since`, the next run finds most of its sample answered.
        sampled = sample_to_escalate(ranked, escalate, seed=job.name)
        asking.escalate(
            replace(ranked.run, escalation=sampled, into=SAMPLE_PASS, answers_into=SAMPLE_PASS)
        )
        phases.begin(LEARNING)
        chosen = guaranteed_escalation(ranked, escalate, sampled)
        asking.escalate(replace(ranked.run, escalation=chosen, into=SECOND_PASS))
        answers = _with_escalated(ranked, every)
    if memory is not None and answers.run.merge.reliability is not None:
        memory.keep(name, answers.run.merge.reliability)
    phases.begin(COUNTING)
    return answers.run, answers.statistics(merge=True)


def _with_escalated(answers: AllAnswers, agents: tuple[str, ...]) -> AllAnswers:
    both = replace(answers.run, passes=(FIRST_PASS, SECOND_PASS))
    return replace(answers, run=both, agents=agents)


def _published_summary(job: Job, store: Store, start: float) -> Summary | None:
    """Return the summary of the run if it is complete, else None."""
    manifest = read_manifest(store)
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
