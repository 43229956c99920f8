"""What an adaptive number of answers saves against asking every agent, and what it costs.

    python benchmarks/adaptive.py [--records 2000] [--seed 0]

A simulation around the project's own `undecided` and `merge_answers`: 4 labels, 5 agents that err
independently and evenly over the wrong labels. Partitions of 100 records; agents are asked in an
order that is drawn per partition, as a load balancer would have it, or the most accurate first. The
first look is after two answers. Every row of a scenario is about the same records and answers.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, undecided
from mas_batch.records import ANSWERS, RECORD_FIELDS

LABELS = "abcd"
FIRST = 2
PARTITION = 100
SCENARIOS = ((0.90, 0.80, 0.75, 0.70, 0.65), (0.90, 0.55, 0.50, 0.45, 0.40))
RULES = (("vote", None), ("weighted", 0.9), ("weighted", 0.95), ("weighted", 0.99))
ORDERS = ("drawn", "best first")


@dataclass(frozen=True)
class Part:
    """A partition, and what every agent would answer."""

    records: pa.Table
    truths: list[str]
    answers: list[pa.Table]
    """One table per agent, the most accurate first."""
    drawn: list[int]
    """An order of the agents."""

    def in_order(self, order: str) -> list[pa.Table]:
        return self.answers if order == "best first" else [self.answers[i] for i in self.drawn]


@dataclass
class Tally:
    """Sums over all partitions."""

    records: int = 0
    asked: int = 0
    correct: int = 0
    correct_three: int = 0
    correct_all: int = 0
    same: int = 0


def simulate(accuracies: Sequence[float], num_records: int, seed: int) -> Iterator[Part]:
    rng = random.Random(seed)
    for start in range(0, num_records, PARTITION):
        ids = [f"r{number}" for number in range(start, min(start + PARTITION, num_records))]
        truths = rng.choices(LABELS, k=len(ids))
        rows = [{"record_id": i, "text": i, "message": ""} for i in ids]
        answers = [
            answers_of(f"a{number}", accuracy, ids, truths, rng)
            for number, accuracy in enumerate(accuracies)
        ]
        drawn = rng.sample(range(len(answers)), k=len(answers))
        yield Part(pa.Table.from_pylist(rows, pa.schema(RECORD_FIELDS)), truths, answers, drawn)


def answers_of(
    agent: str, accuracy: float, ids: Sequence[str], truths: Sequence[str], rng: random.Random
) -> pa.Table:
    given = [
        truth if rng.random() < accuracy else rng.choice(LABELS.replace(truth, ""))
        for truth in truths
    ]
    rows = [
        {
            "record_id": record_id,
            "agent_id": agent,
            "family_id": agent,
            "sample_id": 0,
            "attempt": 1,
            "text": label,
            "label": label,
        }
        for record_id, label in zip(ids, given, strict=True)
    ]
    return pa.Table.from_pylist(rows, ANSWERS)


def ask_adaptively(
    records: pa.Table, tables: Sequence[pa.Table], spec: MergeSpec, rule: StoppingRule
) -> pa.Table:
    """Return the answers that come when every further agent is asked about open records only."""
    answers = pa.concat_tables(tables[:FIRST])
    for table in tables[FIRST:]:
        still_open = undecided(records, answers, spec, rule)
        asked = pc.is_in(table["record_id"], pa.array(still_open, pa.string()))
        answers = pa.concat_tables([answers, table.filter(asked)])
    return answers


def compare(parts: Sequence[Part], spec: MergeSpec, rule: StoppingRule, order: str) -> Tally:
    tally = Tally()
    for part in parts:
        tables = part.in_order(order)
        asked = ask_adaptively(part.records, tables, spec, rule)
        adaptive = merged(part.records, asked, spec)
        first_three = merged(part.records, pa.concat_tables(tables[:3]), spec)
        of_all = merged(part.records, pa.concat_tables(tables), spec)
        tally.records += len(part.truths)
        tally.asked += asked.num_rows
        tally.correct += num_equal(adaptive, part.truths)
        tally.correct_three += num_equal(first_three, part.truths)
        tally.correct_all += num_equal(of_all, part.truths)
        tally.same += num_equal(adaptive, of_all)
    return tally


def merged(records: pa.Table, answers: pa.Table, spec: MergeSpec) -> list[str]:
    results, _ = merge_answers(records, answers, spec)
    labels: list[str] = results["answer"].to_pylist()
    return labels


def num_equal(left: Sequence[str], right: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


def print_table(num_records: int, seed: int) -> None:
    print(
        "| accuracies | stop when | asked | answers per record | saved | accuracy "
        "| of the first 3 | of all 5 | same answer as all 5 |"
    )
    print("|---" * 9 + "|")
    for accuracies in SCENARIOS:
        parts = list(simulate(accuracies, num_records, seed))
        known = {f"a{number}": accuracy for number, accuracy in enumerate(accuracies)}
        for (method, confidence), order in itertools.product(RULES, ORDERS):
            spec = MergeSpec(method, None, known, "log-odds", 0.0, "label", len(LABELS))
            rule = StoppingRule(confidence, len(accuracies))
            tally = compare(parts, spec, rule, order)
            stop = "certain" if confidence is None else f"posterior ≥ {confidence}"
            agents = "/".join(f"{accuracy:.2f}"[1:] for accuracy in accuracies)
            print(f"| {agents} | {method}, {stop} | {order} | {figures(tally, len(accuracies))} |")


def figures(tally: Tally, num_agents: int) -> str:
    per_record = tally.asked / tally.records
    correct = (tally.correct, tally.correct_three, tally.correct_all)
    accuracies = " | ".join(f"{number / tally.records:.3f}" for number in correct)
    saved = 1 - per_record / num_agents
    return f"{per_record:.2f} | {saved:.0%} | {accuracies} | {tally.same / tally.records:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    print_table(arguments.records, arguments.seed)


if __name__ == "__main__":
    main()
