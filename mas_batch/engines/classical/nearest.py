"""Answers by similarity in an encoder's space: the label, or the reply, of what is nearest.

`knn`: the examples nearest to the text vote, by exp(cosine / temperature) (Wu et al., 2018).
`centroid`: the label whose examples' mean is nearest (Rocchio, 1971). `zero-shot`: the label
whose own words are nearest; no examples. `similarity`: how near the two halves of the text are
to each other, as a number for the task `score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def close(self) -> None:
        """Free the encoder."""
        self._encoder.close()


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


def load(model: ModelFiles, config: EngineConfig) -> PredictingEngine:
    """Load the encoder and place the examples, or the labels, in its space.

    Raises:
        JobError: an option is unknown, missing or has a value that is not allowed, or the
            examples cannot be read.
        ModelError: the files are not an encoder's.
    """
    options = read(config.options)
    encoder = Encoder.load(model, config)
    facts = {
        "engine": "nearest",
        "model": model.source,
        "sha256": model.sha256,
        "device": encoder.device,
        "max_window_tokens": encoder.max_tokens,
        "method": options.method,
        "options": options.model_dump(mode="json", exclude_defaults=True),
    }
    if isinstance(options, Similarity):
        return PredictingEngine(HalvesSimilarity(encoder, options), facts, config)
    if isinstance(options, ZeroShot):
        labels = Examples(tuple(options.labels.values()), tuple(options.labels))
        prototypes = place(encoder, labels, prefix="")
    else:
        examples = read_examples(options)
        facts["examples_sha256"] = examples.sha256
        prototypes = place(encoder, examples, options.example_prefix)
        if isinstance(options, Centroid):
            prototypes = centroids(prototypes)
    facts["num_prototypes"] = len(prototypes.owners)
    k = options.k if isinstance(options, Knn) else None
    predictor = Nearest(encoder, prototypes, options, k)
    reads_context = isinstance(options, FromExamples) and options.context
    return PredictingEngine(predictor, facts, config, reads_context=reads_context)


def place(encoder: Encoder, examples: Examples, prefix: str) -> Prototypes:
    """Encode the examples; equal texts once, so that they are equally near to anything."""
    texts = sorted(set(examples.texts))
    rows = {text: row for row, text in enumerate(texts)}
    answers = tuple(sorted(set(examples.labels)))
    position = {answer: i for i, answer in enumerate(answers)}
    vectors = encoder.encode([prefix + text for text in texts])
    return Prototypes(
        vectors[[rows[text] for text in examples.texts]],
        np.array([position[label] for label in examples.labels], dtype=np.intp),
        answers,
    )


def centroids(examples: Prototypes) -> Prototypes:
    """Return one prototype per answer: the mean of its examples, at unit length."""
    sums = np.zeros((len(examples.answers), examples.vectors.shape[1]))
    np.add.at(sums, examples.owners, examples.vectors)
    means = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return Prototypes(means, np.arange(len(examples.answers), dtype=np.intp), examples.answers)
