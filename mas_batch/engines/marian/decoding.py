"""Greedy search, draws and beam search over a Marian network, with log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mas_batch.engines.decoding import Choose, Decoded, extend
from mas_batch.engines.marian.network import Network, State


class _Translations:
    """One translation per group of a state, as `extend` wants them."""

    def __init__(self, network: Network, state: State) -> None:
        self._network, self._state = network, state
        self._position = 0

    def step(self, tokens: Tensor | None) -> Tensor:
        last = None if tokens is None else tokens[:, None]
        logprobs, self._state = self._network.step(self._state, last, self._position)
        self._position += 1
        return logprobs[:, 0]

    def keep(self, rows: Tensor) -> None:
        self._state = self._state.select(rows)


def decode(
    network: Network, state: State, max_new_tokens: int, eos_id: int, choose: Choose
) -> list[Decoded]:
    """Extend every group's one row by the tokens that `choose` picks, until all have ended."""

    def scored(logprobs: Tensor, rows: Sequence[int], position: int) -> tuple[Tensor, Tensor]:
        tokens = choose(logprobs, rows, position)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    translations = _Translations(network, state)
    return extend(translations, translations.step(None), scored, {eos_id}, max_new_tokens)


def beam_search(network: Network, state: State, max_new_tokens: int, eos_id: int) -> list[Decoded]:
    """Return each group's hypothesis of the highest mean log-probability.

    As in Marian, a hypothesis that ends leaves a beam narrower by one; a group whose hypotheses
    have all ended leaves the batch.
    """
    groups, width, _ = state.cells[0].shape
    found: list[list[Decoded]] = [[] for _ in range(groups)]
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
            found[alive[i]].append(Decoded(ids, float(scores[i, row]), ids[-1] == eos_id))
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
