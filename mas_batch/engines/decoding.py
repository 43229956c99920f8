"""The decode loop that the engines in PyTorch share, and what becomes of its results.

A row is one sequence being decoded; an engine's scores are [rows, vocabulary] of the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mas_batch.engines.base import Completion
from mas_batch.engines.timing import share_time
from mas_batch.errors import EngineError

Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(scores, the rows' numbers from the start, step) → token per row."""
ScoredChoose = Callable[[Tensor, Sequence[int], int], tuple[Tensor, Tensor]]
"""The same, with the tokens' log-probabilities."""


@dataclass(slots=True)
class Decoded:
    """One row's tokens so far."""

    tokens: list[int] = field(default_factory=list)
    """As generated, the end token included."""
    sum_logprob: float = 0.0
    """Natural logarithm of their probability at temperature 1, nothing banned."""
    ended: bool = False
    """By an end token; otherwise max_new_tokens cut it."""


class Rows(Protocol):
    """A batch of sequences as they grow."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token per row; return the scores of the next."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row named twice is doubled."""


def greedy(scores: Tensor, active: Sequence[int], step: int) -> Tensor:
    """Choose the likeliest tokens; a `Choose`."""
    return scores.argmax(-1)


def extend(
    rows: Rows, scores: Tensor, choose: ScoredChoose, ends: Collection[int], max_new_tokens: int
) -> list[Decoded]:
    """Choose and feed back tokens, from the first `scores` on; a row leaves the batch as it ends.

    Raises:
        EngineError: the scores are not finite.
    """
    done = [Decoded() for _ in range(len(scores))]
    active = list(range(len(done)))
    for step in range(max_new_tokens):
        tokens, logprobs = choose(scores, active, step)
        for i, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise EngineError(
                    f"the model's logits at step {step} are not finite; float16 overflows in some "
                    "models, where bfloat16 or float32 does not"
                )
            done[i].tokens.append(token)
            done[i].sum_logprob += logprob
            done[i].ended = token in ends
        left = [k for k, i in enumerate(active) if not done[i].ended]
        if not left or step + 1 == max_new_tokens:
            break
        if len(left) < len(active):
            index = tokens.new_tensor(left)
            rows.keep(index)
            tokens = tokens[index]
            active = [active[k] for k in left]
        scores = rows.step(tokens)
    return done


Read = Callable[[Decoded], tuple[str, Sequence[int]]]
"""A result → the text and the `Completion.token_ids` of it."""


def completion(
    prompt: Sequence[int], decoded: Decoded, read: Read, compute_s: float, prefill_s: float | None
) -> Completion:
    """Make the completion of one result."""
    text, token_ids = read(decoded)
    return Completion(
        text=text,
        token_ids=tuple(token_ids),
        sum_logprob=decoded.sum_logprob,
        num_tokens=len(decoded.tokens),
        finish_reason="stop" if decoded.ended else "length",
        prompt_tokens=len(prompt),
        compute_s=compute_s,
        prefill_s=prefill_s,
    )


def completions(
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[Decoded]],
    read: Read,
    *,
    total_s: float,
    prefill_s: float | None,
) -> list[list[Completion]]:
    """Make completions of a batch's results per prompt, each with its share of the batch's time."""
    new_tokens = [[len(decoded.tokens) for decoded in row] for row in found]
    shares = share_time(total_s, prefill_s, [len(prompt) for prompt in prompts], new_tokens)

    return [
        [completion(prompt, decoded, read, *share) for decoded, share in zip(row, own, strict=True)]
        for prompt, row, own in zip(prompts, found, shares, strict=True)
    ]
