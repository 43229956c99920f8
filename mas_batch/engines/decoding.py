"""One decode loop for PyTorch language models, decoder-only and encoder-decoder.

Why not `model.generate`: it runs finished rows until the longest ends, pads every prompt to the
longest before it reads them, reads a prompt once per sample, copies the whole past at every
step, draws samples from the global seed and keeps [steps, rows, vocabulary] scores where a sum
per row is wanted. Beam search is left to it.

Rounding differs with a batch's shape, by about 1e-5 in float32 logits: only between tokens that
are nearer to each other can the batch decide.

Names: a row is one sequence being decoded; `logits` are float32 [rows, vocabulary] of the next
token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from mas_batch.engines.base import Sampling
from mas_batch.errors import EngineError

GROUP_PADDING = 0.1
"""Prompts are read together while the shortest lacks at most this part of the longest."""

Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits, the rows' numbers, step) → token per row."""


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


@dataclass(slots=True)
class Decoded:
    """One row's tokens so far."""

    tokens: list[int] = field(default_factory=list)
    """As generated, the end token included."""
    sum_logprob: float = 0.0
    """Natural logarithm of their probability at temperature 1, nothing banned."""
    ended: bool = False


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    special: SpecialTokens,
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[list[Decoded]]:
    """Decode one batch of token prompts: per prompt, `sampling.num_samples` results.

    Raises:
        EngineError: the model's logits are not finite.
    """
    copies = sampling.num_samples
    if sampling.num_beams > 1:
        return [[best] for best in _beam_search(model, prompts, special, sampling)]
    choose = _greedy if sampling.temperature == 0 else Sampler(sampling, seeds)
    stream_type = _DecoderOnly if special.decoder_start is None else _EncoderDecoder
    stream: _Stream = stream_type(model, special, sampling.max_new_tokens)
    logits = stream.start(prompts)
    if copies > 1:  # only now: every prompt has been read once, whatever the number of samples
        rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(copies)
        stream.keep(rows)
        logits = logits[rows]
    flat = _run(stream, logits, choose, special, sampling.max_new_tokens)
    return [flat[i : i + copies] for i in range(0, len(flat), copies)]


def _run(
    stream: _Stream, logits: Tensor, choose: Choose, special: SpecialTokens, max_new_tokens: int
) -> list[Decoded]:
    """Choose and feed back tokens; a row leaves the batch as it ends."""
    done = [Decoded() for _ in range(len(logits))]
    active = list(range(len(logits)))
    for step in range(max_new_tokens):
        forced = special.forced_first if step == 0 else None
        tokens, logprobs = _choose(logits, choose, special, forced, active, step)
        for i, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise EngineError(
                    f"the model's logits at step {step} are not finite; float16 overflows in some "
                    "models, where bfloat16 or float32 does not"
                )
            done[i].tokens.append(token)
            done[i].sum_logprob += logprob
            done[i].ended = token in special.end
        left = [k for k, i in enumerate(active) if not done[i].ended]
        if not left or step + 1 == max_new_tokens:
            break
        if len(left) < len(active):
            rows = torch.tensor(left, device=tokens.device)
            stream.keep(rows)
            tokens = tokens[rows]
            active = [active[k] for k in left]
        logits = stream.step(tokens)
    return done


def _choose(
    logits: Tensor,
    choose: Choose,
    special: SpecialTokens,
    forced: int | None,
    active: Sequence[int],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Return the rows' next tokens and the tokens' log-probabilities."""
    if forced is not None:
        tokens = torch.full((len(logits),), forced, device=logits.device)
        return tokens, logits.new_zeros(len(logits))
    total = logits.logsumexp(-1)
    if special.banned:
        logits = logits.clone()
        logits[:, list(special.banned)] = -torch.inf
    tokens = choose(logits, active, step)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - total


def _greedy(logits: Tensor, active: Sequence[int], step: int) -> Tensor:
    return logits.argmax(-1)


class Sampler:
    """Draws by inverse distribution function from a random stream of each row's own.

    One number per row and step, so that a sample depends on its request's seed and its own
    number alone. Two batches can differ only by rounding in the model's logits, which moves a
    draw with a probability of about that rounding error.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        """Take one seed per request; its samples are the spawned streams 0, 1, …"""
        self._sampling = sampling
        streams = [
            np.random.SeedSequence(seed, spawn_key=(sample,))
            for seed in seeds
            for sample in range(sampling.num_samples)
        ]
        steps = sampling.max_new_tokens
        self._uniform = np.stack(
            [np.random.Generator(np.random.PCG64(s)).random(steps) for s in streams]
        )

    def __call__(self, logits: Tensor, active: Sequence[int], step: int) -> Tensor:
        """Return one token per row of `logits`; `active` are the rows' numbers from the start."""
        device = logits.device
        if device.type == "mps":  # it has no float64, and float32 sums are off by a draw's grain
            logits = logits.cpu()
        probs = (logits.double() / self._sampling.temperature).softmax(-1)
        # In the order of token ids: a near-tie may swap places in an order by probability.
        below = _restrict(probs, self._sampling.top_k, self._sampling.top_p).cumsum(-1)
        # Divided by its last value it ends with exactly 1, above any draw.
        below /= below[:, -1:].clone()
        draw = torch.from_numpy(self._uniform[active, step]).to(below.device)
        return torch.searchsorted(below, draw[:, None], right=True)[:, 0].to(device)


def _restrict(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to 0 what is not among the `top_k` likeliest, then what is beyond `top_p` of the rest."""
    if 0 < top_k < probs.shape[-1]:
        probs = probs.where(probs >= probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        kept = ordered.where(likelier < top_p * ordered.sum(-1, keepdim=True), 0)
        probs = torch.zeros_like(probs).scatter(1, order, kept)
    return probs


# --- Models as streams of logits


class _Stream(Protocol):
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, one row each; return the logits of the first tokens."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token per row; return the logits of the next."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row named twice is doubled."""


class _DecoderOnly:
    """Prompts padded on the left, read in groups of like length so that little is padding."""

    def __init__(self, model: Any, special: SpecialTokens, max_new_tokens: int) -> None:
        self._model = model
        self._special = special
        self._max_new_tokens = max_new_tokens
        self._cache = DynamicCache(config=model.config)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        ids, self._mask = _pad_rows(prompts, self._special.pad, "left", self._model.device)
        self._lengths = self._mask.sum(-1, keepdim=True)
        # Layers of another kind (sliding window, linear attention) can't be put together from
        # groups: their states are not simply one column per token.
        self._joinable = all(type(layer) is DynamicLayer for layer in self._cache.layers)
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
            for layer in self._cache.layers:
                layer.drop_columns(lead)
        self._cache.reorder_cache(rows)

    def _positions(self) -> Tensor:
        return (self._mask.cumsum(-1) - 1).clamp(min=0)

    def _read_groups(self, ids: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        num_rows, width = ids.shape
        positions = self._positions()
        found: list[Tensor] = []
        layers: list[_Buffer] = []
        for group in groups:
            rows = torch.tensor(group, device=ids.device)
            own = slice(width - int(self._lengths[rows].max()), width)
            cache = DynamicCache(config=self._model.config)
            mask = self._mask[rows, own]
            found.append(self._forward(ids[rows, own], mask, positions[rows, own], cache))
            capacity = width + self._max_new_tokens
            layers = layers or [_Buffer(part, num_rows, width, capacity) for part in cache.layers]
            for layer, part in zip(layers, cache.layers, strict=True):
                layer.fill(rows, part)
        self._cache.layers = layers
        order = torch.tensor([i for group in groups for i in group], device=ids.device)
        return torch.cat(found)[order.argsort()]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        optional = _accepted(self._model, position_ids=positions, logits_to_keep=1)
        output = self._model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **optional
        )
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
        ids, self._mask = _pad_rows(prompts, self._special.pad, "right", device)
        encoder = self._model.get_encoder()
        self._encoded = encoder(input_ids=ids, attention_mask=self._mask).last_hidden_state
        return self.step(torch.full((len(ids),), self._special.decoder_start, device=device))

    def step(self, tokens: Tensor) -> Tensor:
        output = self._model(
            encoder_outputs=(self._encoded,),
            attention_mask=self._mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def keep(self, rows: Tensor) -> None:
        self._mask, self._encoded = self._mask[rows], self._encoded[rows]
        self._cache.reorder_cache(rows)


class _Buffer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [rows, heads, columns, size], allocated once for all steps."""

    def __init__(self, like: DynamicLayer, num_rows: int, width: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        # Zeros, because padding is masked but still multiplied: it has to be finite.
        self._buffers = [
            tensor.new_zeros(num_rows, tensor.shape[1], capacity, tensor.shape[3])
            for tensor in (like.keys, like.values)
        ]
        self._show(width)

    def fill(self, rows: Tensor, part: DynamicLayer) -> None:
        """Put a group's columns at the right end of these rows."""
        own = slice(self._width - part.keys.shape[2], self._width)
        for buffer, tensor in zip(self._buffers, (part.keys, part.values), strict=True):
            buffer[rows, :, own] = tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = slice(self._width, self._width + key_states.shape[2])
        for buffer, tensor in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, new] = tensor
        self._show(new.stop)
        return self.keys, self.values

    def drop_columns(self, number: int) -> None:
        """Forget the leftmost columns."""
        self._buffers = [buffer[:, :, number:] for buffer in self._buffers]
        self._show(self._width - number)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show(self._width)

    def _show(self, width: int) -> None:
        self._width = width
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Put positions of like lengths together, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[i] >= (1 - GROUP_PADDING) * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _accepted(model: Any, **optional: Any) -> dict[str, Any]:
    """Leave out what the model's forward does not take, e.g. positions of an ALiBi model."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in optional.items() if name in known}


def _pad_rows(
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


# --- Beam search


def _beam_search(
    model: Any, prompts: Sequence[Sequence[int]], special: SpecialTokens, sampling: Sampling
) -> list[Decoded]:
    """Return the best hypothesis per prompt by mean log-probability per token."""
    decoder_only = special.decoder_start is None
    side = "left" if decoder_only else "right"
    ids, mask = _pad_rows(prompts, special.pad, side, model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=sampling.num_beams,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=sorted(special.end) or None,
        pad_token_id=special.pad,
        decoder_start_token_id=special.decoder_start,
        forced_bos_token_id=special.forced_first,
        suppress_tokens=list(special.banned) or None,
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    found = output[:, ids.shape[1] if decoder_only else 1 :].tolist()
    results = []
    for prompt, row in zip(prompts, found, strict=True):
        end = next((i for i, token in enumerate(row) if token in special.end), None)
        tokens = row if end is None else row[: end + 1]
        # Asking `generate` for scores would keep [steps, rows × beams, vocabulary] of them;
        # reading one hypothesis again costs what one of its many beams has cost at the prompt.
        results.append(Decoded(tokens, _score(model, prompt, tokens, special), end is not None))
    return results


def _score(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], special: SpecialTokens
) -> float:
    """Sum the tokens' log-probabilities in one pass over them."""

    def tensor(row: Sequence[int]) -> Tensor:
        return torch.tensor([row], device=model.device)

    if special.decoder_start is None:
        ids = tensor([*prompt, *tokens[:-1]])
        output = model(input_ids=ids, **_accepted(model, logits_to_keep=len(tokens)))
    else:
        shifted = tensor([special.decoder_start, *tokens[:-1]])
        output = model(input_ids=tensor(prompt), decoder_input_ids=shifted)
    logprobs = output.logits[0, -len(tokens) :].float().log_softmax(-1)
    chosen = logprobs.gather(1, tensor(tokens).T)[:, 0]
    first = 0 if special.forced_first is None else 1
    return float(chosen[first:].double().sum())
