"""What was learned about the agents, as plain data, and what it says about one record.

Values of `learn` (module `learning`): numbers are rounded, so that the same counts give the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mas_batch.aggregate import dawid_skene, open_set
from mas_batch.aggregate.families import exponents, family_numbers
from mas_batch.aggregate.patterns import MISSING, Floats, PatternTable, parse_patterns
from mas_batch.by_name import pickled_by_name

MAX_TEMPERATURE = 100.0
"""At which hardly any difference is left between probabilities."""


@dataclass(frozen=True, slots=True)
class AgentHistory:
    """What earlier runs tell about an agent, in answers."""

    correct: float
    """Expected number of right answers."""
    total: float
    """Number of answers."""
    confusion: tuple[tuple[float, ...], ...] | None = None
    """Expected answers by true (row) and given label; None: not known."""


@dataclass(frozen=True, slots=True)
class History:
    """What earlier runs of the same task tell about its agents."""

    agents: Mapping[str, AgentHistory]
    labels: tuple[str, ...] | None = None
    """Of the confusions' rows and columns; None for an open set."""

    def of(self, agent: str) -> AgentHistory | None:
        """Return an agent's part; None if there is nothing about it."""
        past = self.agents.get(agent)
        return past if past and past.total > 0 else None

    def pseudo_counts(self, num_answers: Mapping[str, int]) -> dawid_skene.PseudoCounts:
        """Return what to believe about agents beforehand.

        One right and one wrong answer each (Laplace), and their past: at most as many answers
        as the agent has given now.

        Args:
            num_answers: agent → its answers now, in the order of the result.
        """
        num_labels = len(self.labels or ())
        pseudo = dawid_skene.PseudoCounts.laplace(len(num_answers), num_labels)
        for position, (name, answers) in enumerate(num_answers.items()):
            past = self.of(name)
            if past is None:
                continue
            share = min(1.0, answers / past.total)
            pseudo.correct[position] += share * past.correct
            pseudo.total[position] += share * past.total
            if past.confusion is not None:
                pseudo.confusion[position] += share * np.array(past.confusion)
        return pseudo


@pickled_by_name
@dataclass(frozen=True, slots=True)
class AgentReliability:
    """What was learned about an agent."""

    family_id: str
    num_answers: int
    """Valid answers, all samples counted."""
    accuracy: float | None = None
    """Expected share of answers that are right; None: nothing is known."""
    interval: tuple[float, float] | None = None
    """95 % of the accuracy, by `wilson_interval`; None: no answers."""
    confusion: tuple[tuple[float, ...], ...] | None = None
    """Rows are true labels, columns given ones; of `dawid-skene` only."""
    weight: float | None = None
    """ln(m·p / (1 - p)) for accuracy p and m wrong answers: a vote's log-odds, untempered."""
    correlation: float = 0.0
    """ρ of the agent's family: 0 independent, 1 copies."""
    tempering: float = 1.0
    """Factor of its log-likelihoods where the whole family has answered; 1: independent."""


@pickled_by_name
@dataclass(frozen=True, slots=True)
class Reliability:
    """What was learned about all agents."""

    method: str
    """`dawid-skene`, `open-set`, or `vote` where nothing could be learned; earlier versions also
    wrote `one-coin`."""
    why: str
    """A sentence for people: why this method."""
    num_records: int
    """Records with at least one valid answer."""
    labels: tuple[str, ...] | None
    """The closed set; None for an open one."""
    class_prior: tuple[float, ...] | None
    """Share of records of each label; None for an open set and for `vote`."""
    num_wrong: int | None
    """m, of `open-set`: how many wrong answers an agent chooses from."""
    agents: Mapping[str, AgentReliability]
    """In order of the name."""
    temperature: float = 1.0
    """By which posteriors are softened: then they are, on average, as sure as the share of the
    answers that agree. Agents that share errors look just like agents that are right."""
    warnings: tuple[str, ...] = ()
    """Sentences for people: what is wrong with what was learned."""

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy of every agent of which it is known."""
        return {name: a.accuracy for name, a in self.agents.items() if a.accuracy is not None}

    @property
    def weights(self) -> dict[str, float]:
        """Log-odds of every agent of which they are known, untempered."""
        return {name: a.weight for name, a in self.agents.items() if a.weight is not None}

    def to_json(self) -> str:
        """Write it down; `from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Reliability:
        """Read what `to_json` has written.

        Raises:
            ValueError: the text is not of that form.
        """
        try:
            fields = json.loads(text)
            agents = {name: _agent(value) for name, value in fields.pop("agents").items()}
            fields |= {name: _tuple(fields[name]) for name in ("labels", "class_prior")}
            fields["warnings"] = tuple(fields.get("warnings", ()))  # none by earlier versions
            return cls(agents=agents, **fields)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a reliability that was written by to_json: {error}") from error

    def history(self) -> History:
        """Return what this run tells the next one; nothing of agents of which it learned nothing.

        The shares are as learned, an earlier history included; they weigh as many answers as
        this run has. So a history is not counted again and again.
        """
        learned = {} if self.method == "vote" else self.agents
        return History(
            {name: self._history(agent) for name, agent in learned.items() if agent.num_answers},
            self.labels,
        )

    def _history(self, agent: AgentReliability) -> AgentHistory:
        confusion = None
        if agent.confusion is not None:
            prior = self.class_prior or ()
            rows = zip(prior, agent.confusion, strict=True)
            confusion = tuple(tuple(agent.num_answers * p * e for e in row) for p, row in rows)
        return AgentHistory(
            (agent.accuracy or 0.0) * agent.num_answers, agent.num_answers, confusion
        )


@dataclass(frozen=True, slots=True)
class Posterior:
    """How likely the answers to a record are right; all probabilities add up to 1."""

    shares: tuple[float, ...]
    """By code: of every label, or of every distinct answer (`candidates_of` names them)."""
    none: float
    """That no answer given is right; 0 for a closed set and for `vote`."""

    def softened(self, temperature: float) -> Posterior:
        """Return the probabilities to the power of 1 / temperature, scaled to a sum of 1."""
        *shares, none = soften(np.array([[*self.shares, self.none]]), temperature)[0].tolist()
        return Posterior(tuple(shares), none)


def soften(probabilities: Floats, temperature: float) -> Floats:
    """Return rows to the power of 1 / temperature, each scaled to a sum of 1."""
    powers = probabilities ** (1 / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def temperature_of(reliability: Reliability, table: PatternTable) -> float:
    """Return by what to soften posteriors so that their mean is the mean share of agreement.

    It is that of the published answers (see `by_reliability`); at least 1, since it is to make
    nothing surer, and at most `MAX_TEMPERATURE`.
    """
    probabilities = _probabilities(reliability, table)
    rows = np.arange(len(table.counts))
    votes = table.sums_by_code(np.ones(table.codes.shape), probabilities.shape[1])
    shares = votes / votes.sum(axis=1, keepdims=True)
    best = np.where(votes > 0, shares + probabilities, -1.0).argmax(axis=1)
    agreement = table.counts @ shares[rows, best]
    low, high = 0.0, float(np.log(MAX_TEMPERATURE))
    for _ in range(40):
        middle = (low + high) / 2
        sure = table.counts @ soften(probabilities, np.exp(middle))[rows, best]
        low, high = (middle, high) if sure > agreement else (low, middle)
    return float(np.exp(high)) if high > 1e-9 else 1.0


def posterior(reliability: Reliability, pattern: str) -> Posterior:
    """Weigh the answers to one record; depends on the arguments alone, so it may be cached.

    With method `vote` the shares are the answers', not probabilities of being right.

    Raises:
        ValueError: the pattern is not one of these agents and labels.
    """
    return posteriors(reliability, [pattern])[pattern]


def posteriors(reliability: Reliability, patterns: Iterable[str]) -> dict[str, Posterior]:
    """Return the posterior of every distinct pattern.

    Raises:
        ValueError: a pattern is not one of these agents and labels.
    """
    num_labels = None if reliability.labels is None else len(reliability.labels)
    counts = dict.fromkeys(patterns, 1)
    table = parse_patterns(counts, len(reliability.agents), num_labels)
    shares = _probabilities(reliability, table)
    if num_labels is not None:
        found = {key: Posterior(tuple(row), 0.0) for key, row in _rows(table, shares)}
    else:
        sizes = (table.codes.max(axis=1, initial=MISSING) + 1).tolist()
        found = {
            key: Posterior(tuple(row[:size]), row[-1])
            for (key, row), size in zip(_rows(table, shares), sizes, strict=True)
        }
    return {key: found[key] for key in counts}


def _rows(table: PatternTable, shares: Floats) -> Iterable[tuple[str, list[float]]]:
    return zip(table.patterns, shares.tolist(), strict=True)


def _probabilities(reliability: Reliability, table: PatternTable) -> Floats:
    """Return [P, K] for a closed set, [P, C + 1] with "none" last for an open one."""
    agents = list(reliability.agents.values())
    if reliability.method == "vote":
        return _vote_shares(reliability, table)
    families = family_numbers([agent.family_id for agent in agents])
    correlation = np.zeros(int(families.max()) + 1)
    correlation[families] = [agent.correlation for agent in agents]
    factors = exponents(table, families, correlation)
    known = np.array([agent.accuracy is not None for agent in agents])
    factors *= known[table.agent_of]  # of whom nothing is known, the word counts nothing
    accuracy = np.array([0.5 if a.accuracy is None else a.accuracy for a in agents])
    if reliability.num_wrong is not None:
        model = open_set.OpenSetModel(accuracy, reliability.num_wrong)
        return model.posteriors(table, factors)
    prior = np.array(reliability.class_prior)
    confusion = dawid_skene.one_coin(accuracy, len(prior))
    for position, agent in enumerate(agents):
        if agent.confusion is not None:
            confusion[position] = agent.confusion
    closed = dawid_skene.ClosedSetModel(prior, accuracy, confusion)
    return closed.posteriors(table, factors)


def _vote_shares(reliability: Reliability, table: PatternTable) -> Floats:
    every_answer = np.ones(table.codes.shape)
    if reliability.labels is None:
        return open_set.vote_shares(table, every_answer)
    return dawid_skene.vote_shares(table, every_answer, len(reliability.labels))


def _agent(fields: dict[str, Any]) -> AgentReliability:
    return AgentReliability(
        **{
            **fields,
            "interval": _tuple(fields["interval"]),
            "confusion": _tuple(fields["confusion"]),
        }
    )


def _tuple(value: Any) -> Any:
    """Return JSON's lists as tuples, nested ones too; anything else as it is."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
