"""Worker side: the three tasks of a run. Each commits to storage before it reports.

Texts travel through storage only; a task returns nothing and reports small facts as a Dask
event (see `routing.dask` for why). The function names are what the Dask dashboard shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.agents.answering import AgentProfile, answer_records, prompt_hash
from mas_batch.agents.checks import check_engine
from mas_batch.agents.encoding import encoder_for
from mas_batch.agents.held import HeldPartition, usable_records
from mas_batch.agents.host import Report, current_host, peak_memory_bytes, report, report_timed
from mas_batch.agents.quarantine import Journal, answer_carefully
from mas_batch.agents.reuse import asked_now, in_order, known_answers, without_sampled
from mas_batch.agents.spec import AgentSpec
from mas_batch.aggregate.escalation import picked
from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.reductions import RUN_STATISTICS
from mas_batch.aggregate.stopping import undecided
from mas_batch.engines.base import Engine, Sampling
from mas_batch.errors import EngineError, EngineUnavailableError, JobError, ModelError, Reason
from mas_batch.job import Task
from mas_batch.latency.times import Stopwatch
from mas_batch.records import ANSWERS, Answer, Record, join_answers
from mas_batch.run_folder.commits import commit_results, merged_agents
from mas_batch.run_folder.names import answers_name
from mas_batch.run_folder.plan import read_records
from mas_batch.run_folder.ref import RunRef
from mas_batch.tasks import make_task


def load_agents(run: RunRef, specs: Sequence[AgentSpec]) -> None:
    """Make the engine of these agents resident on this worker, and check it for each of them.

    An agent for which it cannot do the task is reported as refused; the others go on without it.

    Args:
        specs: agents of one engine: their `engine_key` is the same.

    Raises:
        ModelError, JobError: the model cannot be loaded, or cannot do the task for any of them.
    """
    host = current_host(run.topic)
    load_s = host.load(specs[0])
    agents: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for spec in specs:
        try:
            engine = host.engine(spec)
            check_engine(make_task(run.task), engine, spec.agent)
        except (ModelError, JobError) as error:
            refused[spec.agent_id] = str(error)
            if len(refused) == len(specs):
                raise
            continue
        agents[spec.agent_id] = {
            "family_id": host.family_id(spec),
            "engine": _facts(engine, spec.agent.adapter),
        }
    facts = {"load_s": load_s, "concurrent": host.concurrent, "max_in_flight": host.max_in_flight}
    facts |= {"joins": host.joins, "agents": agents, "refused": refused}
    report(run.topic, Report.LOADED, facts)


def _facts(engine: Engine, adapter: str | None) -> dict[str, Any]:
    """Return what an engine says of itself, and of its adapters only the agent's."""
    facts = dict(engine.describe())
    adapters = facts.pop("adapters", {})
    if adapter is not None:
        facts["adapter"] = {"source": adapter, **adapters.get(adapter, {})}
    return facts


def answer_partition(
    run: RunRef,
    spec: AgentSpec,
    partition: int,
    attempt: int,
    *,
    careful: bool = False,
    earlier: Sequence[str] = (),
) -> None:
    """Ask an agent of this host about every usable record of the partition; commit the answers.

    Several run at once, in threads, and their requests share the engine's batches. If the
    engine's server is away, nothing is committed, and the report says so.

    Args:
        careful: ask one record at a time, with a journal: a worker has died at this partition. It
            must be the only task of the host: a death would be blamed on it.
        earlier: ask only about records that these agents' answers leave undecided; empty: all.
    """
    host, watch = current_host(run.topic), Stopwatch()
    name = answers_name(partition, spec.agent_id)
    if run.answered.exists(name):  # a copy of this task finished first
        table = join_answers([run.answered.read_table(name)])
        watch.lap("read")
    else:
        try:
            table = _ask_agent(
                run, spec, partition, attempt, watch, careful=careful, earlier=earlier
            )
        except EngineUnavailableError as error:  # Dask would log the traceback of each try
            facts = {"partition": partition, "agent_id": spec.agent_id, "message": error.message}
            facts |= {"retry_after_s": error.retry_after_s, "wait_s": error.wait_s}
            report(run.topic, Report.AWAY, facts)
            return
        watch.lap("process")
        if not run.answered.commit_table(name, table):
            table = join_answers([run.answered.read_table(name)])
        watch.lap("write")
    if careful:
        Journal(run.store, partition, spec.agent_id).remove()
    facts = {"partition": partition, "agent_id": spec.agent_id, "attempt": attempt}
    facts |= _counts_of_answers(asked_now(without_sampled(run, partition, spec.agent_id, table)))
    watch.lap("process")
    report_timed(run.topic, Report.ANSWERED, facts, watch.times(host.take_idle_s()))


def _ask_agent(
    run: RunRef,
    spec: AgentSpec,
    partition: int,
    attempt: int,
    watch: Stopwatch,
    *,
    careful: bool,
    earlier: Sequence[str],
) -> pa.Table:
    host = current_host(run.topic)
    family_id = host.family_id(spec)
    watch.lap("process")
    held = host.held(run, partition)
    records = _records_to_ask(run, partition, held, earlier)
    known, answered, missing = known_answers(run, partition, spec.agent_id, records)
    read_s = watch.lap("read")
    task = make_task(run.task)
    profile = profile_of(run.task, spec, family_id, host.engine(spec))
    client = host.client(spec, held)

    def ask(asked: Sequence[Record]) -> list[Answer]:
        return answer_records(asked, task, client, profile)

    def report_and_ask(asked: Sequence[Record]) -> list[Answer]:
        report(run.topic, Report.ANSWERING, {"partition": partition})
        return ask(asked)

    if careful:
        journal = Journal(run.store, partition, spec.agent_id)
        answers = answer_carefully(missing, report_and_ask, journal, profile)
    else:
        answers = ask(missing)
    host.check_open()
    if _all_failed_in_engine(answers):
        # After `since: last` perhaps only records are left that always fail. So the check includes
        # a record that the agent has answered before, if there is one.
        _check_engine_works([*answers, *ask(answered[:1])])
    table = _answers_table(
        answers,
        worker=host.worker_name,
        attempt=attempt,
        prompt_hash=prompt_hash(task, profile),
        transfer_s=read_s,
        processing_s=watch.model(answers, client.asked_s),
    )
    return in_order([known, table], records) if known.num_rows else table


_ENGINE_REASONS = (Reason.ENGINE_ERROR, Reason.OUT_OF_MEMORY, Reason.WORKER_DIED)


def _check_engine_works(answers: Sequence[Answer]) -> None:
    """Tell a broken engine from broken records.

    Raises:
        EngineError: the engine failed on every one of several records; nothing is committed, and
            the partition is tried again, on another worker if possible.
    """
    if _all_failed_in_engine(answers) and len({answer.record_id for answer in answers}) > 1:
        raise EngineError(f"failed on all of {len(answers)} answers; {answers[0].message}")


def _all_failed_in_engine(answers: Sequence[Answer]) -> bool:
    return bool(answers) and all(answer.reason in _ENGINE_REASONS for answer in answers)


def merge_partition(
    run: RunRef, partition: int, agents: Sequence[str], *, final: bool = True
) -> None:
    """Merge the committed answers of `agents`; commit results and failures of the partition.

    Args:
        final: if False and records are undecided, only report how many are, so that the dispatcher
            asks one more agent.
    """
    identity, watch = {"partition": partition, "agents": list(agents)}, Stopwatch()
    records = read_records(run.store, partition, run.passthrough)
    answers = committed_answers(run, partition, agents)
    watch.lap("read")
    spec = run.merge
    if run.escalation is not None:  # this merge only marks the partition; the final one is later
        records = records.filter(pc.is_in(records["record_id"], answers["record_id"]))
        spec = spec.first_pass
    encode = encoder_for(spec, answers)
    if not final and run.stopping is not None:
        still_open = undecided(records, answers, spec, run.stopping, encode)
        if still_open:
            facts = {"num_undecided": len(still_open), "num_records": records.num_rows}
            watch.lap("process")
            report_timed(run.topic, Report.MERGED, {**identity, **facts}, watch.times())
            return
    merged, failures = merge_answers(records, answers, spec, encode)
    agreement = _agreement(merged, failures, answers, spec.answer_kind)
    watch.lap("process")
    num_results, num_failures = commit_merged(run, partition, merged, failures, agents)
    watch.lap("write")
    facts = {
        "num_results": num_results,
        "num_failures": num_failures,
        "reasons": dict(Counter(failures["reason"].to_pylist())),
        "agreement": agreement,
    }
    report_timed(run.topic, Report.MERGED, {**identity, **facts}, watch.times())


def commit_merged(
    run: RunRef, partition: int, merged: pa.Table, failures: pa.Table, agents: Sequence[str]
) -> tuple[int, int]:
    """Commit a partition's merge of these agents' answers; returns how many results and failures
    it has."""
    if not run.keep_text:
        merged = merged.drop_columns(["text"])
    return commit_results(run.merged, partition, merged, failures, agents)


def merge_committed(
    run: RunRef, partition: int, agents: Sequence[str], records: pa.Table
) -> tuple[pa.Table, pa.Table]:
    """Merge these agents' answers, which are all committed; returns (results, failures)."""
    answers = committed_answers(run, partition, agents)
    return merge_answers(records, answers, run.merge, encoder_for(run.merge, answers))


def committed_answers(run: RunRef, partition: int, agents: Sequence[str]) -> pa.Table:
    """Read the answers of these agents to the partition.

    Raises:
        FileNotFoundError: one of the agents has no answers.
    """
    names = [answers_name(partition, agent) for agent in agents]
    return join_answers(run.answered.read_table(name) for name in names)


def agents_merged(run: RunRef, partition: int, agents: Sequence[str]) -> list[str]:
    """Return those of the agents, in their order, whose answers were merged in the run's `passes`.

    An agent whose answers are committed need not be among them: a copy of a slow task may commit
    after its partition was merged without it. (Runs of formats 1 and 2 do not say whose answers
    were merged; for them it is all agents whose answers are committed.)
    """
    named: set[str] = set()
    for folder in run.passes:
        found = merged_agents(run.store.child(folder), partition)
        if found is None:
            return agents_with_answers(run, partition, agents)
        named.update(found)
    return [agent for agent in agents if agent in named]


def agents_with_answers(run: RunRef, partition: int, agents: Sequence[str]) -> list[str]:
    """Return those of the agents, in their order, whose answers to the partition are committed."""
    names = ((agent, answers_name(partition, agent)) for agent in agents)
    return [agent for agent, name in names if run.answered.exists(name)]


def _agreement(
    merged: pa.Table, failures: pa.Table, answers: pa.Table, answer_kind: str
) -> dict[str, tuple[int, int]]:
    """Return agent → (answers that say what is published, valid answers)."""
    counts = RUN_STATISTICS.chunk(merged, failures, answers, answer_kind)["agents"]
    return {agent: (each["agreements"], each["answers"]) for agent, each in counts.items()}


def profile_of(task: Task, spec: AgentSpec, family_id: str, engine: Engine) -> AgentProfile:
    """Return how the agent is asked: its prompts and its sampling."""
    # Of `engine: auto` the job could not tell whether it can.
    reads_labels = spec.agent.reads_labels(task) and getattr(engine, "scores_choices", False)
    agent = spec.agent
    return AgentProfile(
        agent_id=agent.name,
        family_id=family_id,
        prompt=agent.prompt,
        system=agent.system,
        sampling=Sampling(
            max_new_tokens=task.max_new_tokens,
            temperature=agent.sampling.temperature,
            top_p=agent.sampling.top_p,
            top_k=agent.sampling.top_k,
            num_beams=agent.sampling.num_beams,
            num_samples=agent.samples,
            choices=(task.labels or ()) if reads_labels else (),
        ),
        seed=agent.sampling.seed,
    )


def _records_to_ask(
    run: RunRef, partition: int, held: HeldPartition, earlier: Sequence[str]
) -> list[Record]:
    """Return the partition's usable records, or those that are undecided or escalated."""
    if run.escalation is not None:
        others = [a for a in run.merge.agents if a != run.escalation.agent_id]
        run_of_others = replace(run, answers_into="")
        voters = agents_merged(run_of_others, partition, others)
        merged, failures = merge_committed(run_of_others, partition, voters, held.table)
        return usable_records(picked(run.escalation, held.table, merged, failures))
    if not earlier or run.stopping is None:
        return held.usable
    table = held.table
    answers = committed_answers(run, partition, earlier)
    encode = encoder_for(run.merge, answers)
    still_open = undecided(table, answers, run.merge, run.stopping, encode)
    return usable_records(
        table.filter(pc.is_in(table["record_id"], pa.array(still_open, pa.string())))
    )


def _answers_table(
    answers: Sequence[Answer],
    *,
    worker: str,
    attempt: int,
    prompt_hash: str,
    transfer_s: float,
    processing_s: float,
) -> pa.Table:
    """Build the rows to store; each gets an equal share of the times of the whole partition."""
    share = 1 / max(1, len(answers))
    common = {
        "worker": worker,
        "attempt": attempt,
        "prompt_hash": prompt_hash,
        "t_transfer_s": transfer_s * share,
        "t_processing_s": processing_s * share,
    }
    return pa.Table.from_pylist(
        [{**asdict(answer), **common} for answer in answers], schema=ANSWERS
    )


def _counts_of_answers(table: pa.Table) -> dict[str, Any]:
    def total(column: str) -> int:
        return int(pc.sum(table[column]).as_py() or 0)

    failed = table.num_rows - table["reason"].null_count
    return {
        "num_records": pc.count_distinct(table["record_id"]).as_py(),
        "num_answers": table.num_rows - failed,
        "num_failed": failed,
        "prompt_tokens": total("prompt_tokens"),
        "completion_tokens": total("completion_tokens"),
        "cached_tokens": None if table["cached_tokens"].null_count else total("cached_tokens"),
        "peak_memory_bytes": peak_memory_bytes(),
    }
