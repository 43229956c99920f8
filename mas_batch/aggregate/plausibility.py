"""Whether what was learned of closed-set answers can be believed.

The likeliest explanation of answers whose errors are shared may be one in which a class hardly
exists, or an agent is nearly always wrong: it is likely, and it is not true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mas_batch.aggregate.dawid_skene import ClosedSetModel, vote_shares
from mas_batch.aggregate.families import FamilyFit, label_shares
from mas_batch.aggregate.intervals import wilson_interval
from mas_batch.aggregate.patterns import MISSING, Floats, PatternTable

VANISHED = 0.2
"""A class has vanished when it is learned to be rarer than this part of what the vote gives it."""

MIN_WON = 5
"""Records that a class has to win in the vote to be missed."""

MIN_UNANIMOUS = 3
"""Agents that say the same, for a record to count as unanimous."""

MAX_DOUBTED = 0.01
"""Share of all records that may be unanimous and still be held wrong."""


def reasons_to_doubt(
    table: PatternTable,
    fitted: FamilyFit[ClosedSetModel],
    agents: Sequence[str],
    labels: Sequence[str],
) -> Iterator[str]:
    """Yield a sentence for everything in the fitted model that is hardly true."""
    yield from _doubted_unanimity(table, fitted.posteriors)
    yield from _vanished_classes(table, fitted.model.class_prior, labels)
    yield from _below_chance(table, fitted.model, agents)


def _doubted_unanimity(table: PatternTable, posteriors: Floats) -> Iterator[str]:
    codes = table.codes
    first = codes.max(axis=1)
    agree = ((codes == first[:, None]) | (codes == MISSING)).all(axis=1)
    num_agents = np.zeros(len(codes), dtype=np.int64)
    for agent in np.unique(table.agent_of):
        num_agents += (codes[:, table.agent_of == agent] != MISSING).any(axis=1)
    held = posteriors[np.arange(len(codes)), first]
    doubted = table.counts[agree & (num_agents >= MIN_UNANIMOUS) & (held < 0.5)].sum()
    if doubted > MAX_DOUBTED * table.counts.sum():
        yield f"{doubted:.0f} records on which all agents agree would more likely be wrong"


def _vanished_classes(
    table: PatternTable, class_prior: Floats, labels: Sequence[str]
) -> Iterator[str]:
    votes = vote_shares(table, np.ones(table.codes.shape), len(labels))
    wins = votes == votes.max(axis=1, keepdims=True)
    won = (wins / wins.sum(axis=1, keepdims=True)).T @ table.counts
    for label, learned, records in zip(labels, class_prior, won, strict=True):
        share = records / table.counts.sum()
        if records >= MIN_WON and learned < VANISHED * share:
            yield (
                f"the label {label!r} would be right for {learned:.1%} of the records, and it wins "
                f"{share:.1%} of the votes"
            )


def _below_chance(
    table: PatternTable, model: ClosedSetModel, agents: Sequence[str]
) -> Iterator[str]:
    """Chance is what an agent's own frequencies of the labels would make right on any text."""
    chances = label_shares(table, len(agents), len(model.class_prior)) @ model.class_prior
    numbers = table.count_answers(len(agents))
    for name, chance, accuracy, number in zip(
        agents, chances, model.accuracy, numbers, strict=True
    ):
        if wilson_interval(float(accuracy), float(number))[1] < chance:
            yield (
                f"agent {name!r} would be right {accuracy:.0%} of the time, and by chance "
                f"{chance:.0%}"
            )
