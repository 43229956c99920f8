"""Merges of real answers by unlike agents, yes-men and spammers among them.

    python benchmarks/real_answers.py [--held-out] [--resamples 2000] [--draws 30]

`answers/*.json` hold what agents said, as one digit per record (the label's position; "-": no
answer), and what is right. Beside the sets as they are, agents are added that say one label 93 % of
the time (`yes`) or anything at all (`spam`). `--held-out`: `answers/held-out/*.json`, on which no
rule or constant was chosen.

`best`: the best agent in hindsight. `gap`: reliability less the better of vote and best agent, with
the 95 % interval of a paired bootstrap over records. ECE (15 bins): of the vote's share of
agreement, of the posterior as the model has it, and as published. `ECE 100`, `ECE 400`: published,
calibrated by so many labels that `mas-batch label` would choose, of the other records, mean of the
draws; beside it that of a perfectly calibrated confidence, the noise of so few records. `gap 100`,
`gap 400`: `gap` of what is published with so many labels, on the other records, mean of the draws
and of their bootstraps' intervals; behind it the number of draws in which the interval is below 0.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.calibration import calibration_error, learn_from_labels
from mas_batch.aggregate.label_weights import Labelled, features
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.posterior_vote import by_reliability
from mas_batch.aggregate.reliability import Reliability, posterior
from mas_batch.aggregate.vote import vote
from mas_batch.labelling import spread

FOLDER = Path(__file__).parent / "answers"
HELD_OUT = FOLDER / "held-out"
"""Made when the rules of merging and of labels were settled, which must not follow from them."""


@dataclass(frozen=True)
class AnswerSet:
    """What agents said about records whose right answer is known."""

    name: str
    labels: tuple[str, ...]
    families: Mapping[str, str]
    truth: str
    answers: Mapping[str, str]
    """Agent → a character per record."""

    def plus(self, num_yes: int, num_spam: int, only: Sequence[str] | None = None) -> AnswerSet:
        """Add agents that know nothing; keep `only` these of the others."""
        random, labels = np.random.default_rng(0), len(self.labels)
        kept = {a: given for a, given in self.answers.items() if only is None or a in only}
        added = {}
        for number in range(num_yes + num_spam):
            digits = random.integers(labels, size=len(self.truth))
            if number < num_yes:
                digits[random.random(len(digits)) < 0.93] = labels - 1 - number
            name = f"yes{number}" if number < num_yes else f"spam{number}"
            added[name] = "".join(map(str, digits))
        families = {**self.families, **{name: name for name in added}}
        told = [*([", ".join(kept)] if only else []), *added]
        name = f"{self.name}: {', '.join(told)}" if only else f"{self.name} + {', '.join(told)}"
        return replace(self, name=name, families=families, answers={**kept, **added})


@dataclass(frozen=True)
class Judged:
    """Merges of a set, record by record."""

    learned: Reliability
    correct: Mapping[str, NDArray[Any]]
    """`vote`, `reliability` and every agent → right or wrong."""
    confidence: Mapping[str, NDArray[Any]]
    """`vote`, `raw` and `published`."""
    verdicts: Sequence[Verdict]
    """By reliability."""
    truth: Sequence[str]


def read_sets(folder: Path = FOLDER) -> Iterator[AnswerSet]:
    """Yield the sets as they are; a file may list several, as choices of its agents."""
    for file in sorted(folder.glob("*.json")):
        facts = json.loads(file.read_text())
        labels, answers = tuple(facts["labels"]), facts["answers"]
        for name, agents in facts.get("sets", {file.stem: list(answers)}).items():
            chosen = {agent: answers[agent] for agent in agents}
            yield AnswerSet(name, labels, facts["families"], facts["truth"], chosen)


_SPOILT = {
    *("tweets-150", "movies", "amazon", "sections", "synopses"),
    *("glosses", "interface", "fortunes", "role"),  # held out
}


def degenerate_sets(sets: Sequence[AnswerSet]) -> Iterator[AnswerSet]:
    """Yield sets with agents that know nothing."""
    for each in sets:
        if each.name in _SPOILT:
            yield each.plus(1, 0)
            yield each.plus(1, 2)
        if each.name == "tweets-150":
            yield each.plus(0, 0, only=("bayes", "centroid", "smollm2"))
            yield each.plus(1, 0, only=("bayes", "centroid"))


def judge(each: AnswerSet) -> Judged:
    """Merge a set by vote and by learned reliability."""
    agents = sorted(each.answers)
    columns = zip(each.truth, *(each.answers[a] for a in agents), strict=True)
    rows = [row for row in columns if any(code != "-" for code in row[1:])]
    patterns = [";".join(row[1:]).replace("-", "") for row in rows]
    families = {agent: each.families[agent] for agent in agents}
    learned = learn(Counter(patterns), agents, families, each.labels)

    @cache
    def verdicts(pattern: str) -> Any:
        fields = zip(agents, pattern.split(";"), strict=True)
        said = [(a, each.labels[int(code)]) for a, code in fields if code]
        ballots = [Ballot(agent, families[agent], 0, label, label) for agent, label in said]
        published = by_reliability(ballots, learned)
        raw = posterior(learned, pattern).shares[each.labels.index(published.answer)]
        return vote(ballots), published, raw

    found = [verdicts(pattern) for pattern in patterns]
    truth = [each.labels[int(row[0])] for row in rows]
    correct = {
        name: np.array([each.answer == t for each, t in zip(column, truth, strict=True)])
        for name, column in (
            ("vote", [f[0] for f in found]),
            ("reliability", [f[1] for f in found]),
        )
    }
    for place, agent in enumerate(agents, 1):
        correct[agent] = np.array([row[place] == row[0] for row in rows])
    return Judged(
        learned,
        correct,
        {
            "vote": np.array([f[0].confidence for f in found]),
            "published": np.array([f[1].confidence for f in found]),
            "raw": np.array([f[2] for f in found]),
        },
        [f[1] for f in found],
        truth,
    )


def gap(judged: Judged, num_resamples: int) -> tuple[float, float, float]:
    """Return reliability less the better of vote and best agent, and its 95 % interval."""
    everything = np.arange(len(judged.truth))
    return _gap(judged, judged.correct["reliability"], everything, num_resamples)


def _gap(judged: Judged, correct: Any, rows: Any, num_resamples: int) -> tuple[float, float, float]:
    others = [right[rows] for name, right in judged.correct.items() if name != "reliability"]
    difference = correct.astype(float) - max(others, key=lambda right: right.mean())
    random = np.random.default_rng(0)
    size = (num_resamples, len(difference))
    means = difference[random.integers(len(difference), size=size)].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


@dataclass(frozen=True)
class WithLabels:
    """Of the records that were not labelled, in every draw."""

    gaps: NDArray[Any]
    """[draws, 3]: as `gap`."""
    errors: NDArray[Any]
    """[draws, 2]: ECE, and that of perfect confidences."""


def with_labels(judged: Judged, num_labels: int, draws: int, num_resamples: int) -> WithLabels:
    """Let labelled records decide what is published, and how sure it is."""
    confidence, truth = judged.confidence["published"], judged.truth
    gaps, errors = [], []
    for seed in range(draws):
        random = np.random.default_rng(seed)
        ids = [str(lot) for lot in random.permutation(len(truth))]
        labelled = spread(confidence, ids, num_labels)
        rest = np.setdiff1d(np.arange(len(truth)), labelled)
        lesson = learn_from_labels(
            [_labelled(judged.verdicts[row], truth[row]) for row in labelled],
            "reliability",
            judged.learned.weights,
        )
        weights = lesson.weights
        found = [
            judged.verdicts[row] if weights is None else weights.apply(judged.verdicts[row])
            for row in rest
        ]
        correct = np.array(
            [each.answer == truth[row] for each, row in zip(found, rest, strict=True)]
        )
        mapped = lesson.calibration.apply(np.array([each.confidence for each in found]))
        lucky = random.random(len(rest)) < mapped
        gaps.append(_gap(judged, correct, rest, num_resamples))
        errors.append((calibration_error(mapped, correct), calibration_error(mapped, lucky)))
    return WithLabels(np.array(gaps), np.array(errors))


def _labelled(found: Verdict, truth: str) -> Labelled:
    answers = [candidate.answer for candidate in found.support]
    right = answers.index(truth) if truth in answers else -1
    assert found.confidence is not None
    return Labelled(found.confidence, right, features(found))


def row(each: AnswerSet, num_resamples: int, draws: int) -> str:
    """Return a set's row of the table."""
    judged = judge(each)
    accuracy = {name: float(right.mean()) for name, right in judged.correct.items()}
    best = max(value for name, value in accuracy.items() if name not in ("vote", "reliability"))
    difference, low, high = gap(judged, num_resamples)
    number = len(judged.correct["vote"])
    errors = [
        calibration_error(judged.confidence["vote"], judged.correct["vote"]),
        calibration_error(judged.confidence["raw"], judged.correct["reliability"]),
        calibration_error(judged.confidence["published"], judged.correct["reliability"]),
    ]
    cells = [each.name, str(number), *(f"{x:.3f}" for x in (best, accuracy["vote"]))]
    cells.append(f"{accuracy['reliability']:.3f}{' (vote)' * (judged.learned.method == 'vote')}")
    cells.append(f"{difference:+.3f} ({low:+.3f} to {high:+.3f})")
    cells += [f"{error:.3f}" for error in errors]
    for num_labels in (100, 400):
        if number < num_labels + 200:
            cells += ["–", "–"]
            continue
        after = with_labels(judged, num_labels, draws, min(num_resamples, 400))
        (difference, low, high), missed = after.gaps.mean(axis=0), (after.gaps[:, 2] < 0).sum()
        cells.append(f"{difference:+.3f} ({low:+.3f} to {high:+.3f}) {missed}")
        error, noise = after.errors.mean(axis=0)
        cells.append(f"{error:.3f} ({noise:.3f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=30, help="of labelled records")
    options = parser.parse_args()
    sets = list(read_sets(HELD_OUT if options.held_out else FOLDER))
    head = "set, records, best, vote, reliability, gap, agreement, raw, published"
    head += ", gap 100, ECE 100, gap 400, ECE 400"
    print(f"| {head.replace(', ', ' | ')} |\n|{'---|' * len(head.split(', '))}")
    for each in [*sets, *degenerate_sets(sets)]:
        print(row(each, options.resamples, options.draws), flush=True)


if __name__ == "__main__":
    main()
