"""Draws tokens from logits, the same for a row whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mas_batch.engines.base import Sampling

_TOP = 1024
"""The likeliest tokens hold nearly always what top-p keeps; sorting a vocabulary is slow."""


class Sampler:
    """Draws by inverse distribution function from a random stream of each row's own.

    One number per row and step, so that a sample depends on its request's seed and its own
    number alone. Two batches can differ only by rounding in the model's logits, which moves a
    draw with a probability of about that rounding error.
    """

    def __init__(self, sampling: Sampling, streams: Sequence[np.random.SeedSequence]) -> None:
        """Take one random stream per row."""
        self._sampling = sampling
        steps = sampling.max_new_tokens
        self._uniform = np.stack(
            [np.random.Generator(np.random.PCG64(stream)).random(steps) for stream in streams]
        )

    def __call__(self, logits: Tensor, active: Sequence[int], step: int) -> Tensor:
        """Return one token per row of `logits`; `active` are the rows' numbers from the start."""
        return draw(logits, self._sampling, self._uniform[active, step])


def draw(logits: Tensor, sampling: Sampling, uniform: np.ndarray) -> Tensor:
    """Return one token per row by a number between 0 and 1 per row."""
    device = logits.device
    if device.type == "mps":  # it has no float64, and float32 sums are off by a draw's grain
        logits = logits.cpu()
    probs = (logits.double() / sampling.temperature).softmax(-1)
    # In the order of token ids: a near-tie may swap places in an order by probability.
    below = _restrict(probs, sampling.top_k, sampling.top_p).cumsum(-1)
    # Divided by its last value it ends with exactly 1, above any draw.
    below /= below[:, -1:].clone()
    drawn = torch.from_numpy(uniform).to(below.device)
    tokens = torch.searchsorted(below, drawn[:, None], right=True)[:, 0]
    # Of logits that are not numbers any token is as good, but it has to be one.
    return tokens.clamp(max=logits.shape[-1] - 1).to(device)


def _restrict(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to 0 what is not among the `top_k` likeliest, then what is beyond `top_p` of the rest."""
    if 0 < top_k < probs.shape[-1]:
        probs = probs.where(probs >= probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        wanted = top_p * probs.sum(-1, keepdim=True)
        best = probs.topk(min(_TOP, probs.shape[-1])).values
        if bool((best.sum(-1, keepdim=True) < wanted).any()):
            best = probs.sort(descending=True).values
        kept = best.cumsum(-1) - best < wanted
        least = best.where(kept, torch.inf).amin(-1, keepdim=True)
        # Of equals at the border those of lower id are kept: the order of a sort is not ours.
        tied = probs == least
        num_tied = (kept & (best == least)).sum(-1, keepdim=True)
        probs = probs.where((probs > least) | (tied & (tied.cumsum(-1) <= num_tied)), 0)
    return probs
