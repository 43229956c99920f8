"""How well a model foresees texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 64
"""Of a text so many are read: every model has room for them."""

MAX_NEW_TOKENS = 32
"""Of an encoder-decoder's own output."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens that a model is to predict, each from those before it."""

    tokens: Sequence[int]
    source: Sequence[int] | None = None
    """What an encoder-decoder reads first."""


def samples(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[Sample]:
    """Return the beginnings of texts as samples.

    An encoder-decoder is asked about its own greedy output: texts say nothing of what it should
    make of them. So `model` is to be the one that another is compared with.
    """
    read = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    if not model.config.is_encoder_decoder:
        return [Sample(tokens) for tokens in read]
    made = []
    for source in read:
        ids = torch.tensor([source], device=model.device)
        found = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        made.append(Sample(found[0].tolist(), source))
    return made


def perplexity(logits: Callable[[Sample], Tensor], asked: Sequence[Sample]) -> float:
    """Return e to the mean of the tokens' negative log-probabilities; the first are given.

    Args:
        logits: gives those of the next token [tokens, vocabulary] at each token of a sample.
    """
    total, number = 0.0, 0
    for sample in asked:
        after = torch.tensor(sample.tokens[1:])
        found = logits(sample)[: len(after)].float().log_softmax(-1).cpu()
        total -= float(found.gather(1, after[:, None]).double().sum())
        number += len(after)
    return math.exp(min(total / max(1, number), 700.0)) if math.isfinite(total) else math.inf


def module_logits(model: Any) -> Callable[[Sample], Tensor]:
    """Return what gives the logits of a module of `transformers`."""

    def logits(sample: Sample) -> Tensor:
        tokens = torch.tensor([sample.tokens], device=model.device)
        if sample.source is None:
            found: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
            return found
        source = torch.tensor([sample.source], device=model.device)
        found = model(input_ids=source, decoder_input_ids=tokens, use_cache=False).logits[0]
        return found

    return logits
