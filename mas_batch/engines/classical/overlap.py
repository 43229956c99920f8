"""How many of the first half's words the second half has, as a number for the task `score`.

ROUGE-1 precision over distinct words (Lin, 2004), without stemming: of a summary above its text,
how much of the summary stands in the text. Case, order and frequency do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.classical.halves import HalvesOptions, halves, scaled
from mas_batch.engines.classical.predicting import PredictingEngine, Prediction, Predictor, words
from mas_batch.engines.options import read_options
from mas_batch.models import ModelFiles

read = partial(read_options, HalvesOptions, engine="overlap")


class Overlap(Predictor):
    """Counts words."""

    def __init__(self, options: HalvesOptions) -> None:
        self._options = options

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the share of the first half's words, scaled to the range.

        Raises:
            EngineError: a text is not two halves.
        """
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> Prediction:
        first, second = (set(words(half)) for half in halves(text, self._options))
        return scaled(len(first & second) / max(1, len(first)), self._options)


def load(model: ModelFiles, config: EngineConfig) -> PredictingEngine:
    """Make the engine.

    Raises:
        JobError: an option is unknown or has a value that is not allowed.
    """
    options = read(config.options)
    facts = {"engine": "overlap", "options": options.model_dump(mode="json", exclude_defaults=True)}
    return PredictingEngine(Overlap(options), facts, config)
