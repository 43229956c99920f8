"""PyTorch language models as streams of logits, decoder-only and encoder-decoder.

A row is one sequence being decoded; `logits` are float32 [rows, vocabulary] of the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, EncoderDecoderCache

from mas_batch.engines.transformers.network import Network
from mas_batch.engines.transformers.packed_stream import PackedStream
from mas_batch.engines.transformers.prefixes import Prefixes
from mas_batch.engines.transformers.size import Size
from mas_batch.engines.transformers.transformers_compat import (
    accepted,
    cache_argument,
    drop_columns,
    is_joinable,
    join_rows,
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


class Stream(Protocol):
    """Rows that are decoded together; prompts may join them."""

    joinable: bool
    """Whether prompts can join rows that are under way; otherwise only an empty stream."""
    device: torch.device
    """Where its tokens and logits are."""

    def join(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new: Sequence[int],
        adapter: str | None,
    ) -> tuple[Tensor, list[int]]:
        """Read prompts; return the logits of their first tokens, one row per prompt.

        Each prompt makes `copies` rows, which come after those under way, side by side. An
        exception leaves a joinable stream as it was.

        Args:
            max_new: of each prompt, the most tokens that its rows will get.
            adapter: name of the one that is in use: nothing is shared with another one's rows.

        Returns:
            The logits, and how many tokens of each prompt had been read for others.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token per row; return the logits of the next."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; their numbers ascend."""

    @property
    def size(self) -> Size:
        """What the rows under way take room for; that of none if it is not joinable."""


def open_stream(
    model: Any, special: SpecialTokens, network: Network | None, prefixes: Prefixes | None = None
) -> Stream:
    """Return an empty stream for a model of either kind, or of its packed network.

    Args:
        prefixes: those that prompts of a packed network share; None: they share nothing.
    """
    if network is not None:
        return PackedStream(network, prefixes)
    stream_type = _DecoderOnly if special.decoder_start is None else _EncoderDecoder
    return stream_type(model, special)


class _Padded:
    """What is common to streams whose rows have one width."""

    def __init__(self, model: Any, special: SpecialTokens) -> None:
        self._model = model
        self._special = special
        self.device = model.device


class _DecoderOnly(_Padded):
    """Prompts padded on the left, read in groups of like length so that little is padding."""

    def __init__(self, model: Any, special: SpecialTokens) -> None:
        super().__init__(model, special)
        self._clear()
        self.joinable = is_joinable(self._cache)

    def _clear(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self._model.device)
        self._left: list[int] = []
        """Of each row under way, the most tokens that it may still get."""

    @property
    def size(self) -> Size:
        num_rows, width = self._mask.shape
        return Size(True, num_rows, width, max(self._left, default=0))

    def join(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new: Sequence[int],
        adapter: str | None,
    ) -> tuple[Tensor, list[int]]:
        ids, mask = pad_rows(prompts, self._special.pad, "left", self._model.device)
        lengths = mask.sum(-1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left = self._left + [new for new in max_new for _ in range(copies)]
        if not self.joinable:
            logits = self._forward(ids, mask, positions, self._cache)
            self._mask, self._left = mask.repeat_interleave(copies, 0), left
            if copies > 1:
                order = torch.arange(len(prompts), device=ids.device)
                self._cache.reorder_cache(order.repeat_interleave(copies))
            return logits, [0] * len(prompts)
        old, old_width = self._mask.shape
        parts = [(torch.arange(old, device=ids.device), self._cache)] if old else []
        found: list[Tensor] = []
        groups = _groups([len(prompt) for prompt in prompts])
        for group in groups:
            rows = torch.tensor(group, device=ids.device)
            own = slice(ids.shape[1] - int(lengths[rows].max()), None)
            cache = DynamicCache(config=self._model.config)
            found.append(
                self._forward(ids[rows, own], mask[rows, own], positions[rows, own], cache)
            )
            parts += [(old + rows * copies + copy, cache) for copy in range(copies)]
        width = max(old_width, ids.shape[1])
        masks = [pad(self._mask, (width - old_width, 0))] if old else []
        new = pad(mask, (width - mask.shape[1], 0)).repeat_interleave(copies, 0)
        joined = torch.cat([*masks, new])
        self._cache = join_rows(parts, num_rows=len(left), width=width, capacity=width + max(left))
        self._mask, self._left = joined, left
        order = torch.tensor([i for group in groups for i in group], device=ids.device)
        return torch.cat(found)[order.argsort()], [0] * len(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._left = [left - 1 for left in self._left]
        positions = self._mask.sum(-1, keepdim=True) - 1
        return self._forward(tokens[:, None], self._mask, positions, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self._clear()
            return
        index = torch.tensor(rows, device=self._mask.device)
        self._mask = self._mask[index]
        self._left = [self._left[row] for row in rows]
        self._cache.reorder_cache(index)
        if self.joinable:  # what was padding to a longer row that has ended is not carried on
            lead = int(self._mask.argmax(-1).min())
            self._mask = self._mask[:, lead:]
            drop_columns(self._cache, lead)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        optional = accepted(self._model, position_ids=positions, logits_to_keep=1)
        optional[cache_argument(self._model)] = cache
        output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **optional)
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _EncoderDecoder(_Padded):
    """Sources padded on the right: encoders count positions from the first column."""

    joinable = False
    size = Size(padded=True)

    def join(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new: Sequence[int],
        adapter: str | None,
    ) -> tuple[Tensor, list[int]]:
        device, config = self._model.device, self._model.config
        ids, self._mask = pad_rows(prompts, self._special.pad, "right", device)
        self._cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        encoder = self._model.get_encoder()
        self._encoded = encoder(input_ids=ids, attention_mask=self._mask).last_hidden_state
        start = torch.full((len(ids),), self._special.decoder_start, device=device)
        logits = self.step(start)
        if copies > 1:
            self._take(torch.arange(len(ids), device=device).repeat_interleave(copies))
        return logits, [0] * len(prompts)

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

    def keep(self, rows: Sequence[int]) -> None:
        self._take(torch.tensor(rows, dtype=torch.long, device=self._mask.device))

    def _take(self, rows: Tensor) -> None:
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
    left = side == "left"

    def padded(parts: Sequence[Sequence[int]], fill: int) -> Tensor:
        lines = [([fill] * (width - len(p)), list(p)) for p in parts]
        full = [[*gap, *own] if left else [*own, *gap] for gap, own in lines]
        return torch.tensor(full, dtype=torch.long, device=device)

    return padded(rows, pad), padded([[1] * len(row) for row in rows], 0)
