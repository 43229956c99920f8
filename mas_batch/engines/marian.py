"""Translation with Marian's "tiny" models (Mozilla's Firefox layout), in PyTorch, float32.

Post-norm transformer encoder, decoder of SSRU cells with cross-attention (Kim et al. 2019,
"From Research to Production and Back"), one embedding for source, target and output. Marian's
own engines know greedy and beam search only; this one also samples and returns log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mas_batch.engines.base import Completion, EngineConfig, Request, Sampling
from mas_batch.engines.marian_format import EMBEDDING, MarianFile, read_marian
from mas_batch.errors import EngineError, JobError, ModelError, OutOfMemoryError
from mas_batch.models import ModelFiles

MAX_CONTEXT_TOKENS = 1024
"""Default of the option `max_context_tokens`, source plus translation. Sinusoidal positions have
no end, but these models are trained on sentences: callers split long texts before they ask."""
OPTIONS = {"max_context_tokens": MAX_CONTEXT_TOKENS}
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


def load(model: ModelFiles, config: EngineConfig) -> MarianEngine:
    """Load a directory of `*.intgemm.alphas.bin` and `vocab*.spm`.

    Raises:
        JobError: an option, dtype or device that this engine does not know.
        ModelError: a file is missing or damaged, or the model is of another architecture.
    """
    return MarianEngine(model, config)


# --- The network


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
class _State:
    """What decoding carries on: G groups (one source each) of R rows (translations of it)."""

    memory: list[tuple[Tensor, Tensor]]
    """Per decoder layer the source's keys and values, (G, heads, S, head size) each."""
    mask: Tensor
    """(G, 1, 1, S): True where the source has a token."""
    cells: list[Tensor]
    """Per decoder layer (G, R, d)."""

    def select(self, groups: Tensor) -> _State:
        """Keep these groups, in this order; one may be repeated."""
        memory = [(key[groups], value[groups]) for key, value in self.memory]
        return _State(memory, self.mask[groups], [cell[groups] for cell in self.cells])


class _Network:
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

    def encode(self, sources: Sequence[Sequence[int]], rows: int) -> _State:
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
        return _State(memory, mask, [x.new_zeros(len(sources), rows, self.dim)] * len(self.decoder))

    def step(self, state: _State, tokens: Tensor | None, position: int) -> tuple[Tensor, _State]:
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
        return self.output(x).log_softmax(-1), _State(state.memory, state.mask, cells)

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


# --- Decoding


@dataclass(slots=True)
class _Hypothesis:
    """One translation as it grows."""

    tokens: list[int]
    sum_logprob: float = 0.0
    ended: bool = False
    """By the end token; otherwise max_new_tokens cut it."""


_Choose = Callable[[Tensor, list[int], int], Tensor]
"""(log-probabilities (n, vocabulary), the n rows' numbers, position) to token ids (n,)."""


def _decode(
    network: _Network, state: _State, max_new_tokens: int, eos_id: int, choose: _Choose
) -> list[_Hypothesis]:
    """Extend every group's one row by the tokens that `choose` picks, until all have ended.

    Rows that have ended leave the batch: the rest of the work is for the others only.
    """
    done = [_Hypothesis([]) for _ in range(len(state.mask))]
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


def _greedy(logprobs: Tensor, rows: list[int], position: int) -> Tensor:
    return logprobs.argmax(-1)


def _sampler(sampling: Sampling, seeds: Sequence[tuple[int, int]]) -> _Choose:
    """Draw by inverse CDF in the order of the vocabulary, one uniform number per row and step.

    A row's numbers come from its own (seed, sample number), so its draws do not depend on its
    neighbours; vocabulary order, unlike order of probability, cannot flip by rounding.
    """
    uniforms = np.stack(
        [
            np.random.Generator(np.random.PCG64((seed % 2**64, sample))).random(
                sampling.max_new_tokens
            )
            for seed, sample in seeds
        ]
    )

    def choose(logprobs: Tensor, rows: list[int], position: int) -> Tensor:
        cdf = _filtered(logprobs / sampling.temperature, sampling).cumsum(-1)
        total = cdf[:, -1:]
        uniform = torch.tensor(uniforms[rows, position], device=cdf.device)[:, None]
        # Below the total even after rounding: what is found has a probability above zero.
        point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cdf, point, right=True).squeeze(1)

    return choose


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities (float64, not normalised again) with top-k, then top-p applied."""
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1, dtype=torch.float64)
    if sampling.top_p < 1:
        # Sorting the vocabulary is slow and the mass is nearly always in the first few.
        best = probs.topk(min(1024, probs.shape[1])).values
        if bool((best.cumsum(-1)[:, -1] < sampling.top_p).any()):
            best = probs.sort(descending=True).values
        above = best.cumsum(-1) - best
        least = best.masked_fill(above >= sampling.top_p, torch.inf).amin(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    return probs


def _beam_search(
    network: _Network, state: _State, max_new_tokens: int, eos_id: int
) -> list[_Hypothesis]:
    """Return each group's hypothesis of the highest mean log-probability.

    As in Marian, a hypothesis that ends leaves a beam narrower by one; a group whose hypotheses
    have all ended leaves the batch.
    """
    groups, width, _ = state.cells[0].shape
    found: list[list[_Hypothesis]] = [[] for _ in range(groups)]
    alive = list(range(groups))
    scores = state.cells[0].new_full((groups, width), -torch.inf)
    scores[:, 0] = 0.0  # all rows are equal before the first step: one stands for them
    history = torch.empty(groups, width, 0, dtype=torch.long, device=scores.device)
    tokens = None
    for position in range(max_new_tokens):
        logprobs, state = network.step(state, tokens, position)
        widths = torch.tensor([width - len(found[group]) for group in alive])
        scores, tokens, parents = _best_extensions(logprobs, scores, widths.to(scores.device))
        state = _State(state.memory, state.mask, [_take(cell, parents) for cell in state.cells])
        history = torch.cat([_take(history, parents), tokens[:, :, None]], 2)
        stopped = tokens == eos_id if position + 1 < max_new_tokens else scores.isfinite()
        for i, row in (stopped & scores.isfinite()).nonzero().tolist():
            ids = history[i, row].tolist()
            found[alive[i]].append(_Hypothesis(ids, float(scores[i, row]), ids[-1] == eos_id))
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


# --- The engine


class MarianEngine:
    """The engine `marian`: sentences in, translations out; prompts are not read."""

    takes_messages = False

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        self.max_context_tokens = _context_option(config.options)
        self.max_batch_tokens = config.max_batch_tokens
        self._model = model
        device = _device(config)
        if config.threads > 0:
            torch.set_num_threads(config.threads)
        vocabulary = _only_file(model, "vocab*.spm")
        file = read_marian(_only_file(model, "*.intgemm.alphas.bin"))
        self._pieces = _read_pieces(vocabulary)
        self._network = _Network(file, device, self._pieces.unk_id(), self.max_context_tokens)
        num_rows, num_pieces = len(self._network.embedding), self._pieces.get_piece_size()
        if num_rows != num_pieces:
            raise ModelError(f"{vocabulary}: {num_pieces} pieces, {file.path.name} has {num_rows}")

    def prompt_tokens(self, request: Request) -> int:
        """Count the source's pieces and its end token."""
        return len(self._source(request))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Translate one batch; see `Engine.generate`. A sample depends on its request's seed and
        its number alone, up to rounding where a draw falls on the border of two tokens."""
        if not requests:
            return []
        start = time.perf_counter()
        sources = [self._source(request) for request in requests]
        self._check(max(map(len, sources)), sampling)
        with torch.inference_mode(), _named_errors():
            found = self._decode([request.seed for request in requests], sources, sampling)
        num_tokens = [
            len(s) + len(h.tokens) for s, hs in zip(sources, found, strict=True) for h in hs
        ]
        token_s = (time.perf_counter() - start) / sum(num_tokens)
        return [
            [self._completion(hypothesis, len(source), token_s) for hypothesis in hypotheses]
            for source, hypotheses in zip(sources, found, strict=True)
        ]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest."""
        return {
            "engine": "marian",
            "torch": torch.__version__,
            "sentencepiece": sentencepiece.__version__,
            "model": self._model.source,
            "sha256": self._model.sha256,
            "device": str(self._network.device),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "max_context_tokens": self.max_context_tokens,
        }

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards. May be called again."""
        vars(self).pop("_network", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _source(self, request: Request) -> list[int]:
        return [*self._pieces.encode(request.text), self._pieces.eos_id()]

    def _check(self, longest: int, sampling: Sampling) -> None:
        if longest + sampling.max_new_tokens > self.max_context_tokens:
            raise EngineError(
                f"{longest} source tokens + {sampling.max_new_tokens} new are over the context "
                f"of {self.max_context_tokens}"
            )
        if sampling.temperature > 0 and sampling.num_beams > 1:
            raise EngineError(f"num_beams {sampling.num_beams} needs temperature 0")
        if sampling.temperature == 0 and sampling.num_samples > 1:
            raise EngineError(f"num_samples {sampling.num_samples} needs a temperature above 0")

    def _decode(
        self, seeds: Sequence[int], sources: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[_Hypothesis]]:
        """Return the hypotheses per source."""
        network, length, eos_id = self._network, sampling.max_new_tokens, self._pieces.eos_id()
        state = network.encode(sources, sampling.num_beams)
        if sampling.num_beams > 1:
            return [[best] for best in _beam_search(network, state, length, eos_id)]
        if sampling.temperature == 0:
            return [[h] for h in _decode(network, state, length, eos_id, _greedy)]
        n = sampling.num_samples
        groups = torch.arange(len(sources), device=network.device).repeat_interleave(n)
        choose = _sampler(sampling, [(seed, sample) for seed in seeds for sample in range(n)])
        flat = _decode(network, state.select(groups), length, eos_id, choose)
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _completion(self, h: _Hypothesis, num_source: int, token_s: float) -> Completion:
        """Spread the batch's time over its tokens, read and written, at `token_s` each."""
        return Completion(
            text=self._pieces.decode(h.tokens[:-1] if h.ended else h.tokens),
            token_ids=tuple(h.tokens),
            sum_logprob=h.sum_logprob,
            num_tokens=len(h.tokens),
            finish_reason="stop" if h.ended else "length",
            prompt_tokens=num_source,
            compute_s=token_s * (num_source + len(h.tokens)),
        )


def _context_option(options: Mapping[str, Any]) -> int:
    if unknown := sorted(options.keys() - OPTIONS):
        raise JobError(
            f"engine marian does not know {', '.join(unknown)}; allowed: {', '.join(OPTIONS)}",
            key="agents.options",
        )
    value = options.get("max_context_tokens", MAX_CONTEXT_TOKENS)
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise JobError(
            f"{value!r} is not a number of tokens; allowed: whole numbers from 2",
            key="agents.options.max_context_tokens",
        )
    return value


def _device(config: EngineConfig) -> torch.device:
    if config.dtype not in ("auto", "float32"):
        raise JobError(
            f"engine marian computes in float32, not {config.dtype!r}; allowed: auto, float32",
            key="agents.dtype",
        )
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise JobError(
            f"engine marian cannot use {name!r}; allowed: auto, cpu, cuda, cuda:N",
            key="agents.device",
        )
    return torch.device(name)


def _only_file(model: ModelFiles, pattern: str) -> Path:
    found = sorted(model.path.glob(pattern)) if model.path else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{model.source}: needs one {pattern} in its directory; found: {names}")
    return found[0]


def _read_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from error


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turn torch's ways to say out of memory into ours; on a CPU it is a RuntimeError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(str(error)) from error
