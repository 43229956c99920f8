"""How reliable each agent is, learned without labels from the pattern of their agreements.

What is learned depends on the counts alone, to the byte: patterns are sorted first, and the
outcome is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mas_batch.aggregate.ballots import log_odds
from mas_batch.aggregate.dawid_skene import competence, fit_dawid_skene
from mas_batch.aggregate.families import (
    MIN_FAMILIES,
    FamilyFit,
    agreement_above_chance,
    family_numbers,
    fit_with_families,
)
from mas_batch.aggregate.intervals import informative_answers, wilson_interval
from mas_batch.aggregate.open_set import evidence, fit_open_set
from mas_batch.aggregate.patterns import Integers, PatternTable, parse_patterns
from mas_batch.aggregate.plausibility import reasons_to_doubt
from mas_batch.aggregate.reliability import (
    AgentReliability,
    History,
    Reliability,
    temperature_of,
)

MIN_AGENTS = 3
"""Two agents' agreement does not tell which of them is right when they differ."""

PRIOR_STRENGTH = 10.0
"""Answers that what is believed of a row is worth, in each row of a confusion matrix."""

CHANCE_Z = 2.0
"""Standard errors by which an agent's agreement with the others must be above chance, to teach
anything; three agents that guess hardly ever reach it all."""

_DIGITS = 12


@dataclass(frozen=True, slots=True, eq=False)
class _Voters:
    """The agents of a corpus, in order of their names, and what they said."""

    family_of: dict[str, str]
    num_answers: dict[str, int]
    """Agent → its valid answers."""
    families: Integers
    """[A], number of each agent's family."""
    labels: tuple[str, ...] | None
    table: PatternTable


def learn(
    patterns: Mapping[str, int],
    agents: Sequence[str],
    families: Mapping[str, str],
    labels: Sequence[str] | None,
    prior: History | None = None,
) -> Reliability:
    """Learn from the patterns of a corpus how reliable its agents are.

    - Closed set: Dawid–Skene, maximum a posteriori.
    - Open set (`labels` is None): one accuracy per agent and the number of wrong answers.
    - `vote`, that is nothing, where fewer than three agents have answered, or agree with others
      more often than by chance: by over 2 standard errors for a closed set; for an open one the
      likelihood must pay for its parameters, by the Bayesian information criterion (Schwarz,
      1978). Also where what was learned is hardly true (module `plausibility`). Accuracies are
      then the history's, if there is one, and `warnings` say why.

    Answers of one family (a model, or the samples of one agent) count less the more they
    agree beyond what their accuracies explain: see module `families`.

    Args:
        patterns: pattern → number of records, as module `patterns` counts them.
        families: agent → its family.
        prior: from earlier runs; counts for an agent at most as much as its answers here.

    Raises:
        ValueError: the arguments contradict each other.
    """
    voters = _voters(patterns, agents, families, labels)
    history = prior if prior is not None else History({}, voters.labels)
    if history.labels != voters.labels:
        raise ValueError(
            f"the history is of labels {history.labels}, these answers are of {voters.labels}; "
            "allowed: a history of the same labels in the same order"
        )
    obstacle = _obstacle(voters)
    if obstacle:
        return _nothing_learned(voters, history, obstacle)
    if voters.labels is None:
        return _learn_open_set(voters, history)
    return _learn_closed_set(voters, history, voters.labels)


def _voters(
    patterns: Mapping[str, int],
    agents: Sequence[str],
    families: Mapping[str, str],
    labels: Sequence[str] | None,
) -> _Voters:
    names = tuple(sorted(agents))
    strangers = [name for name in names if name not in families]
    if strangers:
        raise ValueError(f"agent {strangers[0]!r} has no family; families: {dict(families)}")
    if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise ValueError(f"labels {list(labels)} are not allowed; allowed: two or more, distinct")
    table = parse_patterns(patterns, len(names), None if labels is None else len(labels))
    return _Voters(
        family_of={name: families[name] for name in names},
        num_answers=dict(zip(names, table.count_answers(len(names)).tolist(), strict=True)),
        families=family_numbers([families[name] for name in names]),
        labels=None if labels is None else tuple(labels),
        table=table,
    )


def _obstacle(voters: _Voters) -> str | None:
    """Say why nothing can be learned, as far as it shows before trying."""
    answering = sum(answers > 0 for answers in voters.num_answers.values())
    if answering < MIN_AGENTS:
        return f"{answering} agents have answered, and learning takes {MIN_AGENTS}"
    if voters.labels is None:
        return None
    telling = _telling(voters, len(voters.labels))
    if len(telling) >= MIN_AGENTS:
        return None
    who = f"only {', '.join(map(repr, telling))} agree" if telling else "no agents agree"
    return (
        f"{who} with others more often than by chance ({CHANCE_Z:g} standard errors), and "
        f"learning takes {MIN_AGENTS}"
    )


def _telling(voters: _Voters, num_labels: int) -> list[str]:
    """Return the agents that agree with others more often than by chance."""
    above = agreement_above_chance(voters.table, voters.families, num_labels)
    return [name for name, z in zip(voters.num_answers, above, strict=True) if z > CHANCE_Z]


def _learn_closed_set(voters: _Voters, history: History, labels: Sequence[str]) -> Reliability:
    table, pseudo = voters.table, history.pseudo_counts(voters.num_answers)
    fit = partial(fit_dawid_skene, table, pseudo=pseudo, strength=PRIOR_STRENGTH, shape=competence)
    fitted = fit_with_families(table, voters.families, fit)
    names = tuple(voters.num_answers)
    doubts = tuple(reasons_to_doubt(table, fitted, names, labels))
    if doubts:
        obstacle = f"what was learned is hardly true: {'; '.join(doubts)}"
        return _nothing_learned(voters, history, obstacle)
    agents = _agents(voters, history, fitted, len(labels) - 1)
    confusions = zip(agents.items(), fitted.model.confusion, strict=True)
    agents = {
        name: replace(agent, confusion=tuple(map(_rounded, confusion)))
        for (name, agent), confusion in confusions
    }
    class_prior, why = _rounded(fitted.model.class_prior), "one confusion matrix per agent"
    found = _reliability(voters, "dawid-skene", why, agents, class_prior=class_prior)
    telling = _telling(voters, len(labels))
    silent = [name for name, number in voters.num_answers.items() if number and name not in telling]
    if not silent:
        return found
    warning = (
        f"No more often than by chance do these agents agree with others: {', '.join(silent)}; "
        "look at what they answer, or leave them out."
    )
    return replace(found, warnings=(warning,))


def _learn_open_set(voters: _Voters, history: History) -> Reliability:
    table, pseudo = voters.table, history.pseudo_counts(voters.num_answers)
    fitted = fit_with_families(table, voters.families, partial(fit_open_set, table, pseudo=pseudo))
    penalty = len(voters.num_answers) * math.log(table.num_records) / 2
    if evidence(fitted.model, table, fitted.exponents) <= penalty:
        return _nothing_learned(voters, history, "agreement is explained as well by chance")
    num_wrong = fitted.model.num_wrong
    agents = _agents(voters, history, fitted, num_wrong)
    why = "free answers: learned from who agrees with whom"
    return _reliability(voters, "open-set", why, agents, num_wrong=num_wrong)


def _nothing_learned(voters: _Voters, history: History, obstacle: str) -> Reliability:
    num_wrong = len(voters.labels) - 1 if voters.labels else None
    agents = {name: _from_history(voters, history, name, num_wrong) for name in voters.num_answers}
    found = _reliability(voters, "vote", f"merged by vote: {obstacle}", agents)
    return replace(found, warnings=(f"The vote is published, since {obstacle}.",))


def _reliability(
    voters: _Voters,
    method: str,
    why: str,
    agents: Mapping[str, AgentReliability],
    *,
    class_prior: tuple[float, ...] | None = None,
    num_wrong: int | None = None,
) -> Reliability:
    num_families = len(set(voters.family_of.values()))
    if method != "vote" and num_families < MIN_FAMILIES:
        why += f"; errors that a model family shares show only with {MIN_FAMILIES} families or more"
    found = Reliability(
        method=method,
        why=f"{voters.table.num_records} records, {why}.",
        num_records=voters.table.num_records,
        labels=voters.labels,
        class_prior=class_prior,
        num_wrong=num_wrong,
        agents=agents,
    )
    if method == "vote":
        return found
    temperature = _round(temperature_of(found, voters.table))
    return replace(found, temperature=temperature)


def _agents(
    voters: _Voters, history: History, fitted: FamilyFit[Any], num_wrong: int
) -> dict[str, AgentReliability]:
    table, families = voters.table, voters.families
    informative = informative_answers(table, fitted.exponents, fitted.posteriors, len(families))
    slots = np.bincount(families[table.agent_of], minlength=len(fitted.correlation))
    agents = {}
    for position, (name, num_answers) in enumerate(voters.num_answers.items()):
        if not num_answers:
            agents[name] = _from_history(voters, history, name, num_wrong)
            continue
        accuracy = float(fitted.model.accuracy[position])
        rho = float(fitted.correlation[families[position]])
        num_repeats = int(slots[families[position]]) - 1
        agents[name] = replace(
            _agent(voters, name, accuracy, float(informative[position]), num_wrong),
            correlation=_round(rho),
            tempering=_round(1 / (1 + num_repeats * rho)),
        )
    return agents


def _from_history(
    voters: _Voters, history: History, name: str, num_wrong: int | None
) -> AgentReliability:
    past = history.of(name)
    if past is not None:
        return _agent(voters, name, past.correct / past.total, past.total, num_wrong)
    return AgentReliability(voters.family_of[name], voters.num_answers[name])


def _agent(
    voters: _Voters, name: str, accuracy: float, num_informative: float, num_wrong: int | None
) -> AgentReliability:
    """Return what follows from an accuracy, of an agent that is independent of the others."""
    low, high = wilson_interval(accuracy, num_informative)
    return AgentReliability(
        family_id=voters.family_of[name],
        num_answers=voters.num_answers[name],
        accuracy=_round(accuracy),
        interval=(_round(low), _round(high)),
        weight=None if num_wrong is None else _round(log_odds(accuracy, num_wrong)),
    )


def _round(value: float) -> float:
    return round(float(value), _DIGITS)


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(_round, values))
