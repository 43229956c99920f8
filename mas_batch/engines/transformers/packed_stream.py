"""Rows of a packed network: their keys and values stay where they are while others come and go.

Rows that need about the same number of columns share a block. Attention runs per block, so a row
is at most read to the width of those that are nearly as long; all else runs over all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mas_batch.engines.transformers.network import Network
from mas_batch.engines.transformers.size import Size

READ_TOKENS = 1024
"""Prompts are read together up to so many tokens: more do not stay in a CPU's cache."""


@dataclass(slots=True, eq=False)
class _Row:
    block: _Block
    slot: int
    length: int
    most: int
    """Its length in the end, at most."""


class _Block:
    """Keys and values of rows, per layer [slots, key heads, columns, size].

    The first slots are taken: a row that leaves is replaced by the last.
    """

    def __init__(self, network: Network, columns: int) -> None:
        self._network = network
        self.columns = columns
        self.rows: list[_Row] = []
        self.num_slots = 0
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def width(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def resize(self, num_slots: int) -> None:
        """Make room for so many rows, at least those that are here."""
        net, num, width = self._network, len(self.rows), self.width
        shape = (num_slots, net.num_key_heads, self.columns, net.size)

        # Zeros, because what is beyond a row's end is masked but multiplied: it has to be finite.
        layers = [
            (torch.zeros(shape, dtype=net.dtype), torch.zeros(shape, dtype=net.dtype))
            for _ in range(net.num_layers)
        ]
        for new, old in zip(layers, self.layers, strict=False):
            for mine, its in zip(new, old, strict=True):
                mine[:num, :, :width] = its[:num, :, :width]
        self.layers, self.num_slots = layers, num_slots

    def prepare(self) -> None:
        """Note where the next token of each row goes, and what each row may see."""
        net, self.lengths = self._network, torch.tensor([row.length for row in self.rows])
        heads = torch.arange(len(self.rows) * net.num_key_heads).view(len(self.rows), -1)
        self._cells = (heads * self.columns + self.lengths[:, None]).flatten()
        beyond = torch.arange(self.width + 1) > self.lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=net.dtype).masked_fill(beyond, -torch.inf)
        self._mask = mask[:, None, None]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Add a token to every row; return what it finds in the row's past and in itself."""
        num, size, past = len(self.rows), self._network.size, self.layers[layer]
        for tensor, new in zip(past, (keys, values), strict=True):
            tensor.view(-1, size).index_copy_(0, self._cells, new.reshape(-1, size))
        keys, values = (tensor[:num, :, : self._mask.shape[-1]] for tensor in past)
        # The queries that share a key head stand as if they were of several tokens: no copies.
        queries = queries.reshape(num, self._network.num_key_heads, -1, size)
        found = _attend(queries, keys, values, self._mask, self._network.scale)
        return found.reshape(num, -1)

    def drop(self, row: _Row) -> None:
        last = self.rows.pop()
        if last is not row:
            self.rows[row.slot] = last
            for pair in self.layers:
                for tensor in pair:
                    tensor[row.slot, :, : last.length] = tensor[last.slot, :, : last.length]
            last.slot = row.slot


@dataclass(slots=True)
class _Reading:
    """A prompt while it is read, and the slots that its rows will have."""

    prompt: Sequence[int]
    block: _Block
    slots: slice
    most: int
    start: int = 0
    """Among the tokens that are read together."""

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + len(self.prompt))


class PackedStream:
    """A `Stream` of a `Network`."""

    joinable = True
    device = torch.device("cpu")
    """A network is packed for no other."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._rows: list[_Row] = []
        self._blocks: dict[int, _Block] = {}
        self._places = torch.zeros(0, dtype=torch.long)

    @property
    def size(self) -> Size:
        """See `Stream.size`."""
        return Size(padded=False, total=sum(row.most for row in self._rows))

    def join(self, prompts: Sequence[Sequence[int]], copies: int, max_new: Sequence[int]) -> Tensor:
        """See `Stream.join`."""
        columns = [_columns(len(p) + new) for p, new in zip(prompts, max_new, strict=True)]
        taken = Counter[int]()
        for number, count in Counter(columns).items():
            block = self._blocks.setdefault(number, _Block(self._network, number))
            taken[number] = len(block.rows)
            needed = len(block.rows) + count * copies
            if needed > block.num_slots:
                # Some more than needed, where rows are joined by a few others again and again.
                block.resize(needed + (needed // 4 if block.rows else 0))
        readings = []
        for prompt, new, number in zip(prompts, max_new, columns, strict=True):
            slots = slice(taken[number], taken[number] + copies)
            readings.append(_Reading(prompt, self._blocks[number], slots, len(prompt) + new))
            taken[number] += copies
        logits = torch.cat([self._read(part) for part in _parts(readings)])
        for reading in readings:
            for slot in range(reading.slots.start, reading.slots.stop):
                row = _Row(reading.block, slot, len(reading.prompt), reading.most)
                reading.block.rows.append(row)
                self._rows.append(row)
        self._place()
        return logits

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

    def _read(self, readings: Sequence[_Reading]) -> Tensor:
        """Read prompts, one after the other; return the logits after each."""
        start = 0
        for reading in readings:
            reading.start = start
            start += len(reading.prompt)
        groups = self._network.num_heads // self._network.num_key_heads

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            found = torch.empty_like(queries)
            for reading in readings:
                own = [part[reading.tokens].transpose(0, 1) for part in (queries, keys, values)]
                for tensor, new in zip(reading.block.layers[layer], own[1:], strict=True):
                    tensor[reading.slots, :, : new.shape[1]] = new
                q, k, v = own[0], *(part.repeat_interleave(groups, 0) for part in own[1:])
                attended = scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, scale=self._network.scale
                )
                found[reading.tokens] = attended[0].transpose(0, 1)
            return found.flatten(1)

        tokens = torch.tensor([token for reading in readings for token in reading.prompt])
        positions = torch.cat([torch.arange(len(reading.prompt)) for reading in readings])
        states = self._network.forward(tokens, positions, attend)
        return self._network.logits(states[[reading.tokens.stop - 1 for reading in readings]])


def _columns(number: int) -> int:
    """Round up to one of four sizes per power of two, so that rows of like length share a block."""
    step = max(16, 1 << max(0, number.bit_length() - 3))
    return -(-number // step) * step


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with a few queries per row and key head to the whole past of each."""
    if queries.dtype != torch.float32:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    # So few queries leave the fused kernel a tenth to a quarter slower than reading the past takes.
    weights = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale).add_(mask).softmax(-1)
    return torch.matmul(weights, values)


def _parts(readings: Sequence[_Reading]) -> list[list[_Reading]]:
    """Cut prompts into parts of about `READ_TOKENS`."""
    parts: list[list[_Reading]] = []
    size = READ_TOKENS
    for reading in readings:
        if size + len(reading.prompt) > READ_TOKENS:
            parts.append([])
            size = 0
        parts[-1].append(reading)
        size += len(reading.prompt)
    return parts
