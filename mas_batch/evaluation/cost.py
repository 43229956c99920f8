"""What each agent's answers cost: tokens, seconds, and how long a record takes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.evaluation.systems import Vector
from mas_batch.run_folder.read import Run

_TIMES = ("t_compute_s", "t_transfer_s", "t_processing_s")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds per answer."""

    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class AgentCost:
    """One agent's answers, failed ones included. Rates are those of one busy replica."""

    agent_id: str
    answers: int
    failed_answers: int
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float | None
    """Completion tokens per second of model time; None where no time was measured."""
    records_per_s: float | None
    """Records per second of the total time."""
    compute: Percentiles
    """t_compute: an answer's share of its batch's model time."""
    total: Percentiles
    """T = t_compute + t_transfer + t_processing."""


def agent_costs(run: Run) -> tuple[AgentCost, ...]:
    """Measure every agent by its stored answers; one file is open at a time."""
    rows: dict[str, list[pa.Table]] = defaultdict(list)
    for name in run.files("answers"):
        table = run.store.read_table(name).select(_COLUMNS)
        if table.num_rows:
            rows[table["agent_id"][0].as_py()].append(table)
    return tuple(_cost(agent, pa.concat_tables(rows[agent])) for agent in rows)


_COLUMNS = [
    *("record_id", "agent_id", "reason", "prompt_tokens", "completion_tokens"),
    *_TIMES,
]


def _cost(agent_id: str, answers: pa.Table) -> AgentCost:
    compute, *other = (answers[name].fill_null(0.0).to_numpy() for name in _TIMES)
    total = compute + sum(other)
    completion_tokens = _sum(answers["completion_tokens"])
    num_records = int(pc.count_distinct(answers["record_id"]).as_py())
    return AgentCost(
        agent_id=agent_id,
        answers=answers["reason"].null_count,
        failed_answers=answers.num_rows - answers["reason"].null_count,
        prompt_tokens=_sum(answers["prompt_tokens"]),
        completion_tokens=completion_tokens,
        tokens_per_s=_rate(completion_tokens, compute),
        records_per_s=_rate(num_records, total),
        compute=_percentiles(compute),
        total=_percentiles(total),
    )


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _rate(count: int, seconds: Vector) -> float | None:
    total_s = float(seconds.sum())
    return count / total_s if total_s > 0 else None


def _percentiles(seconds: Vector) -> Percentiles:
    return Percentiles(*np.percentile(seconds, [50, 95, 99]).tolist())
