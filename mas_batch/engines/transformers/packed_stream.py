"""Rows of a packed network: their keys and values stay where they are while others come and go.

Rows that need about the same number of columns share a block. Attention runs per block, so a row
is at most read to the width of those that are nearly as long; all else runs over all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mas_batch.engines.transformers.blocks import Block, Row, attend_after, num_columns
from mas_batch.engines.transformers.network import Network
from mas_batch.engines.transformers.prefixes import (
    LEAST_TOKENS,
    Layers,
    Prefixes,
    Stretch,
    num_common,
    stretches,
)
from mas_batch.engines.transformers.size import Size

READ_TOKENS = 1024
"""Prompts are read together up to so many tokens: more do not stay in a CPU's cache."""


@dataclass(slots=True)
class _Reading:
    """A prompt while it is read, and the slots that its rows will have."""

    prompt: Sequence[int]
    adapter: str | None
    block: Block
    slots: slice
    most: int


class PackedStream:
    """A `Stream` of a `Network`.

    Args:
        prefixes: kept beyond the stream's life; None: prompts are read whole, each by itself.
    """

    joinable = True
    device = torch.device("cpu")
    """A network is packed for no other."""

    def __init__(self, network: Network, prefixes: Prefixes | None = None) -> None:
        self._network = network
        self._prefixes = prefixes
        self._rows: list[Row] = []
        self._blocks: dict[int, Block] = {}
        self._places = torch.zeros(0, dtype=torch.long)

    @property
    def size(self) -> Size:
        """See `Stream.size`."""
        return Size(padded=False, total=sum(row.most for row in self._rows))

    def join(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        max_new: Sequence[int],
        adapter: str | None,
    ) -> tuple[Tensor, list[int]]:
        """See `Stream.join`."""
        columns = [num_columns(len(p) + new) for p, new in zip(prompts, max_new, strict=True)]
        taken = Counter[int]()
        for number, count in Counter(columns).items():
            block = self._blocks.setdefault(number, Block(self._network, number))
            taken[number] = len(block.rows)
            needed = len(block.rows) + count * copies
            if needed > block.num_slots:
                # Some more than needed, where rows are joined by a few others again and again.
                block.resize(needed + (needed // 4 if block.rows else 0))
        readings = []
        for prompt, new, number in zip(prompts, max_new, columns, strict=True):
            slots = slice(taken[number], taken[number] + copies)
            readings.append(
                _Reading(prompt, adapter, self._blocks[number], slots, len(prompt) + new)
            )
            taken[number] += copies
        logits, cached = self._read(readings)
        for reading in readings:
            for slot in range(reading.slots.start, reading.slots.stop):
                row = Row(
                    reading.prompt,
                    reading.adapter,
                    reading.block,
                    slot,
                    len(reading.prompt),
                    reading.most,
                )
                reading.block.rows.append(row)
                self._rows.append(row)
        self._place()
        return logits, cached

    def step(self, tokens: Tensor) -> Tensor:
        """See `Stream.step`."""
        blocks = list(self._blocks.values())
        for block in blocks:
            block.prepare()
        sizes = [len(block.rows) for block in blocks]

        def attend(layer: int, *parts: Tensor) -> Tensor:
            split = zip(blocks, *(part.split(sizes) for part in parts), strict=True)
            found = [block.attend(layer, *own) for block, *own in split]
            return found[0] if len(found) == 1 else torch.cat(found)

        positions = torch.cat([block.lengths for block in blocks])
        order = self._places.argsort()
        states = self._network.forward(tokens[order], positions, attend, order)
        for row in self._rows:
            row.length += 1
        return self._network.logits(states[self._places])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Stream.keep`."""
        kept = set(rows)
        for i, row in enumerate(self._rows):
            if i not in kept:
                row.block.drop(row)
        self._rows = [self._rows[i] for i in rows]
        self._blocks = {number: block for number, block in self._blocks.items() if block.rows}
        for block in self._blocks.values():
            if len(block.rows) < block.num_slots // 2:
                block.resize(len(block.rows))
        self._place()

    def _place(self) -> None:
        """Note where each row stands when blocks stand one after the other."""
        starts, start = {}, 0
        for number, block in self._blocks.items():
            starts[number] = start
            start += len(block.rows)
        self._places = torch.tensor(
            [starts[row.block.columns] + row.slot for row in self._rows], dtype=torch.long
        )

    def _read(self, readings: Sequence[_Reading]) -> tuple[Tensor, list[int]]:
        """Read prompts; return the logits after each, and how many tokens were read for others."""
        prompts = [reading.prompt for reading in readings]
        if self._prefixes is None:
            cached = [0] * len(readings)
            todo = [Stretch(0, len(prompt), (i,)) for i, prompt in enumerate(prompts)]
        else:
            cached = [self._copy_known(reading, self._prefixes) for reading in readings]
            todo = stretches(prompts, cached)
            for stretch in todo:
                for i in stretch.prompts[1:]:
                    cached[i] += stretch.stop - stretch.start
        ends: dict[int, Tensor] = {}
        for part in _parts(todo):
            ends |= self._read_part(readings, part)
        logits = self._network.logits(torch.stack([ends[i] for i in range(len(readings))]))
        # What is not finite would spoil whatever begins alike, for ever.
        if self._prefixes is not None and bool(logits.isfinite().all()):
            for reading in readings:
                self._prefixes.see(reading.prompt, reading.adapter, partial(_copy, reading))
        return logits, cached

    def _copy_known(self, reading: _Reading, prefixes: Prefixes) -> int:
        """Copy what rows under way, or kept prefixes, have of a prompt; return its tokens."""
        num, layers = prefixes.find(reading.prompt, reading.adapter)
        for row in self._rows:
            if row.adapter != reading.adapter:
                continue
            if (common := num_common(reading.prompt, row.prompt)) >= max(num + 1, LEAST_TOKENS):
                num, layers = common, row.block.past(row.slot, common)
        num = min(num, len(reading.prompt) - 1)  # the last token's logits are wanted
        for own, known in zip(reading.block.layers, layers, strict=False):
            for tensor, past in zip(own, known, strict=True):
                tensor[reading.slots, :, :num] = past[:, :num]
        return num

    def _read_part(
        self, readings: Sequence[_Reading], part: Sequence[Stretch]
    ) -> dict[int, Tensor]:
        """Read stretches, one after the other; return the last states of those that end prompts."""
        starts = list(accumulate((s.stop - s.start for s in part), initial=0))
        places = [slice(*ends) for ends in pairwise(starts)]
        groups = self._network.num_heads // self._network.num_key_heads

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            found = torch.empty_like(queries)
            for stretch, place in zip(part, places, strict=True):
                q, *new = (tensor[place].transpose(0, 1) for tensor in (queries, keys, values))
                for i in stretch.prompts:
                    reading = readings[i]
                    for tensor, own in zip(reading.block.layers[layer], new, strict=True):
                        tensor[reading.slots, :, stretch.start : stretch.stop] = own
                if stretch.start:
                    row = readings[stretch.prompts[0]]
                    k, v = (t[row.slots.start, :, : stretch.stop] for t in row.block.layers[layer])
                    attended = attend_after(q, k, v, self._network.scale)
                else:
                    k, v = (tensor.repeat_interleave(groups, 0) for tensor in new)
                    attended = scaled_dot_product_attention(
                        q[None], k[None], v[None], is_causal=True, scale=self._network.scale
                    )[0]
                found[place] = attended.transpose(0, 1)
            return found.flatten(1)

        tokens = [t for s in part for t in readings[s.prompts[0]].prompt[s.start : s.stop]]
        positions = torch.cat([torch.arange(s.start, s.stop) for s in part])
        states = self._network.forward(torch.tensor(tokens), positions, attend)
        return {
            s.prompts[0]: states[place.stop - 1]
            for s, place in zip(part, places, strict=True)
            if s.stop == len(readings[s.prompts[0]].prompt)
        }


def _copy(reading: _Reading, num: int) -> Layers:
    past = reading.block.past(reading.slots.start, num)
    return [(keys.clone(), values.clone()) for keys, values in past]


def _parts(todo: Sequence[Stretch]) -> list[list[Stretch]]:
    """Cut what is to be read into parts of about `READ_TOKENS`."""
    parts: list[list[Stretch]] = []
    size = READ_TOKENS
    for stretch in todo:
        if size + stretch.stop - stretch.start > READ_TOKENS:
            parts.append([])
            size = 0
        parts[-1].append(stretch)
        size += stretch.stop - stretch.start
    return parts
