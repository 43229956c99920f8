"""What the engines without a decoder share: each text gets the one answer that a rule picks.

They read `Request.text`, some `Request.context` too, and no prompt. They are deterministic, so
one answer per record is all that they have, and they read texts of any length whole, so nothing
is ever cut into parts.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.errors import EngineRefusedError

NO_LIMIT = 2**31 - 1
"""Tokens of context, where a text may have any length."""

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the runs of letters, digits and underscores, without case."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer."""

    text: str
    """Empty where there is none: the task then counts it as a missing answer."""
    log_probability: float | None = None
    """Of the answer among all those that could have been given; None where there is no such."""


class Predictor(ABC):
    """Picks an answer for each text; one that reads no words counts its own tokens."""

    @abstractmethod
    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return one answer per text; none may depend on the other texts."""

    def count_tokens(self, text: str) -> int:
        """Count what is read of a text."""
        return len(words(text))


class PredictingEngine:
    """An engine around a predictor. `Completion.token_ids` are empty: nothing was decoded."""

    takes_messages = False
    only_translates = False
    samples = False
    max_context_tokens = NO_LIMIT

    def __init__(
        self,
        predictor: Predictor,
        facts: Mapping[str, Any],
        config: EngineConfig,
        *,
        reads_context: bool = False,
        frees: Callable[[], None] | None = None,
    ) -> None:
        """Read `Request.text`, after `Request.context` if `reads_context`.

        Args:
            frees: what closing the engine does; None: nothing, it holds nothing of its own.
        """
        self._reads_context = reads_context
        self._predictor = predictor
        self._facts = facts
        self._frees = frees
        self.max_batch_tokens = config.max_batch_tokens

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Count the tokens of what is read."""
        text = self._text(request)
        return TokenizedPrompt(self._predictor.count_tokens(text), text)

    def _text(self, request: Request) -> str:
        if self._reads_context and request.context:
            return f"{request.context}\n{request.text}"
        return request.text

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Answer every request; an answer over `max_new_tokens` words is cut.

        Raises:
            EngineRefusedError: the sampling asks for more than the one answer there is.
        """
        if sampling.num_samples > 1 or sampling.temperature > 0 or sampling.num_beams > 1:
            raise EngineRefusedError(
                "this engine picks one answer and samples none: samples, sampling.temperature "
                "and sampling.num_beams have to keep their defaults"
            )
        start = time.perf_counter()
        prompts = [tokenized_prompt(self, request) for request in requests]
        found = self._predictor.predict([prompt.tokens for prompt in prompts])
        lengths = [prompt.num_tokens for prompt in prompts]
        token_s = (time.perf_counter() - start) / max(1, sum(lengths))
        return [
            [_completion(prediction, length, token_s * length, sampling.max_new_tokens)]
            for prediction, length in zip(found, lengths, strict=True)
        ]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest."""
        return self._facts

    def close(self) -> None:
        """Free what is the engine's own."""
        if self._frees is not None:
            self._frees()


def _completion(prediction: Prediction, length: int, compute_s: float, limit: int) -> Completion:
    said = prediction.text.split()
    whole = len(said) <= limit
    return Completion(
        text=prediction.text if whole else " ".join(said[:limit]),
        token_ids=(),
        sum_logprob=prediction.log_probability,
        num_tokens=min(len(said), limit),
        finish_reason="stop" if whole else "length",
        prompt_tokens=length,
        compute_s=compute_s,
    )


def most_likely(
    scores: NDArray[np.float64], owners: NDArray[np.intp], answers: Sequence[str]
) -> Prediction:
    """Normalise log-scores, add up those of one answer, and take the likeliest answer.

    Args:
        scores: [n], unnormalised log-probabilities of n hypotheses, at least one.
        owners: [n], the position in `answers` that each hypothesis speaks for.

    Of equals the earlier in `answers` is taken.
    """
    best = scores.max()
    shares = np.bincount(owners, np.exp(scores - best), len(answers))
    winner = int(shares.argmax())
    # The sum is at least 1: the best hypothesis is in it.
    return Prediction(answers[winner], float(np.log(shares[winner] / shares.sum())))
