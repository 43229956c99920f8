"""Who agrees with whom: pairs of answers to one record that the merge took for the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.aggregate.reductions import Partial, Reduction, add_up


def count_pairs(results: pa.Table) -> Partial:
    """Count pairs of answers by the pair of their agents: {a: {b: {"pairs": n, "equal": m}}}.

    Two samples of one agent are a pair too. `a <= b`. O(records · voters²), vectorised.

    Args:
        results: with a `support` column; see `records.SUPPORT`.
    """
    codes, voters = _candidate_codes(results["support"])
    pairs: Counter[tuple[str, str]] = Counter()
    equal: Counter[tuple[str, str]] = Counter()
    for left, right in combinations(range(len(voters)), 2):
        both = (codes[:, left] >= 0) & (codes[:, right] >= 0)
        a, b = sorted((_agent(voters[left]), _agent(voters[right])))
        pairs[a, b] += int(both.sum())
        equal[a, b] += int((both & (codes[:, left] == codes[:, right])).sum())
    partial: dict[str, dict[str, Any]] = {}
    for (a, b), count in sorted(pairs.items()):
        if count:
            partial.setdefault(a, {})[b] = {"pairs": count, "equal": equal[a, b]}
    return partial


def _candidate_codes(support: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return which candidate each voter backs, as [record, voter] (-1: no answer), and the voters.

    A voter is a backer of a support: `agent` or `agent#sample`.
    """
    flat = support.combine_chunks()
    record = pc.list_parent_indices(flat).to_numpy()
    backers = pc.struct_field(pc.list_flatten(flat), "agents")
    candidate = pc.list_parent_indices(backers).to_numpy()
    encoded = pc.dictionary_encode(pc.list_flatten(backers))
    codes = np.full((len(flat), len(encoded.dictionary)), -1, np.int64)
    codes[record[candidate], encoded.indices.to_numpy(zero_copy_only=False)] = candidate
    return codes, encoded.dictionary.to_pylist()


def _agent(voter: str) -> str:
    return voter.partition("#")[0]  # an agent's name has no '#': see `job.slug`


def _shares(partial: Mapping[str, Mapping[str, Partial]]) -> dict[str, Any]:
    return {
        a: {b: counts["equal"] / counts["pairs"] for b, counts in row.items()}
        for a, row in partial.items()
    }


PAIRS = Reduction("agreement_of_pairs", count_pairs, add_up, _shares)
"""Results → agent → agent → share of pairs of their answers that are the same."""
