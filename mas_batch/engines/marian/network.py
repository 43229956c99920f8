"""The network of Marian's "tiny" models: `encode` a source once, then decode `step` by step.

Post-norm transformer encoder, decoder of SSRU cells with cross-attention (Kim et al. 2019,
"From Research to Production and Back"), one embedding for source, target and output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mas_batch.engines.marian.format import EMBEDDING, MarianFile
from mas_batch.errors import ModelError

ARCHITECTURE: Mapping[str, Any] = {
    "type": "transformer",
    "dec-cell": "ssru",
    "dec-cell-base-depth": 2,
    "tied-embeddings-all": True,
    "transformer-decoder-autoreg": "rnn",
    "transformer-ffn-activation": "relu",
    "transformer-ffn-depth": 2,
    "transformer-no-projection": False,
    "transformer-postprocess": "dan",
    "transformer-preprocess": "",
    "transformer-tied-layers": [],
    "transformer-train-position-embeddings": False,
}
"""What the network below computes; a model of another kind would translate to nonsense."""
NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class _Linear:
    """x·weight + bias, with `weight` (in, out): faster than (out, in) where x has few rows."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class _Norm:
    """The end of every sublayer: add its input, then normalise."""

    scale: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(x + residual, self.scale.shape, self.scale, self.bias, NORM_EPSILON)


@dataclass(frozen=True, slots=True)
class _Block:
    """A sublayer's weights: into it, out of it, and its norm."""

    into: _Linear
    out: _Linear
    norm: _Norm

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(F.relu(self.into(x))), x)

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend with `query` (N, heads, rows, head size) for `x` (N, rows, d)."""
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.norm(self.out(seen.transpose(1, 2).reshape(x.shape)), x)


@dataclass(frozen=True, slots=True)
class _DecoderLayer:
    """An SSRU cell, attention to the source and a feed-forward block."""

    cell: _Linear
    """(d, 2d): the candidate x·W and the forget gate x·Wf + bf side by side."""
    cell_norm: _Norm
    context: _Block
    key_value: _Linear
    ffn: _Block


@dataclass(frozen=True, slots=True)
class State:
    """What decoding carries on: G groups (one source each) of R rows (translations of it)."""

    memory: list[tuple[Tensor, Tensor]]
    """Per decoder layer the source's keys and values, (G, heads, S, head size) each."""
    mask: Tensor
    """(G, 1, 1, S): True where the source has a token."""
    cells: list[Tensor]
    """Per decoder layer (G, R, d)."""

    def select(self, groups: Tensor) -> State:
        """Keep these groups, in this order; one may be repeated."""
        memory = [(key[groups], value[groups]) for key, value in self.memory]
        return State(memory, self.mask[groups], [cell[groups] for cell in self.cells])


class Network:
    """The weights on their device and the two passes: `encode` once, then `step` by step."""

    def __init__(self, file: MarianFile, device: torch.device, unk_id: int, length: int) -> None:
        config = file.config()
        _check_architecture(file.path, config)
        self._file, self.device = file, device
        self.heads = int(config["transformer-heads"])
        self.embedding = self._tensor(EMBEDDING)
        self.dim = self.embedding.shape[1]
        self.positions = _positions(length, self.dim).to(device)
        bias = self._tensor("decoder_ff_logit_out_b").view(-1)
        bias[unk_id] = -torch.inf  # the models are used without it: it stands for no word
        self.output = _Linear(self.embedding.T.contiguous(), bias)
        self.encoder = [
            (self._block(f"encoder_l{i}_self", "qkv", "o"), self._block(f"encoder_l{i}_ffn"))
            for i in range(1, int(config["enc-depth"]) + 1)
        ]
        self.decoder = [
            self._decoder_layer(f"decoder_l{i}") for i in range(1, int(config["dec-depth"]) + 1)
        ]
        file.check_all_used()

    def encode(self, sources: Sequence[Sequence[int]], rows: int) -> State:
        """Read the sources; return the state before the first step of `rows` rows each."""
        lengths = torch.tensor([len(source) for source in sources])
        longest = int(lengths.max())
        padded = [[*source, *[0] * (longest - len(source))] for source in sources]
        mask = (torch.arange(longest) < lengths[:, None])[:, None, None, :].to(self.device)
        ids = torch.tensor(padded, device=self.device)
        x = self.embedding[ids] * self.dim**0.5 + self.positions[:longest]
        for attention, ffn in self.encoder:
            query, key, value = (self._split(part) for part in attention.into(x).chunk(3, -1))
            x = ffn.feed_forward(attention.attend(x, query, key, value, mask))
        memory = []
        for layer in self.decoder:
            key, value = (self._split(part) for part in layer.key_value(x).chunk(2, -1))
            memory.append((key.contiguous(), value.contiguous()))
        return State(memory, mask, [x.new_zeros(len(sources), rows, self.dim)] * len(self.decoder))

    def step(self, state: State, tokens: Tensor | None, position: int) -> tuple[Tensor, State]:
        """Feed the rows' last tokens (G, R), None before the first.

        Returns log-probabilities of the next token, (G, R, vocabulary), and the new state.
        """
        groups, rows, _ = state.cells[0].shape
        x = self.positions[position].expand(groups, rows, -1)
        if tokens is not None:  # Marian feeds zeros, not a start token, into the first step
            x = self.embedding[tokens] * self.dim**0.5 + x
        cells = []
        for layer, old, (key, value) in zip(self.decoder, state.cells, state.memory, strict=True):
            candidate, gate = layer.cell(x).chunk(2, -1)
            cells.append(torch.lerp(candidate, old, torch.sigmoid(gate)))
            x = layer.cell_norm(F.relu(cells[-1]), x)
            query = self._split(layer.context.into(x))
            x = layer.ffn.feed_forward(layer.context.attend(x, query, key, value, state.mask))
        # Not logsumexp, which costs a third more on one CPU thread and far more on busy cores.
        return self.output(x).log_softmax(-1), State(state.memory, state.mask, cells)

    def _split(self, x: Tensor) -> Tensor:
        """(N, rows, d) to (N, heads, rows, head size)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _tensor(self, name: str) -> Tensor:
        return torch.tensor(self._file.tensor(name), device=self.device)

    def _linear(self, prefix: str, letters: str) -> _Linear:
        weights = [self._tensor(f"{prefix}_W{letter}") for letter in letters]
        biases = [self._tensor(f"{prefix}_b{letter}").view(-1) for letter in letters]
        return _Linear(torch.cat(weights, 1).contiguous(), torch.cat(biases))

    def _norm(self, prefix: str) -> _Norm:
        return _Norm(*(self._tensor(f"{prefix}_ln_{name}").view(-1) for name in ("scale", "bias")))

    def _block(self, prefix: str, into: str = "1", out: str = "2") -> _Block:
        norm = f"{prefix}_ffn" if out == "2" else f"{prefix}_W{out}"
        return _Block(self._linear(prefix, into), self._linear(prefix, out), self._norm(norm))

    def _decoder_layer(self, prefix: str) -> _DecoderLayer:
        gate = self._linear(f"{prefix}_rnn", "f")
        candidate = self._tensor(f"{prefix}_rnn_W")
        cell = _Linear(
            torch.cat([candidate, gate.weight], 1),
            torch.cat([torch.zeros_like(gate.bias), gate.bias]),
        )
        return _DecoderLayer(
            cell=cell,
            cell_norm=self._norm(f"{prefix}_rnn_ffn"),
            context=self._block(f"{prefix}_context", "q", "o"),
            key_value=self._linear(f"{prefix}_context", "kv"),
            ffn=self._block(f"{prefix}_ffn"),
        )


def _positions(length: int, dim: int) -> Tensor:
    """Return Marian's sinusoids (length, dim): all sines, then all cosines."""
    rates = torch.exp(torch.arange(dim // 2) * (-np.log(10_000.0) / (dim // 2 - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _check_architecture(path: Path, config: Mapping[str, Any]) -> None:
    for key, wanted in ARCHITECTURE.items():
        if config.get(key) != wanted:
            raise ModelError(f"{path}: {key} is {config.get(key)!r}; only {wanted!r} is supported")
    for key in ("transformer-heads", "enc-depth", "dec-depth"):
        if not isinstance(config.get(key), int):
            raise ModelError(f"{path}: {key} is {config.get(key)!r}, not a number")
