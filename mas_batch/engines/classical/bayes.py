"""Multinomial naive Bayes over words, learned from labelled examples when it is loaded.

A class is a label; for replies it is a known answer, its words are those of the questions that
it answers, and what comes out is query likelihood retrieval. Manning, Raghavan & Schütze,
Introduction to Information Retrieval (2008), chapters 12 and 13.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.classical.examples import ExampleOptions, Examples, read_examples
from mas_batch.engines.classical.predicting import (
    PredictingEngine,
    Prediction,
    Predictor,
    most_likely,
    words,
)
from mas_batch.engines.options import read_options
from mas_batch.errors import JobError
from mas_batch.models import ModelFiles


class Options(ExampleOptions):
    """What `agents.options` may hold for this engine."""

    smoothing: Annotated[float, Field(gt=0.0)] = 1.0
    """Added to every count (1 is Laplace's); less trusts single words more."""
    prior: Literal["examples", "uniform"] = "examples"
    """How likely a label is before a word is read: as often as in the examples, or all alike."""


read = partial(read_options, Options, engine="bayes")


class NaiveBayes(Predictor):
    """P(label | words) ∝ P(label) · Π P(word | label); words that no example has are passed over.

    Only counts above zero are kept, word by word, so memory grows with the examples, not with
    words × labels.
    """

    def __init__(self, examples: Examples, options: Options) -> None:
        num_examples = Counter(examples.labels)
        self._labels = tuple(sorted(num_examples))
        counts, totals = _count_words(examples, self._labels)
        smoothing = options.smoothing
        # log P(word | label) is the word's gain minus the label's log total, up to log(smoothing),
        # which is the same for every label.
        self._log_totals = np.log(totals + smoothing * len(counts))
        self._gains: dict[str, tuple[NDArray[np.intp], NDArray[np.float64]]] = {
            word: (
                np.array(list(by_label), dtype=np.intp),
                np.log1p(np.array(list(by_label.values())) / smoothing),
            )
            for word, by_label in counts.items()
        }
        uniform = options.prior == "uniform"
        self._log_prior = np.log([1 if uniform else num_examples[x] for x in self._labels])

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the likeliest label of each text and the log of its posterior."""
        owners = np.arange(len(self._labels))
        return [most_likely(self._scores(text), owners, self._labels) for text in texts]

    def _scores(self, text: str) -> NDArray[np.float64]:
        """Return log P(label, words) of every label, up to one constant."""
        known = Counter(word for word in words(text) if word in self._gains)
        scores: NDArray[np.float64] = self._log_prior - known.total() * self._log_totals
        for word in sorted(known):  # sums round: their order must not be that of the text
            labels, gains = self._gains[word]
            scores[labels] += known[word] * gains
        return scores


def _count_words(
    examples: Examples, labels: Sequence[str]
) -> tuple[dict[str, Counter[int]], NDArray[np.int64]]:
    """Return word → how often it stands under the label of a position; and each label's sum.

    Raises:
        JobError: there is no word at all.
    """
    position = {label: i for i, label in enumerate(labels)}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    totals = np.zeros(len(labels), dtype=np.int64)
    for text, label in zip(examples.texts, examples.labels, strict=True):
        found = words(text)
        totals[position[label]] += len(found)
        for word in found:
            counts[word][position[label]] += 1
    if not counts:
        raise JobError("the examples have no words", key="agents.options.text")
    return dict(counts), totals


def load(model: ModelFiles, config: EngineConfig) -> PredictingEngine:
    """Learn from the examples.

    Raises:
        JobError: an option is unknown or has a value that is not allowed, or the examples
            cannot be read.
    """
    options = read(config.options)
    examples = read_examples(options)
    facts = {
        "engine": "bayes",
        "examples_sha256": examples.sha256,
        "num_examples": len(examples.texts),
        "options": options.model_dump(mode="json", exclude_defaults=True),
    }
    predictor = NaiveBayes(examples, options)
    return PredictingEngine(predictor, facts, config, reads_context=options.context)
