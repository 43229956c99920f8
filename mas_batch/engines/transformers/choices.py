"""How likely given continuations of a prompt are: it is read once, whatever their number.

The packed network reads a prompt and all its continuations in one pass, as a tree: a continuation
sees the prompt and itself; what kept prefixes have of the prompt is not read. Elsewhere the
prompt's keys and values are copied for each continuation of more than one token, and the next
tokens are fed to all of them together. Of continuations of one token nothing is read at all: what
follows the prompt tells their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mas_batch.engines.base import Completion, Sampling
from mas_batch.engines.timing import share_time
from mas_batch.engines.transformers.blocks import attend_after
from mas_batch.engines.transformers.network import Network
from mas_batch.engines.transformers.packed_stream import READ_TOKENS
from mas_batch.engines.transformers.prefixes import Layers, Prefixes
from mas_batch.engines.transformers.streams import SpecialTokens, Stream
from mas_batch.errors import EngineError

Tokens = Sequence[int]

LOGIT_ROWS = 256
"""Rows of the vocabulary's logits that are there at once."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of the continuations of prompts."""

    logprobs: list[list[float]]
    """Of each prompt, the log-probability of each continuation."""
    cached_tokens: list[int]
    """Of each prompt, those that had been read before."""


def score_packed(
    network: Network,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    prefixes: Prefixes | None = None,
    adapter: str | None = None,
) -> Scores:
    """Score continuations by a packed network.

    Args:
        prefixes: kept beyond the call; None: prompts are read whole.
        adapter: name of the one that is in use.
    """
    trees = []
    for part in _parts(prompts, choices):
        own = []
        for prompt, continuations in part:
            num, past = (0, []) if prefixes is None else prefixes.find(prompt, adapter)
            own.append(_Tree(prompt, continuations, min(num, len(prompt) - 1), past))
        _read_trees(network, own, keep=prefixes is not None)
        for tree in own:
            # What is not finite would spoil whatever begins alike, for ever.
            if prefixes is not None and all(map(math.isfinite, tree.logprobs)):
                prefixes.see(tree.prompt, adapter, tree.first)
            tree.layers.clear()
        trees += own
    return Scores([tree.logprobs for tree in trees], [tree.known for tree in trees])


class _Tree:
    """A prompt and its continuations, but for their last tokens, which are only predicted.

    Args:
        known: how many of the prompt's first tokens need not be read.
        past: layers that have these.
    """

    def __init__(self, prompt: Tokens, choices: Sequence[Tokens], known: int, past: Layers) -> None:
        self.prompt, self.length, self.known = prompt, len(prompt), known
        self._past = [tuple(tensor[:, :known] for tensor in pair) for pair in past if known]
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the whole prompt, where they may be kept."""
        self.tokens = [*prompt[known:], *(token for choice in choices for token in choice[:-1])]
        self.positions = list(range(known, self.length))
        self.logprobs = [0.0] * len(choices)
        self.wanted: list[tuple[int, int, int]] = []
        """Continuation, one of its tokens, and the token of the tree that predicts it."""
        owners: list[int] = []
        for i, choice in enumerate(choices):
            start = len(self.positions)
            places = [self.length - 1 - known, *range(start, start + len(choice) - 1)]
            self.wanted += [(i, token, at) for token, at in zip(choice, places, strict=True)]
            self.positions += range(self.length, self.length + len(choice) - 1)
            owners += [i] * (len(choice) - 1)
        own = torch.tensor(owners)
        allowed = (own[:, None] == own).tril()
        seen = torch.cat([torch.ones(len(owners), self.length, dtype=torch.bool), allowed], 1)
        self.mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *, keep: bool
    ) -> Tensor:
        """Attend within the tree: queries are [heads, tokens, size], the others of key heads.

        Args:
            keep: note the prompt's keys and values.
        """
        n, own = self.length, self.length - self.known
        if self.known:
            keys, values = (
                torch.cat(pair, 1) for pair in zip(self._past[layer], (keys, values), strict=True)
            )
        if keep:
            self.layers.append((keys[:, :n].clone(), values[:, :n].clone()))
        groups = len(queries) // len(keys)
        all_keys, all_values = (part.repeat_interleave(groups, 0) for part in (keys, values))
        if self.known:
            found = [attend_after(queries[:, :own], keys[:, :n], values[:, :n], scale)]
        else:
            found = [
                scaled_dot_product_attention(
                    queries[None, :, :n],
                    all_keys[None, :, :n],
                    all_values[None, :, :n],
                    is_causal=True,
                    scale=scale,
                )[0]
            ]
        if len(self.tokens) > own:
            found.append(
                scaled_dot_product_attention(
                    queries[None, :, own:],
                    all_keys[None],
                    all_values[None],
                    attn_mask=self.mask.to(queries.dtype),
                    scale=scale,
                )[0]
            )
        return torch.cat(found, 1)

    def first(self, num: int) -> Layers:
        """Return copies of the keys and values of so many tokens."""
        return [(keys[:, :num].clone(), values[:, :num].clone()) for keys, values in self.layers]


def _read_trees(network: Network, trees: Sequence[_Tree], *, keep: bool) -> None:
    sizes = [len(tree.tokens) for tree in trees]
    starts = [0, *accumulate(sizes)]

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(
            trees,
            *(part.transpose(0, 1).split(sizes, 1) for part in (queries, keys, values)),
            strict=True,
        )
        found = [tree.attend(layer, *own, network.scale, keep=keep) for tree, *own in parts]
        return torch.cat(found, 1).transpose(0, 1).flatten(1)

    tokens = torch.tensor([token for tree in trees for token in tree.tokens])
    positions = torch.tensor([position for tree in trees for position in tree.positions])
    states = network.forward(tokens, positions, attend)
    wanted = [
        (tree, choice, token, start + at)
        for tree, start in zip(trees, starts, strict=False)
        for choice, token, at in tree.wanted
    ]
    places = sorted({at for *_, at in wanted})
    for first in range(0, len(places), LOGIT_ROWS):
        rows = {at: row for row, at in enumerate(places[first : first + LOGIT_ROWS])}
        own = [each for each in wanted if each[-1] in rows]
        logits = network.logits(states[list(rows)])
        found = _logprobs(logits, [rows[at] for *_, at in own], [token for _, _, token, _ in own])
        for (tree, choice, *_), logprob in zip(own, found, strict=True):
            tree.logprobs[choice] += logprob


def _parts(
    prompts: Sequence[Tokens], choices: Sequence[Sequence[Tokens]]
) -> Iterator[list[tuple[Tokens, Sequence[Tokens]]]]:
    part: list[tuple[Tokens, Sequence[Tokens]]] = []
    size = 0
    for prompt, own in zip(prompts, choices, strict=True):
        num_tokens = len(prompt) + sum(len(choice) - 1 for choice in own)
        if part and size + num_tokens > READ_TOKENS:
            yield part
            part, size = [], 0
        part.append((prompt, own))
        size += num_tokens
    yield part


def score_stream(
    open_stream: Callable[[], Stream],
    special: SpecialTokens,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    max_tokens: int | None,
) -> Scores:
    """Score continuations by any stream.

    Args:
        max_tokens: of the rows that there are at once; None: all.
    """
    longest = max(len(choice) for own in choices for choice in own)
    copies = 1 if longest == 1 else max(map(len, choices))
    row_tokens = max(map(len, prompts)) + longest
    size = len(prompts) if max_tokens is None else max(1, max_tokens // (row_tokens * copies))
    found: list[list[float]] = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        found += _score_rows(open_stream(), special, prompts[part], choices[part], copies, longest)
    return Scores(found, [0] * len(prompts))


def _score_rows(
    stream: Stream,
    special: SpecialTokens,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    copies: int,
    longest: int,
) -> list[list[float]]:
    logits, _ = stream.join(prompts, copies, [longest] * len(prompts), None)
    if special.forced_first is not None:
        forced = torch.full((len(prompts) * copies,), special.forced_first, device=stream.device)
        logits = stream.step(forced)[::copies]
    firsts = [[choice[0] for choice in own] for own in choices]
    rows = [i for i, own in enumerate(firsts) for _ in own]
    logprobs = iter(_logprobs(logits, rows, [token for own in firsts for token in own]))
    sums = [[next(logprobs) for _ in own] for own in choices]
    # The rows of the stream, by prompt and continuation.
    under_way = [(i, c) for i in range(len(prompts)) for c in range(copies)]
    for step in range(1, longest):
        kept = [
            row
            for row, (i, c) in enumerate(under_way)
            if c < len(choices[i]) and len(choices[i][c]) > step
        ]
        if not kept:  # the longest is another part's
            break
        stream.keep(kept)
        under_way = [under_way[row] for row in kept]
        last = [choices[i][c][step - 1] for i, c in under_way]
        logits = stream.step(torch.tensor(last, device=stream.device))
        targets = [choices[i][c][step] for i, c in under_way]
        found = _logprobs(logits, range(len(targets)), targets)
        for (i, c), logprob in zip(under_way, found, strict=True):
            sums[i][c] += logprob
    return sums


def _logprobs(logits: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of each token in its row of logits."""
    where = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
    found: list[float] = (logits[where] - logits.logsumexp(-1)[where[0]]).tolist()
    return found


def choice_completions(
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    scores: Scores,
    sampling: Sampling,
    total_s: float,
) -> list[list[Completion]]:
    """Make a completion per prompt: its likeliest continuation, and what each one's is.

    Nothing is decoded, so all the time is that of reading, by the tokens read for each.

    Raises:
        EngineError: a model's logits are not finite.
    """
    if not all(math.isfinite(one) for own in scores.logprobs for one in own):
        raise EngineError(
            "the model's logits are not finite; float16 overflows in some models, where bfloat16 "
            "or float32 does not"
        )
    rows = list(zip(prompts, choices, scores.logprobs, scores.cached_tokens, strict=True))
    read = [len(prompt) - cached + sum(map(len, own)) for prompt, own, _, cached in rows]
    shares = share_time(total_s, total_s, read, [[0]] * len(prompts))
    found: list[list[Completion]] = []
    for (prompt, own, each, cached), [(compute_s, prefill_s)] in zip(rows, shares, strict=True):
        best = max(range(len(each)), key=each.__getitem__)
        found.append(
            [
                Completion(
                    text=sampling.choices[best],
                    token_ids=tuple(own[best]),
                    sum_logprob=each[best],
                    num_tokens=len(own[best]),
                    finish_reason="stop",
                    prompt_tokens=len(prompt),
                    compute_s=compute_s,
                    prefill_s=prefill_s,
                    cached_tokens=cached,
                    choice_logprobs=tuple(each),
                    choice_tokens=tuple(map(len, own)),
                )
            ]
        )
    return found
