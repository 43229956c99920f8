"""The label whose words occur most often in the text: the baseline that needs no examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.classical.predicting import PredictingEngine, Prediction, Predictor, words
from mas_batch.engines.options import EngineOptions, read_options
from mas_batch.models import ModelFiles

Label = Annotated[str, Field(min_length=1)]


class Options(EngineOptions):
    """What `agents.options` may hold for this engine."""

    labels: Annotated[dict[Label, str], Field(min_length=1)]
    """Label → its words, apart by spaces; whole words count, without case."""


read = partial(read_options, Options, engine="keywords")


class Keywords(Predictor):
    """Counts words; a text that has none of any label gets no answer."""

    def __init__(self, options: Options) -> None:
        self._words = {label: set(words(text)) for label, text in options.labels.items()}

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the label with most occurrences; of equals the earlier in the job."""
        return [Prediction(self._pick(text)) for text in texts]

    def _pick(self, text: str) -> str:
        counts = Counter(words(text))
        hits = {label: sum(counts[w] for w in own) for label, own in self._words.items()}
        best = max(hits, key=lambda label: hits[label])
        return best if hits[best] else ""


def load(model: ModelFiles, config: EngineConfig) -> PredictingEngine:
    """Make the engine.

    Raises:
        JobError: an option is unknown, missing or has a value that is not allowed.
    """
    options = read(config.options)
    facts = {"engine": "keywords", "options": options.model_dump(mode="json")}
    return PredictingEngine(Keywords(options), facts, config)
