"""Asks agents for the answers that are not committed yet, by a router and a dispatcher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distributed import Client

from mas_batch.agents.second_pass import MERGED, merge_known
from mas_batch.agents.spec import AgentSpec
from mas_batch.events import RunStarted
from mas_batch.execution import Execution
from mas_batch.job import Job
from mas_batch.latency.phases import ANSWERING, FIRST_MODEL
from mas_batch.routing.dask import DaskRouter
from mas_batch.routing.dispatcher import Dispatcher
from mas_batch.routing.instructions import Work
from mas_batch.routing.policies import POLICIES
from mas_batch.routing.rules import rules_of
from mas_batch.run_folder.commits import Committed, committed
from mas_batch.run_folder.manifest import read_engines, write_engines
from mas_batch.run_folder.names import JOURNAL, earlier_runs
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from mas_batch.safe_text import without_credentials
from mas_batch.stages.memory import Memory
from mas_batch.stages.whole_corpus import AllAnswers


@dataclass(frozen=True, slots=True)
class Asking:
    """Asks agents for all answers that are not committed yet, and has them merged as they come."""

    execution: Execution
    job: Job
    specs: dict[str, AgentSpec]
    """Agents that may be asked, by name; an earlier run has all answers of the others."""
    plan: Plan
    memory: Memory | None
    """What earlier runs have learned of the agents, if the job keeps it."""

    def all_answers(self, ref: RunRef, agents: tuple[str, ...]) -> AllAnswers:
        """Return all answers of these agents, to be counted or merged."""
        execution, wait_s = self.execution, self.job.cluster.wait_s
        client = execution.connection.client
        return AllAnswers(client, ref, self.plan, agents, execution.log, wait_s)

    def answer(self, ref: RunRef, agents: Sequence[str]) -> None:
        """Ask these agents about the corpus, as the job's routing says.

        Each partition is merged on a worker, into `ref.merged`, once it has its answers.
        """
        done = committed(ref.store, self.plan, agents, ref.merged)
        client = self.execution.connection.client
        self.execution.log(
            _run_started(client, self.job, ref.store, self.plan, done, self.execution.name)
        )
        if self.specs.keys().isdisjoint(agents):  # an earlier run has answered everything
            self.execution.phases.begin(ANSWERING)
            self.all_answers(ref, tuple(agents)).reduce(merge_known, MERGED)
            return
        known = self.memory.accuracies() if self.memory else {}
        self._route(self.job.with_agents(agents), ref, done, known)

    def escalate(self, ref: RunRef) -> None:
        """Ask the escalation's agent about the chosen records; merge as `answer` does."""
        assert ref.escalation is not None
        agent_id = ref.escalation.agent_id
        done = committed(ref.answered, self.plan, [agent_id], ref.merged)
        job = self.job.with_agents([agent_id])
        routing = job.routing.with_changes(answers_per_record=None, adaptive=None)
        self._route(job.with_changes(routing=routing), ref, done, {})

    def _route(self, job: Job, ref: RunRef, done: Committed, known: Mapping[str, float]) -> None:
        if done.num_merged == self.plan.num_partitions:
            return  # an earlier execution was killed after the last merge
        ref.store.remove_folder(JOURNAL)
        specs = {a.name: self.specs[a.name] for a in job.agents if a.name in self.specs}
        with DaskRouter(
            self.execution.connection.client,
            job.with_agents(specs),
            ref,
            specs,
            self.execution.log,
            check=self.execution.lock.check,
            scaler=self.execution.connection.scaler,
        ) as router:
            self.execution.phases.begin(FIRST_MODEL)
            router.host()
            self.execution.phases.begin(ANSWERING)
            self._write_engine_facts(ref.store, router)
            dispatcher = Dispatcher(
                {agent.name: agent.samples for agent in job.agents},
                rules_of(job, known, reuses=ref.reuses),
                POLICIES[job.routing.policy](),
                _unmerged(self.plan, done),
                self.plan.num_partitions - done.num_merged,
            )
            for agent_id in done.is_answered:
                # The agent worked in an earlier execution of this run; an earlier run is no proof.
                if done.is_answered[agent_id].any() and not ref.reuses:
                    dispatcher.trust(agent_id)
            router.run(dispatcher)
            # Again: more agents may have become ready meanwhile.
            self._write_engine_facts(ref.store, router)

    def _write_engine_facts(self, store: Store, router: DaskRouter) -> None:
        write_engines(store, read_engines(store) | router.engine_facts)


def _unmerged(plan: Plan, done: Committed) -> Iterator[Work]:
    for index, num_records, tokens in plan.sizes():
        if not done.is_merged[index]:
            yield Work(index, tokens, num_records, done.agents(index))


def _run_started(
    client: Client, job: Job, store: Store, plan: Plan, done: Committed, name: str
) -> RunStarted:
    output = Store(job.output.path, job.output.storage_options)
    return RunStarted(
        run=without_credentials(store.url),
        num_partitions=plan.num_partitions,
        num_records=plan.num_records,
        partitions_done=done.num_merged,
        records_done=plan.num_records_in(done.is_merged),
        answers_done=done.num_answers_to_open,
        answers_per_record=job.answers_per_record,
        # A job with `since` has an earlier run for every night.
        earlier_runs=() if job.since else tuple(earlier_runs(output, job.name, name)),
        dashboard_link=client.dashboard_link if job.cluster.dashboard_address else None,
    )
