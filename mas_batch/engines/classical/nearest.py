"""Answers by similarity in an encoder's space: the label, or the reply, of what is nearest.

`knn`: the examples nearest to the text vote, by exp(cosine / temperature) (Wu et al., 2018).
`centroid`: the label whose examples' mean is nearest (Rocchio, 1971). `zero-shot`: the label
whose own words are nearest; no examples. `similarity`: how near the two halves of the text are
to each other, as a number for the task `score`.

The engine is the encoder. The agents of one encoder share it, and it reads a text once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.classical.examples import Examples, read_examples
from mas_batch.engines.classical.halves import halves, scaled
from mas_batch.engines.classical.nearest_options import (
    Centroid,
    FromExamples,
    Knn,
    Similarity,
    Voting,
    ZeroShot,
    read,
)
from mas_batch.engines.classical.predicting import (
    PredictingEngine,
    Prediction,
    Predictor,
    most_likely,
)
from mas_batch.engines.encoder import Encoder
from mas_batch.models import ModelFiles


@dataclass(frozen=True, slots=True)
class Prototypes:
    """Points that each speak for an answer."""

    vectors: NDArray[np.float32]
    """[n, dimension], unit length."""
    owners: NDArray[np.intp]
    """[n], position in `answers`."""
    answers: tuple[str, ...]
    """Distinct, sorted."""


class _EncodingPredictor(Predictor):
    """Reads texts with an encoder, after `prefix`."""

    def __init__(self, encoder: Encoder, prefix: str = "") -> None:
        self._encoder = encoder
        self._prefix = prefix

    def count_tokens(self, text: str) -> int:
        """Count the encoder's tokens."""
        return self._encoder.count_tokens(self._prefix + text)


class Nearest(_EncodingPredictor):
    """Each text is answered by the `k` prototypes nearest to it (None: by all)."""

    def __init__(
        self, encoder: Encoder, prototypes: Prototypes, options: Voting, k: int | None
    ) -> None:
        super().__init__(encoder, options.prefix)
        self._prototypes = prototypes
        self._temperature = options.temperature
        self._k = k

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the answer with the largest share of exp(cosine / temperature), and its log."""
        vectors = self._encoder.encode([self._prefix + text for text in texts])
        # Rounded to what the encoder promises, so that equal examples tie whatever the batch is.
        cosines = np.round(vectors.astype(np.float64) @ self._prototypes.vectors.T, 5)
        return [self._answer(row) for row in cosines]

    def _answer(self, cosines: NDArray[np.float64]) -> Prediction:
        nearest = np.argsort(-cosines, kind="stable")[: self._k]
        scores = cosines[nearest] / self._temperature
        return most_likely(scores, self._prototypes.owners[nearest], self._prototypes.answers)


class HalvesSimilarity(_EncodingPredictor):
    """Scores how near the two halves of a text are."""

    def __init__(self, encoder: Encoder, options: Similarity) -> None:
        super().__init__(encoder)
        self._options = options

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the cosine of the halves, scaled to the range; below 0 it counts as 0.

        Raises:
            EngineError: a text is not two halves.
        """
        firsts, seconds = zip(*(halves(text, self._options) for text in texts), strict=True)
        vectors = self._encoder.encode([*firsts, *seconds]).astype(np.float64)
        cosines = np.einsum("ij,ij->i", vectors[: len(texts)], vectors[len(texts) :])
        return [scaled(float(cosine), self._options) for cosine in cosines]


class NearestEngine:
    """An encoder in memory, which agents ask in ways of their own.

    Raises:
        JobError: a device that is not there, or a dtype other than float32.
        ModelError: the files are not an encoder's.
    """

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        self._config = config
        self._encoder = Encoder.load(model, config)
        self._placed: dict[tuple[str, str], Prototypes] = {}
        self._facts: dict[str, Any] = {
            "engine": "nearest",
            "model": model.source,
            "sha256": model.sha256,
            "device": self._encoder.device,
            "max_window_tokens": self._encoder.max_tokens,
        }

    def for_agent(
        self, options: Mapping[str, Any], *, frees: Callable[[], None] | None = None
    ) -> PredictingEngine:
        """Place an agent's examples, or labels, in the encoder's space.

        Args:
            options: the agent's.
            frees: what closing the view does; None: nothing.

        Raises:
            JobError: an option is unknown, missing or has a value that is not allowed, or the
                examples cannot be read.
        """
        own = read(options)
        facts = {
            **self._facts,
            "method": own.method,
            "options": own.model_dump(mode="json", exclude_defaults=True),
        }
        if isinstance(own, Similarity):
            similarity = HalvesSimilarity(self._encoder, own)
            return PredictingEngine(similarity, facts, self._config, frees=frees)
        if isinstance(own, ZeroShot):
            labels = Examples(tuple(own.labels.values()), tuple(own.labels))
            prototypes = self._place(labels, prefix="")
        else:
            examples = read_examples(own)
            facts["examples_sha256"] = examples.sha256
            prototypes = self._place(examples, own.example_prefix)
            if isinstance(own, Centroid):
                prototypes = centroids(prototypes)
        facts["num_prototypes"] = len(prototypes.owners)
        predictor = Nearest(self._encoder, prototypes, own, own.k if isinstance(own, Knn) else None)
        reads_context = isinstance(own, FromExamples) and own.context
        return PredictingEngine(
            predictor, facts, self._config, reads_context=reads_context, frees=frees
        )

    def describe(self) -> Mapping[str, Any]:
        """Facts about the encoder."""
        return self._facts

    def close(self) -> None:
        """Free the encoder; no view can be used afterwards. May be called again."""
        self._placed.clear()
        self._encoder.close()

    def _place(self, examples: Examples, prefix: str) -> Prototypes:
        """Place examples, for all agents that have the same."""
        key = (examples.sha256, prefix)
        if key not in self._placed:
            self._placed[key] = place(self._encoder, examples, prefix)
        return self._placed[key]


def load(model: ModelFiles, config: EngineConfig) -> NearestEngine | PredictingEngine:
    """Load the encoder; where there are options, for the one agent that they are of.

    Closing that agent's view frees the encoder.

    Raises:
        JobError: as `NearestEngine` and its `for_agent` do.
        ModelError: the files are not an encoder's.
    """
    if not config.options:
        return NearestEngine(model, config)
    read(config.options)  # what is wrong with them is said before a model is loaded
    engine = NearestEngine(model, config)
    return engine.for_agent(config.options, frees=engine.close)


def place(encoder: Encoder, examples: Examples, prefix: str) -> Prototypes:
    """Encode the examples; equal texts are equally near to anything."""
    answers = tuple(sorted(set(examples.labels)))
    position = {answer: i for i, answer in enumerate(answers)}
    # Not remembered: ten thousand examples would drive out the texts that are being asked about.
    vectors = encoder.encode([prefix + text for text in examples.texts], remember=False)
    owners = np.array([position[label] for label in examples.labels], dtype=np.intp)
    return Prototypes(vectors, owners, answers)


def centroids(examples: Prototypes) -> Prototypes:
    """Return one prototype per answer: the mean of its examples, at unit length."""
    sums = np.zeros((len(examples.answers), examples.vectors.shape[1]))
    np.add.at(sums, examples.owners, examples.vectors)
    means = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return Prototypes(means, np.arange(len(examples.answers), dtype=np.intp), examples.answers)
