"""Of several answers to one record the most trusted one is published; answers are not counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mas_batch.aggregate.ballots import (
    UNITS,
    Ballot,
    Candidate,
    Verdict,
    gather,
    rank_candidates,
    shares_of,
    to_units,
    verdict,
)
from mas_batch.aggregate.method import EVERY_COLUMN, MergeSpec, Method, Shared
from mas_batch.aggregate.reductions import Partial, Reduction, add_up


def best(ballots: Sequence[Ballot], preference: Sequence[str]) -> Verdict:
    """Return the answer that its model finds likeliest, else that of the most preferred agent.

    Where all ballots are of one family and say how likely they are, the highest mean
    log-probability per token wins; the confidence is its exponential, the geometric mean of
    the tokens' probabilities. Log-probabilities of different models do not compare. There the
    first agent of the preference that has answered wins, by its likeliest sample where all
    its samples say how likely they are, else by its first; nothing is known of the
    confidence.

    Args:
        preference: agent ids, best first; agents that are not in it come last, by id.

    Source of the division by length: Wu et al., "Google's neural machine translation system",
    2016, section 7, length penalty of exponent 1.
    """
    likelihoods = _comparable(ballots)
    if likelihoods is None:
        return most_preferred(ballots, preference)
    support = _by_highest(ballots, [to_units(likelihood) for likelihood in likelihoods])
    weights = [math.exp(candidate.score / UNITS) for candidate in support]
    margin = weights[0] - sum(weights[1:2])
    support = [replace(c, weight=weight) for c, weight in zip(support, weights, strict=True)]
    return verdict(support, shares_of(weights), weights[0], "sequence_probability", margin)


def mean_logprob(ballot: Ballot) -> float | None:
    """Return the mean log-probability per token in nats; None where it is not known."""
    if ballot.logprob_sum is None or not ballot.num_logprobs:
        return None
    mean = ballot.logprob_sum / ballot.num_logprobs
    return mean if math.isfinite(mean) else None


def likelihoods_of(ballots: Sequence[Ballot]) -> Partial:
    """Add up how likely each agent's answers to a record are: agent → [sum of their mean
    log-probabilities in 1e-9 nats, answers that say, answers]."""
    sums: dict[str, list[int]] = {}
    for ballot in ballots:
        mean = mean_logprob(ballot)
        own = sums.setdefault(ballot.agent_id, [0, 0, 0])
        own[0] += 0 if mean is None else to_units(mean)
        own[1] += mean is not None
        own[2] += 1
    return sums


def _mean_probabilities(sums: Partial) -> dict[str, float]:
    """Return agent → geometric mean of its tokens' probabilities, of agents that always say."""
    return {
        agent: math.exp(units / (UNITS * told))
        for agent, (units, told, answers) in sums.items()
        if told == answers
    }


LIKELIHOODS = Reduction("likelihoods", likelihoods_of, add_up, _mean_probabilities)
"""Of one record's ballots; the figures compare within a family only."""


def _comparable(ballots: Sequence[Ballot]) -> list[float] | None:
    """Return every answer's mean log-probability; None where that of one does not compare."""
    likelihoods = [mean for ballot in ballots if (mean := mean_logprob(ballot)) is not None]
    families = {ballot.family_id for ballot in ballots}
    return likelihoods if len(likelihoods) == len(ballots) and len(families) == 1 else None


def most_preferred(ballots: Sequence[Ballot], preference: Sequence[str]) -> Verdict:
    """Return the answer of the first agent of the preference that has one; without confidence."""
    support = _by_highest(ballots, _places(ballots, preference))
    weights = [1.0] + [0.0] * (len(support) - 1)  # all of the trust is in the first
    support = [replace(c, weight=weight) for c, weight in zip(support, weights, strict=True)]
    merged = verdict(support, weights, 1.0, "preference", 1.0)
    return replace(merged, confidence=None, margin=None)


def _places(ballots: Sequence[Ballot], preference: Sequence[str]) -> list[int]:
    """Number the ballots from the last, 1, to the most preferred."""
    rank = {agent_id: place for place, agent_id in enumerate(preference)}
    of_agent: dict[str, list[Ballot]] = {}
    for ballot in ballots:
        of_agent.setdefault(ballot.agent_id, []).append(ballot)
    agents = sorted(of_agent, key=lambda agent_id: (rank.get(agent_id, len(rank)), agent_id))
    in_order = [ballot for agent_id in agents for ballot in _likeliest_first(of_agent[agent_id])]
    place = {ballot.order: len(in_order) - i for i, ballot in enumerate(in_order)}
    return [place[ballot.order] for ballot in ballots]


def _likeliest_first(samples: Sequence[Ballot]) -> list[Ballot]:
    likelihoods = _comparable(samples) or [0.0] * len(samples)
    pairs = zip(samples, likelihoods, strict=True)
    return [b for b, _ in sorted(pairs, key=lambda pair: (-pair[1], pair[0].sample_id))]


def _by_highest(ballots: Sequence[Ballot], weights: Sequence[int]) -> list[Candidate]:
    """Rank answers by their highest backer, in its words: a crowd behind it adds nothing."""
    weight_of = {ballot.order: weight for ballot, weight in zip(ballots, weights, strict=True)}
    ranked = []
    for candidate in gather(ballots, weights):
        leader = max(candidate.backers, key=lambda ballot: weight_of[ballot.order])
        ranked.append(replace(candidate, answer=leader.shown, score=candidate.max_weight))
    return rank_candidates(ranked)


def _most_accurate_first(ballots: Sequence[Ballot], spec: MergeSpec, shared: Shared) -> Verdict:
    """Prefer the most accurate agent; those of unknown accuracy come last."""
    return best(ballots, sorted(spec.agents, key=lambda agent: -spec.accuracies.get(agent, 0.0)))


BEST = Method(
    verdict=_most_accurate_first,
    columns=EVERY_COLUMN,
    exact=True,
    confidence_kinds=("sequence_probability", "preference"),
    stopping="its confidence is of one model's text, and no further answer makes it surer",
    not_escalated="its confidence compares no answers",
)
