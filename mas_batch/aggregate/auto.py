"""`auto`: which merge of free texts the corpus itself speaks for: `mbr`, `best` or `vote`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.best import LIKELIHOODS, likelihoods_of
from mas_batch.aggregate.consensus import SUPPORT, loo_partial
from mas_batch.aggregate.mbr import minimum_bayes_risk
from mas_batch.aggregate.merge import replies_by_record
from mas_batch.aggregate.method import Encode, Learning, Lesson, MergeSpec, Method, Shared, Stopping
from mas_batch.aggregate.partials import utility_of
from mas_batch.aggregate.reductions import Partial, Reduction
from mas_batch.aggregate.utilities import Utility
from mas_batch.aggregate.verdicts import ballots_of
from mas_batch.errors import RunError

NEGLIGIBLE_WEIGHT = 0.25
"""Weight below which an agent hardly decides: half of the best one's support, squared."""

CONTRADICTED = 0.5
"""Share of the support that the most supported answer has, below which one is contradicted."""

SHORT_WORDS = 3
"""Answers of so many words at most are the same or not; how alike they are says little."""

MAJORITY_SHARE = 0.75
"""Share of the records with a majority for one short answer, above which answers are voted on."""


def _count(
    answers: pa.Table, spec: MergeSpec, agents: Sequence[str], encode: Encode | None = None
) -> Partial:
    """Count what the choice goes by."""
    utility = utility_of(spec, encode)
    answered = answers.group_by("record_id").aggregate([])
    records = [ballots_of(r, spec) for r in replies_by_record(answered, answers).values()]
    compared = [ballots for ballots in records if len(ballots) > 1]
    return {
        "support": SUPPORT.combine([loo_partial(ballots, utility) for ballots in compared]),
        "likelihoods": LIKELIHOODS.combine([likelihoods_of(ballots) for ballots in records]),
        "compared": len(compared),
        "majorities": sum(_has_majority(ballots, spec) for ballots in compared),
    }


def _has_majority(ballots: Sequence[Ballot], spec: MergeSpec) -> bool:
    """Whether more than half of the answers are the same short one, in normalised form."""
    texts = Counter(spec.kind.normalise(ballot.shown) for ballot in ballots)
    ((text, most),) = texts.most_common(1)
    return 2 * most > len(ballots) and len(text.split()) <= SHORT_WORDS


def _add(partials: Sequence[Partial]) -> Partial:
    def parts(name: str) -> list[Any]:
        return [partial[name] for partial in partials]

    return {
        "support": SUPPORT.combine(parts("support")),
        "likelihoods": LIKELIHOODS.combine(parts("likelihoods")),
        "compared": sum(parts("compared")),
        "majorities": sum(parts("majorities")),
    }


def _as_is(partial: Partial) -> dict[str, Any]:
    return partial


def _choose(
    counts: Partial,
    spec: MergeSpec,
    agents: Sequence[str],
    families: Mapping[str, str],
    *_: object,
) -> str:
    """Choose by rule, in this order.

    1. Several agents of one model, but for agents that nobody supports, and all their answers say
       how likely they are: `best`, the agent whose answers the model finds likeliest (`led_by`).
       Such agents share their errors, so that their agreement is no evidence; the model's own
       opinion is some. (500 translations by beam search, greedy decoding and a sample of one
       model: `mbr` loses 0.2 chrF to the best, p = .01, with learned weights as much; the
       likeliest agent is the best.)
    2. Most records have a majority for one short answer: `vote`; such answers are as good as
       labels.
    3. Else `mbr`, weighted by how well unlike agents support each other.
    """
    weights = SUPPORT.finalize(counts["support"])
    likelihoods = LIKELIHOODS.finalize(counts["likelihoods"])
    answering = [agent for agent in agents if agent in counts["likelihoods"]]
    heard = [agent for agent in answering if weights.get(agent, 1.0) >= NEGLIGIBLE_WEIGHT]
    compared, majorities = counts["compared"], counts["majorities"]
    are_kin = len(heard) > 1 and len({families[agent] for agent in heard}) == 1
    if are_kin and likelihoods.keys() >= {*heard}:
        likeliest = max(sorted(heard), key=lambda agent: likelihoods[agent])
        why = (
            f"best: {', '.join(heard)} are of one model, which shares its errors with itself; "
            f"{likeliest}'s answers are the likeliest (a token's mean probability: "
            f"{likelihoods[likeliest]:.3f}) and are published unless the others contradict them"
        )
        return _written("auto", None, {agent: likelihoods[agent] for agent in heard}, why)
    if majorities > MAJORITY_SHARE * compared and len(answering) > 2:
        why = (
            f"vote: {majorities / compared:.0%} of the records have a majority for one short answer"
        )
        return _written("vote", None, {}, why)
    why = "mbr: texts of unlike agents, weighted by how well the others' answers support an agent's"
    return _written("mbr", "learned", weights, why)


def _written(method: str, weights: str | None, accuracies: Mapping[str, float], why: str) -> str:
    facts = {"method": method, "weights": weights, "accuracies": dict(accuracies), "why": why}
    return json.dumps(facts, indent=1)


def _read(spec: MergeSpec, text: str) -> Lesson:
    facts = json.loads(text)
    if facts["method"] == "vote":
        facts["accuracies"] = dict(spec.accuracies)
    chosen = replace(
        spec,
        method=facts["method"],
        weights=facts["weights"],
        accuracies=facts["accuracies"],
        chosen=facts["why"],
    )
    return Lesson(chosen, frozenset(spec.agents), dict(facts["accuracies"]), facts["why"])


def led_by(ballots: Sequence[Ballot], preference: Sequence[str], utility: Utility) -> Verdict:
    """Return the answer of the first agent of the preference, unless the others contradict it.

    They do where it has less than `CONTRADICTED` of the support from others that the answer of
    minimum Bayes risk has, which is published then. The confidence is the expected utility.
    """
    found = minimum_bayes_risk(ballots, [1.0] * len(ballots), utility)
    rank = {agent: place for place, agent in enumerate(preference)}
    leader = min(ballots, key=lambda b: (rank.get(b.agent_id, len(rank)), *b.order))
    led = next(c for c in found.support if leader in c.backers)
    from_others = [len(ballots) * c.weight - 1 for c in (led, found.support[0])]
    if led is found.support[0] or from_others[0] < CONTRADICTED * from_others[1]:
        return found
    support = (led, *(c for c in found.support if c is not led))
    return replace(
        found,
        answer=led.answer,
        confidence=led.weight,
        margin=None,
        support=support,
        tie=False,
        chosen=leader,
    )


def _by_likeliest(ballots: Sequence[Ballot], spec: MergeSpec, shared: Shared) -> Verdict:
    if spec.chosen is None:
        raise RunError("`auto` merges when all records are answered, not before")
    preference = sorted(spec.accuracies, key=lambda agent: (-spec.accuracies[agent], agent))
    return led_by(ballots, preference, utility_of(spec, shared.encode))


AUTO = Method(
    verdict=_by_likeliest,
    columns=("text",),
    exact=True,
    confidence_kinds=("expected_utility", "agreement"),
    stopping=Stopping(allows_ties=True),
    not_escalated=None,
    uses_utility=True,
    weights={
        None: Learning(
            count=_count,
            reduction=Reduction("evidence", _count, _add, _as_is),
            find=_choose,
            read=_read,
            first_pass=lambda spec: replace(spec, method="mbr"),
        )
    },
)
