"""Worker side: the statistics of a run, counted from what is committed and added up a tree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

from mas_batch.agents.reuse import asked_now
from mas_batch.agents.work import committed_answers
from mas_batch.aggregate.reductions import RUN_STATISTICS, Partial, Reduction
from mas_batch.latency.sketch import RECORD_LATENCY
from mas_batch.run_folder.commits import commit_review, read_results
from mas_batch.run_folder.ranges import Ranges, join_ranges
from mas_batch.run_folder.ref import RunRef


def partition_statistics(run: RunRef, partitions: Sequence[int], agents: Sequence[str]) -> Partial:
    """Leaf of the statistics tree: count what is committed for these partitions."""
    return COMMITTED.combine([COMMITTED.chunk(run, partition, agents) for partition in partitions])


def _count_committed(run: RunRef, partition: int, agents: Sequence[str]) -> Partial:
    merged = read_results(run.merged, partition)
    voters = [agent for agent in agents if agent in (merged.agents or ())]
    answers, name = committed_answers(run, partition, voters), merged.failures_name
    reviewed = commit_review(run.merged, partition, merged.results)
    return {
        "counts": RUN_STATISTICS.chunk(
            merged.results, merged.failures, answers, run.merge.answer_kind
        ),
        "answers": {agent: [[partition, partition + 1]] for agent in voters},
        "latency": RECORD_LATENCY.chunk(asked_now(answers)),
        "failures_files": {partition: name} if name else {},
        "reviewed": [partition] if reviewed else [],
    }


def _add_statistics(partials: Sequence[Partial]) -> Partial:
    files = (partial["failures_files"].items() for partial in partials)
    ranges: defaultdict[str, list[Ranges]] = defaultdict(list)
    for agent, parts in chain.from_iterable(partial["answers"].items() for partial in partials):
        ranges[agent].append(parts)
    return {
        "answers": {agent: join_ranges(parts) for agent, parts in ranges.items()},
        "counts": RUN_STATISTICS.combine([partial["counts"] for partial in partials]),
        "latency": RECORD_LATENCY.combine([partial["latency"] for partial in partials]),
        "failures_files": dict(chain.from_iterable(files)),
        "reviewed": sorted(chain.from_iterable(partial["reviewed"] for partial in partials)),
    }


def _finalize_statistics(partial: Partial) -> dict[str, Any]:
    return {
        **partial,
        "counts": RUN_STATISTICS.finalize(partial["counts"]),
        "latency": RECORD_LATENCY.finalize(partial["latency"]),
    }


COMMITTED = Reduction("run_statistics", _count_committed, _add_statistics, _finalize_statistics)
"""`counts`: of `RUN_STATISTICS`; `latency`: of `RECORD_LATENCY`; `answers`: agent → ranges of the
partitions whose merge has its answers; `failures_files`: partition → its failures file, if it has
one (the results file names both, and workers have to read it anyway); `reviewed`: partitions that
have a file in `review/`. The chunk also commits that file."""
