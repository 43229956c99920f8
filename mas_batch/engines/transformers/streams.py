"""PyTorch language models as streams of logits, decoder-only and encoder-decoder.

A row is one sequence being decoded; `logits` are float32 [rows, vocabulary] of the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from mas_batch.engines.decoding import Rows
from mas_batch.engines.transformers.transformers_compat import (
    accepted,
    cache_argument,
    drop_columns,
    is_joinable,
    put_rows,
)

GROUP_PADDING = 0.1
"""Prompts are read together while the shortest lacks at most this part of the longest."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What decoding must know of a vocabulary; nothing else of a checkpoint's defaults counts."""

    end: frozenset[int]
    """Any of these ends a sequence."""
    pad: int
    decoder_start: int | None = None
    """First input of an encoder-decoder's decoder; None for decoder-only models."""
    forced_first: int | None = None
    """First output where the model demands one (a language code); it adds nothing to a score."""
    banned: tuple[int, ...] = ()
    """Never chosen: Marian models rank their padding token first."""


class Stream(Rows, Protocol):
    """Rows that begin with prompts."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, one row each; return the logits of the first tokens."""


def open_stream(model: Any, special: SpecialTokens, max_new_tokens: int) -> Stream:
    """Return a stream for a model of either kind, with room for `max_new_tokens` a row."""
    stream_type = _DecoderOnly if special.decoder_start is None else _EncoderDecoder
    return stream_type(model, special, max_new_tokens)


class _DecoderOnly:
    """Prompts padded on the left, read in groups of like length so that little is padding."""

    def __init__(self, model: Any, special: SpecialTokens, max_new_tokens: int) -> None:
        self._model = model
        self._special = special
        self._max_new_tokens = max_new_tokens
        self._cache = DynamicCache(config=model.config)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        ids, self._mask = pad_rows(prompts, self._special.pad, "left", self._model.device)
        self._lengths = self._mask.sum(-1, keepdim=True)
        self._joinable = is_joinable(self._cache)
        if not self._joinable:
            return self._forward(ids, self._mask, self._positions(), self._cache)
        return self._read_groups(ids, _groups([len(prompt) for prompt in prompts]))

    def step(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._lengths = self._lengths + 1
        return self._forward(tokens[:, None], self._mask, self._lengths - 1, self._cache)

    def keep(self, rows: Tensor) -> None:
        self._mask, self._lengths = self._mask[rows], self._lengths[rows]
        if self._joinable:  # what was padding to a longer row that has ended is not carried on
            lead = int(self._mask.argmax(-1).min())
            self._mask = self._mask[:, lead:]
            drop_columns(self._cache, lead)
        self._cache.reorder_cache(rows)

    def _positions(self) -> Tensor:
        return (self._mask.cumsum(-1) - 1).clamp(min=0)

    def _read_groups(self, ids: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        num_rows, width = ids.shape
        positions = self._positions()
        found: list[Tensor] = []
        for group in groups:
            rows = torch.tensor(group, device=ids.device)
            own = slice(width - int(self._lengths[rows].max()), width)
            cache = DynamicCache(config=self._model.config)
            mask = self._mask[rows, own]
            found.append(self._forward(ids[rows, own], mask, positions[rows, own], cache))
            put_rows(
                self._cache,
                rows,
                cache,
                num_rows=num_rows,
                width=width,
                capacity=width + self._max_new_tokens,
            )
        order = torch.tensor([i for group in groups for i in group], device=ids.device)
        return torch.cat(found)[order.argsort()]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        optional = accepted(self._model, position_ids=positions, logits_to_keep=1)
        optional[cache_argument(self._model)] = cache
        output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **optional)
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _EncoderDecoder:
    """Sources padded on the right: encoders count positions from the first column."""

    def __init__(self, model: Any, special: SpecialTokens, max_new_tokens: int) -> None:
        self._model = model
        self._special = special
        config = model.config
        self._cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        device = self._model.device
        ids, self._mask = pad_rows(prompts, self._special.pad, "right", device)
        encoder = self._model.get_encoder()
        self._encoded = encoder(input_ids=ids, attention_mask=self._mask).last_hidden_state
        return self.step(torch.full((len(ids),), self._special.decoder_start, device=device))

    def step(self, tokens: Tensor) -> Tensor:
        output = self._model(
            encoder_outputs=(self._encoded,),
            attention_mask=self._mask,
            decoder_input_ids=tokens[:, None],
            use_cache=True,
            **{cache_argument(self._model): self._cache},
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def keep(self, rows: Tensor) -> None:
        self._mask, self._encoded = self._mask[rows], self._encoded[rows]
        self._cache.reorder_cache(rows)


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Put positions of like lengths together, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[i] >= (1 - GROUP_PADDING) * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the ids and their mask, both int64 [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, own] = torch.tensor(row)
        mask[i, own] = 1
    return ids.to(device), mask.to(device)
