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
class Passage:
    """Tokens that a model is to predict, each from those before it."""

    tokens: Sequence[int]
    source: Sequence[int] | None = None
    """What an encoder-decoder reads first."""


def passages(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[Passage]:
    """Return the beginnings of texts as passages.

    An encoder-decoder is asked about its own greedy output: texts say nothing of what it should
    make of them. So `model` is to be the one that another is compared with.
    """
    read = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    if not model.config.is_encoder_decoder:
        return [Passage(tokens) for tokens in read]
    made = []
    for source in read:
        ids = torch.tensor([source], device=model.device)
        found = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        made.append(Passage(found[0].tolist(), source))
    return made


def perplexity(logits: Callable[[Passage], Tensor], asked: Sequence[Passage]) -> float:
    """Return e to the mean of the tokens' negative log-probabilities; the first are given.

    Args:
        logits: gives those of the next token [tokens, vocabulary] at each token of a passage.
    """
    total, number = 0.0, 0
    for passage in asked:
        after = torch.tensor(passage.tokens[1:])
        found = logits(passage)[: len(after)].float().log_softmax(-1).cpu()
        total -= float(found.gather(1, after[:, None]).double().sum())
        number += len(after)
    return math.exp(min(total / max(1, number), 700.0)) if math.isfinite(total) else math.inf


def module_logits(model: Any) -> Callable[[Passage], Tensor]:
    """Return what gives the logits of a module of `transformers`."""

    def logits(passage: Passage) -> Tensor:
        tokens = torch.tensor([passage.tokens], device=model.device)
        asked = {"input_ids": tokens}
        if passage.source is not None:
            source = torch.tensor([passage.source], device=model.device)
            asked = {"input_ids": source, "decoder_input_ids": tokens}
        found: Tensor = model(**asked, use_cache=False).logits[0]
        return found

    return logits
