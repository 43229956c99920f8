"""Blocks of rows: the keys and values of rows that need about the same number of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mas_batch.engines.transformers.network import Network
from mas_batch.engines.transformers.prefixes import Layers

_QUERIES = 256
"""Tokens after a past attend together up to so many: they need a mask over all that they see."""


@dataclass(slots=True, eq=False)
class Row:
    """One sequence, and where its keys and values are."""

    prompt: Sequence[int]
    adapter: str | None
    """That it was read with: its keys and values are the adapter's."""
    block: Block
    slot: int
    length: int
    most: int
    """Its length in the end, at most."""


class Block:
    """Keys and values of rows, per layer [slots, key heads, columns, size].

    The first slots are taken: a row that leaves is replaced by the last.
    """

    def __init__(self, network: Network, columns: int) -> None:
        self._network = network
        self.columns = columns
        self.rows: list[Row] = []
        self.num_slots = 0
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def width(self) -> int:
        """Columns that are in use."""
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

    def past(self, slot: int, num: int) -> Layers:
        """Return the first keys and values of a row."""
        return [(keys[slot, :, :num], values[slot, :, :num]) for keys, values in self.layers]

    def drop(self, row: Row) -> None:
        """Forget a row."""
        last = self.rows.pop()
        if last is not row:
            self.rows[row.slot] = last
            for pair in self.layers:
                for tensor in pair:
                    tensor[row.slot, :, : last.length] = tensor[last.slot, :, : last.length]
            last.slot = row.slot


def num_columns(number: int) -> int:
    """Round up to one of two sizes per power of two, so that rows of like length share a block.

    A block more costs a few calls per layer at every step; more columns, reading what is empty.
    """
    step = max(16, 1 << max(0, number.bit_length() - 2))
    return -(-number // step) * step


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with a few queries per row and key head to the whole past of each."""
    if queries.dtype != torch.float32:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    # So few queries leave the fused kernel a tenth to a quarter slower than reading the past takes.
    weights = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale).add_(mask).softmax(-1)
    return torch.matmul(weights, values)


def attend_after(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend causally with the last tokens of a row to all of it.

    Args:
        queries: [heads, last tokens, size].
        keys: [key heads, tokens, size], as the values.
    """
    heads, past = (len(keys), -1), keys.shape[1] - queries.shape[1]
    found = []
    for part in queries.split(_QUERIES, 1):
        num = part.shape[1]
        mask = torch.full((num, past + num), -torch.inf, dtype=part.dtype).triu(past + 1)
        # Heads that share a key head are its heads in a batch of key heads: no copies.
        q = part.unflatten(0, heads)
        k, v = (
            tensor[:, None, : past + num].expand(-1, q.shape[1], -1, -1)
            for tensor in (keys, values)
        )
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        found.append(attended.flatten(0, 1))
        past += num
    return found[0] if len(found) == 1 else torch.cat(found, 1)
