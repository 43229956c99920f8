"""The decode loop: rows of requests that begin and end at any time, a token of each per step.

Why not `model.generate`: it runs finished rows until the longest ends, pads every prompt to the
longest before it reads them, reads a prompt once per sample, copies the whole past at every
step, draws samples from the global seed and keeps [steps, rows, vocabulary] scores where a sum
per row is wanted.

Rounding differs with a batch's shape, by about 1e-5 in float32 logits: only between tokens that
are nearer to each other can the batch decide.

A row is one sequence being decoded; `logits` are float32 [rows, vocabulary] of the next token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mas_batch.engines.base import Sampling
from mas_batch.engines.decoding import Decoded
from mas_batch.engines.sampling import draw
from mas_batch.engines.transformers.adapters import Adapters
from mas_batch.engines.transformers.prefixes import alike
from mas_batch.engines.transformers.streams import SpecialTokens, Stream
from mas_batch.errors import EngineError


@dataclass(slots=True)
class Asked:
    """A tokenised prompt, how it is to be decoded, and its results once it has ended."""

    key: int
    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    adapter: str | None = None
    prefill_s: float = 0.0
    """Its share of reading prompts."""
    cached_tokens: int = 0
    """Of its prompt, those that had been read for others."""
    results: list[Row] = field(default_factory=list)
    """One per sample."""

    @property
    def row_tokens(self) -> int:
        """Tokens that each of its rows takes room for."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def num_read(self) -> int:
        """Tokens of its prompt that were read for it, at least one."""
        return len(self.prompt) - self.cached_tokens

    @property
    def takes(self) -> tuple[int, int, int]:
        """What `Size.plus` wants to know of it."""
        return len(self.prompt), self.sampling.max_new_tokens, self.sampling.num_samples


@dataclass(slots=True)
class Row:
    """One sample of what was asked."""

    asked: Asked
    stream: np.random.Generator
    """The row's own random numbers: one per token, so that a sample depends on its request's
    seed and its own number alone."""
    decoded: Decoded = field(default_factory=Decoded)
    done: bool = False
    decode_s: float = 0.0
    """Its share of the steps that it was in."""


class Running:
    """The rows of one model that are under way.

    Steps are shared equally by the rows in them, prompts read together by the tokens that were
    read for each: all seconds that it takes are in somebody's share.
    """

    def __init__(self, stream: Stream, special: SpecialTokens, adapters: Adapters) -> None:
        self._adapters = adapters
        self._special = special
        self._stream = stream
        self._rows: list[Row] = []
        self._ended: list[Asked] = []
        """By their first tokens; the next step tells."""
        self.joinable = stream.joinable

    @property
    def num_asked(self) -> int:
        """How many have begun and have not been returned by `step`."""
        return len({row.asked.key for row in self._rows}) + len(self._ended)

    def choose(self, waiting: Sequence[Asked], max_tokens: int | None) -> list[int]:
        """Return the positions of those that there is room for, the first and those of like length.

        Prompts that have most in common go together, so that it is read once. While there is no
        room for the first, nobody passes it. One is taken if nothing is under way.
        """
        if not waiting or max_tokens is None:
            return list(range(len(waiting)))
        first, others = waiting[0], waiting[1:]
        size = self._stream.size.plus(*first.takes)
        if self._rows and size.num_tokens > max_tokens:
            return []
        taken = [0]
        least = tuple(map(min, zip(*(one.takes for one in others), strict=True)))
        order: Sequence[int] | None = None
        for number in range(len(others)):
            if size.plus(*least).num_tokens > max_tokens:
                break
            order = order or self._order(waiting)
            i = order[number]
            if (larger := size.plus(*others[i].takes)).num_tokens <= max_tokens:
                taken.append(i + 1)
                size = larger
        return sorted(taken)

    def _order(self, waiting: Sequence[Asked]) -> list[int]:
        """Return in which order others, from the second on, go with the first."""
        first, *others = waiting
        unlike = [abs(one.row_tokens - first.row_tokens) for one in others]
        if self._stream.size.padded:  # they share nothing
            return sorted(range(len(others)), key=lambda i: (unlike[i], i))
        own, *groups = alike([one.prompt for one in waiting])
        nearest: dict[int, int] = {}
        for group, distance in zip(groups, unlike, strict=True):
            nearest[group] = min(distance, nearest.get(group, distance))
        return sorted(
            range(len(others)),
            key=lambda i: (groups[i] != own, nearest[groups[i]], groups[i], unlike[i], i),
        )

    def begin(self, asked: Sequence[Asked]) -> None:
        """Read these prompts and choose their first tokens.

        Raises:
            EngineError: a model's logits are not finite; none has begun, as after any exception.
        """
        start = time.perf_counter()
        old = len(self._rows)
        joined: list[Row] = []
        try:
            for (copies, adapter), own in _read_together(asked).items():
                prompts = [one.prompt for one in own]
                most = [one.sampling.max_new_tokens for one in own]
                with self._adapters.used([adapter]):
                    logits, cached = self._stream.join(prompts, copies, most, adapter)
                for one, num in zip(own, cached, strict=True):
                    one.cached_tokens = num
                rows = [
                    Row(one, np.random.Generator(np.random.PCG64(stream)))
                    for one in own
                    for stream in _streams(one.seed, copies)
                ]
                joined += rows
                self._choose(logits.repeat_interleave(copies, 0), rows)
        except BaseException:
            if self.joinable:
                self._stream.keep(range(old))
            raise
        self._rows += joined
        for row in joined:
            row.asked.results.append(row)
        self._retire(self._ended)
        # `_choose` has brought the tokens here, so an accelerator has done its work.
        total_s, num_tokens = time.perf_counter() - start, sum(one.num_read for one in asked)
        for one in asked:
            one.prefill_s += total_s * one.num_read / num_tokens

    def step(self) -> list[Asked]:
        """Decode one more token of every row; return those whose rows have all ended.

        Raises:
            EngineError: the model's logits are not finite.
        """
        ended, self._ended = self._ended, []
        if rows := self._rows:
            start = time.perf_counter()
            last = [row.decoded.tokens[-1] for row in rows]
            tokens = torch.tensor(last, device=self._stream.device)
            with self._adapters.used([row.asked.adapter for row in rows]):
                logits = self._stream.step(tokens)
            self._choose(logits, rows)
            self._retire(ended)
            share_s = (time.perf_counter() - start) / len(rows)
            for row in rows:
                row.decode_s += share_s
        return ended

    def _retire(self, ended: list[Asked]) -> None:
        """Let rows that are done leave; note whose rows have all done so."""
        left = [i for i, row in enumerate(self._rows) if not row.done]
        if len(left) == len(self._rows):
            return
        touched = {row.asked.key: row.asked for row in self._rows if row.done}.values()
        ended += [asked for asked in touched if all(row.done for row in asked.results)]
        self._stream.keep(left)
        self._rows = [self._rows[i] for i in left]

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> None:
        """Choose among what is not banned; the log-probability is as if nothing was."""
        total = logits.logsumexp(-1)
        if self._special.banned:
            scores = logits.clone()
            scores[:, list(self._special.banned)] = -torch.inf
        else:
            scores = logits
        tokens = scores.argmax(-1)
        for sampling in {row.asked.sampling for row in rows if row.asked.sampling.temperature}:
            own = [i for i, row in enumerate(rows) if row.asked.sampling == sampling]
            uniform = np.array([rows[i].stream.random() for i in own])
            tokens[own] = draw(scores[own], sampling, uniform)
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - total
        forced = self._special.forced_first
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            decoded = row.decoded
            if not math.isfinite(logprob):
                raise EngineError(
                    f"the model's logits at step {len(decoded.tokens)} are not finite; float16 "
                    "overflows in some models, where bfloat16 or float32 does not"
                )
            if forced is None or decoded.tokens:
                decoded.tokens.append(token)
                decoded.sum_logprob += logprob
            else:
                decoded.tokens.append(forced)
            decoded.ended = decoded.tokens[-1] in self._special.end
            row.done = decoded.ended or len(decoded.tokens) == row.asked.sampling.max_new_tokens


def _read_together(asked: Sequence[Asked]) -> dict[tuple[int, str | None], list[Asked]]:
    """Return what is read together, by the number of samples and the adapter.

    Of one adapter, as keys and values of a prompt are the adapter's too.
    """
    groups: dict[tuple[int, str | None], list[Asked]] = {}
    for one in asked:
        groups.setdefault((one.sampling.num_samples, one.adapter), []).append(one)
    return groups


def _streams(seed: int, num_samples: int) -> list[np.random.SeedSequence]:
    """Return the random stream of each sample."""
    return [np.random.SeedSequence(seed, spawn_key=(sample,)) for sample in range(num_samples)]
