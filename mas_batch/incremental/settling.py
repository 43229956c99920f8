"""Which of a partition's known answers a run uses, and whether it needs any further ones.

Known answers cost nothing, but a run that used all of them would merge more answers than a run that
asks. So this stops where the job's routing stops: after `answers_per_record` answers, or when the
first answers agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, undecided
from mas_batch.job import Job
from mas_batch.records import ANSWERS


@dataclass(frozen=True, slots=True)
class Choice:
    """The known answers that a run uses for a partition."""

    answers: Mapping[str, pa.Table]
    """Agent → all its answers to the partition, as if it had been asked."""
    is_settled: bool
    """No agent has to be asked about the partition, but for an escalation, which comes later."""


@dataclass(frozen=True, slots=True)
class Settling:
    """Decides when the known answers to a partition are all that the job's routing asks for."""

    samples: Mapping[str, int]
    """Agent → answers per record; agents that are asked first, in the job's order."""
    answers_per_record: int
    first: int | None
    """Adaptive: answers per record before it is first checked which records are decided."""
    merge: MergeSpec
    """Adaptive: how answers are merged for that check."""
    rule: StoppingRule | None

    @classmethod
    def of(cls, job: Job, merge: MergeSpec, rule: StoppingRule | None) -> Settling:
        """Read the rules out of the job."""
        adaptive = job.routing.adaptive
        return cls(
            {agent.name: agent.samples for agent in job.first_agents},
            job.answers_per_record,
            adaptive.first if adaptive else None,
            merge.first_pass,
            rule,
        )

    def choose(
        self, records: pa.Table, known: Mapping[str, pa.Table], done: Collection[str] = ()
    ) -> Choice:
        """Choose the agents whose known answers are used, in the job's order.

        Args:
            records: `record_id` and `reason` of the partition.
            known: agent → its known answers, to some or all of the usable records.
            done: agents whose answers an earlier execution has committed.
        """
        usable = records.filter(pc.is_null(records["reason"]))["record_id"].to_pylist()
        wanted = min(self.first or self.answers_per_record, self.answers_per_record)
        chosen: dict[str, pa.Table] = {}
        for agent_id in self.samples:
            if self._count_answers({*done, *chosen}) >= wanted:
                break
            if agent_id not in done and _covers(known.get(agent_id), usable):
                chosen[agent_id] = known.get(agent_id, ANSWERS.empty_table())
        if self._count_answers({*done, *chosen}) < wanted:
            return Choice(chosen, is_settled=False)
        if self.rule is None:
            return Choice(chosen, is_settled=True)
        if done or self.merge.needs_encoder:
            return Choice(chosen, is_settled=False)  # a worker checks these records
        return self._choose_until_decided(records, known, chosen, self.rule)

    def _choose_until_decided(
        self,
        records: pa.Table,
        known: Mapping[str, pa.Table],
        chosen: dict[str, pa.Table],
        rule: StoppingRule,
    ) -> Choice:
        """Add one agent's answers to the undecided records after another, until all are decided."""
        while self._count_answers(chosen) < self.answers_per_record:
            answers = pa.concat_tables(chosen.values())
            still_open = undecided(records, answers, self.merge, rule)
            if not still_open:
                break
            others = (agent_id for agent_id in self.samples if agent_id not in chosen)
            further = next((a for a in others if _covers(known.get(a), still_open)), None)
            if further is None:
                return Choice(chosen, is_settled=False)
            rows = known[further]
            asked = pc.is_in(rows["record_id"], pa.array(still_open, pa.string()))
            chosen[further] = rows.filter(asked)
        return Choice(chosen, is_settled=True)

    def _count_answers(self, agents: Iterable[str]) -> int:
        return sum(self.samples[agent_id] for agent_id in agents)


def _covers(rows: pa.Table | None, record_ids: Collection[str]) -> bool:
    """Say whether there are known answers to all these records; always true of no records."""
    if rows is None:
        return not record_ids
    return set(record_ids) <= set(rows["record_id"].to_pylist())
