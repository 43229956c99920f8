"""How good answers are, by the kind of answer. A missing answer is a wrong one.

A `SumMetric` is a function of sums over the records, so it can be resampled; a `WholeMetric`
needs all answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name

import numpy as np

from mas_batch.aggregate.answer_kinds import ANSWER_KINDS
from mas_batch.aggregate.normalise import normalise_text
from mas_batch.errors import RunError
from mas_batch.evaluation.libraries import library
from mas_batch.evaluation.systems import (
    Evidence,
    Indices,
    Matrix,
    System,
    Vector,
    number_texts,
)
from mas_batch.evaluation.text_metrics import bleu, chrf, rouge
from mas_batch.job import Task
from mas_batch.tasks import TASKS


@dataclass(frozen=True, slots=True, eq=False)
class SumMetric:
    """A score of summed statistics."""

    name: str
    perfect: float
    """The best score; 0 for an error, of which less is better."""
    statistics: Matrix
    """Of every candidate against its record's reference; shape [candidates, K]."""
    score: Callable[[Matrix], Vector]
    """Sums [R, K] → scores [R]."""

    @property
    def losses(self) -> Vector:
        """Return how wrong each candidate is, 0 for a perfect one; shape [candidates].

        In [0, 1], but for an error, which is in its own unit.
        """
        scores = self.score(self.statistics)
        return scores if self.perfect == 0 else 1 - scores / self.perfect


@dataclass(frozen=True, slots=True, eq=False)
class WholeMetric:
    """A score of all answers of a system at once; higher is better."""

    name: str
    score: Callable[[System], float | None]
    """None where it is not defined."""


@dataclass(frozen=True, slots=True, eq=False)
class Metrics:
    """The metrics of one task over one run's candidates."""

    sums: Sequence[SumMetric]
    """The first is the one that decides who is best."""
    whole: Sequence[WholeMetric] = ()
    signatures: Mapping[str, str] = field(default_factory=dict)
    """Metric → version and settings, to be quoted beside a figure."""
    notes: Sequence[str] = ()

    @property
    def goal(self) -> SumMetric:
        """Return the metric that decides who is best."""
        return self.sums[0]


Judge = Callable[[Evidence, Task], Metrics]
"""The statistics of every candidate, by the metrics of one kind of answer."""


def metrics_for(task: Task, answer_kind: str, evidence: Evidence) -> Metrics:
    """Compute the statistics of every candidate.

    Raises:
        RunError: a reference of a `score` task is not a finite number.
        RunError: a package of the extra `evaluate` is not installed.
    """
    judge: Judge = resolve_name(ANSWER_KINDS[answer_kind].metrics)
    return judge(evidence, task)


def mean_of(sums: Matrix) -> Vector:
    """Divide the first column by the second, the number of records; NaN for no record."""
    means = np.full(len(sums), np.nan)
    np.divide(sums[:, 0], sums[:, 1], out=means, where=sums[:, 1] > 0)
    return means


def _counted(values: Vector) -> Matrix:
    """Put a 1 beside every value, for `mean_of`."""
    return np.column_stack([values, np.ones(len(values))])


def label_metrics(evidence: Evidence, task: Task) -> Metrics:
    """Count right labels; a `Judge`."""
    labels = task.labels or ()
    names, codes = number_texts([*evidence.references, *(a or "" for a in evidence.answers)])
    references, answers = codes[: evidence.num_records], codes[evidence.num_records :]
    missing = np.array([answer is None for answer in evidence.answers], np.bool_)
    answers = np.where(missing, len(names), answers)
    correct = (answers == references[evidence.record_of]).astype(np.float64)
    unknown = ~np.isin(np.array(names), [normalise_text(label) for label in labels])
    num_unknown = int(unknown[references].sum())
    notes = [f"{num_unknown:,} references are none of the task's labels: no answer can be right"]
    return Metrics(
        sums=[SumMetric("accuracy", 1.0, _counted(correct), mean_of)],
        whole=[WholeMetric("macro-F1", lambda s: _macro_f1(s, references, answers, len(names)))],
        notes=notes if num_unknown else [],
    )


def _macro_f1(system: System, references: Indices, answers: Indices, missing: int) -> float:
    """Return the mean F1 of the classes that are a reference or an answer; a missing one is none.

    Args:
        references: class of every record; answers: class of every candidate.
        missing: the class of missing answers.
    """
    true, said = references[system.records], answers[system.candidates]
    classes = np.union1d(true, said[said != missing])
    f1 = library("sklearn.metrics").f1_score
    return float(f1(true, said, labels=classes, average="macro", sample_weight=system.weights))


def value_metrics(evidence: Evidence, task: Task) -> Metrics:
    """Measure errors of numbers; a `Judge`."""
    minimum, maximum = task.minimum, task.maximum
    references = np.array([_number(text) for text in evidence.references])
    true = references[evidence.record_of]
    # A missing number is as wrong as a number can be: the end of the scale that is further away.
    furthest = np.where(true - minimum > maximum - true, minimum, maximum)
    given = np.array([np.nan if a is None else float(a) for a in evidence.answers])
    answers = np.where(np.isnan(given), furthest, given)

    def correlation(of: Callable[[Vector], Vector]) -> Callable[[System], float | None]:
        return lambda s: _correlation(
            of(references[s.records]), of(answers[s.candidates]), s.weights
        )

    return Metrics(
        sums=[SumMetric("MAE", 0.0, _counted(np.abs(answers - true)), mean_of)],
        whole=[
            WholeMetric("Pearson", correlation(lambda x: x)),
            WholeMetric("Spearman", correlation(library("scipy.stats").rankdata)),
        ],
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise RunError(f"reference {text!r} is not a number; a `score` task is judged by numbers")
    return value


def _correlation(x: Vector, y: Vector, weights: Vector) -> float | None:
    """Return Pearson's correlation; None where one side is constant.

    Not scipy's, which knows no weights: several answers to a record count as one.
    """
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    covariance = np.cov(x, y, aweights=weights, ddof=0)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def text_metrics(evidence: Evidence, task: Task) -> Metrics:
    """Compare texts; a `Judge`."""
    hypotheses = [answer or "" for answer in evidence.answers]
    references = [evidence.references[record] for record in evidence.record_of]
    corpus = (chrf(), bleu(task.language))
    sums = [
        SumMetric(each.name, 100.0, each.statistics(hypotheses, references), each.score)
        for each in corpus
    ]
    f1, num_blind = rouge(hypotheses, references)
    sums += [SumMetric(name, 1.0, _counted(column), mean_of) for name, column in f1.items()]
    sums.sort(key=lambda metric: metric.name != TASKS[task.kind].goal)
    notes = [
        f"{num_blind:,} of {len(references):,} comparisons are with a reference without a letter "
        "a–z or a digit: ROUGE is 0 there; read chrF"
    ]
    signatures = {each.name: each.signature for each in corpus}
    signatures["ROUGE"] = "rouge-score, F1, no stemmer"
    return Metrics(sums, signatures=signatures, notes=notes if num_blind else [])
