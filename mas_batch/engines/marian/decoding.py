"""Greedy search, draws and beam search over a Marian network, with log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_batch.engines.marian.network import Network, State


@dataclass(slots=True)
class Hypothesis:
    """One translation as it grows."""

    tokens: list[int]
    sum_logprob: float = 0.0
    ended: bool = False
    """By the end token; otherwise max_new_tokens cut it."""


Choose = Callable[[Tensor, list[int], int], Tensor]
"""(log-probabilities (n, vocabulary), the n rows' numbers, position) to token ids (n,)."""


def decode(
    network: Network, state: State, max_new_tokens: int, eos_id: int, choose: Choose
) -> list[Hypothesis]:
    """Extend every group's one row by the tokens that `choose` picks, until all have ended.

    Rows that have ended leave the batch: the rest of the work is for the others only.
    """
    done = [Hypothesis([]) for _ in range(len(state.mask))]
    rows = list(range(len(done)))
    tokens = None
    for position in range(max_new_tokens):
        logprobs, state = network.step(state, tokens, position)
        tokens = choose(logprobs[:, 0], rows, position)[:, None]
        chosen = logprobs[:, 0].gather(1, tokens)
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            done[row].tokens.append(token[0])
            done[row].sum_logprob += logprob[0]
            done[row].ended = token[0] == eos_id
        if any(done[row].ended for row in rows):
            kept = [i for i, row in enumerate(rows) if not done[row].ended]
            if not kept:
                break
            rows = [rows[i] for i in kept]
            index = torch.tensor(kept, device=tokens.device)
            tokens, state = tokens[index], state.select(index)
    return done


def greedy(logprobs: Tensor, rows: list[int], position: int) -> Tensor:
    """Choose the likeliest tokens; a `Choose`."""
    return logprobs.argmax(-1)


def beam_search(
    network: Network, state: State, max_new_tokens: int, eos_id: int
) -> list[Hypothesis]:
    """Return each group's hypothesis of the highest mean log-probability.

    As in Marian, a hypothesis that ends leaves a beam narrower by one; a group whose hypotheses
    have all ended leaves the batch.
    """
    groups, width, _ = state.cells[0].shape
    found: list[list[Hypothesis]] = [[] for _ in range(groups)]
    alive = list(range(groups))
    scores = state.cells[0].new_full((groups, width), -torch.inf)
    scores[:, 0] = 0.0  # all rows are equal before the first step: one stands for them
    history = torch.empty(groups, width, 0, dtype=torch.long, device=scores.device)
    tokens = None
    for position in range(max_new_tokens):
        logprobs, state = network.step(state, tokens, position)
        widths = torch.tensor([width - len(found[group]) for group in alive])
        scores, tokens, parents = _best_extensions(logprobs, scores, widths.to(scores.device))
        state = State(state.memory, state.mask, [_take(cell, parents) for cell in state.cells])
        history = torch.cat([_take(history, parents), tokens[:, :, None]], 2)
        stopped = tokens == eos_id if position + 1 < max_new_tokens else scores.isfinite()
        for i, row in (stopped & scores.isfinite()).nonzero().tolist():
            ids = history[i, row].tolist()
            found[alive[i]].append(Hypothesis(ids, float(scores[i, row]), ids[-1] == eos_id))
        scores = scores.masked_fill(stopped, -torch.inf)
        kept = scores.isfinite().any(1).nonzero().squeeze(1)
        if len(kept) < len(alive):
            alive = [alive[i] for i in kept.tolist()]
            scores, history, tokens = scores[kept], history[kept], tokens[kept]
            state = state.select(kept)
        if not alive:
            break
    return [max(group, key=lambda h: h.sum_logprob / len(h.tokens)) for group in found]


def _best_extensions(
    logprobs: Tensor, scores: Tensor, widths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, last tokens and parent rows, (G, R) each, of the `widths` best a group.

    Rows past a group's width, like dead rows in `scores`, have the score -inf.
    """
    width = scores.shape[1]
    best, ids = logprobs.topk(width)  # no parent can give more than `width` of the winners
    scores, picks = (scores[:, :, None] + best).flatten(1).topk(width)
    narrow = torch.arange(width, device=scores.device) >= widths[:, None]
    tokens = ids.flatten(1).gather(1, picks)
    return scores.masked_fill(narrow, -torch.inf), tokens, picks // width


def _take(rows: Tensor, parents: Tensor) -> Tensor:
    """Reorder (G, R, n) within each group by (G, R)."""
    return rows.gather(1, parents[:, :, None].expand(-1, -1, rows.shape[2]))
