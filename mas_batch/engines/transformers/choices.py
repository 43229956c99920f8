"""How likely given continuations of a prompt are: it is read once, whatever their number.

The packed network reads a prompt and all its continuations in one pass, as a tree: a continuation
sees the prompt and itself. Elsewhere the prompt's keys and values are copied for each continuation
of more than one token, and the next tokens are fed to all of them together. Of continuations of one
token nothing is read at all: what follows the prompt tells their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mas_batch.engines.base import Completion, Sampling
from mas_batch.engines.timing import share_time
from mas_batch.engines.transformers.network import Network
from mas_batch.engines.transformers.packed_stream import READ_TOKENS
from mas_batch.engines.transformers.streams import SpecialTokens, Stream
from mas_batch.errors import EngineError

Tokens = Sequence[int]

LOGIT_ROWS = 256
"""Rows of the vocabulary's logits that are there at once."""


def score_packed(
    network: Network, prompts: Sequence[Tokens], choices: Sequence[Sequence[Tokens]]
) -> list[list[float]]:
    """Return, for each prompt, the log-probability of each of its continuations."""
    trees = [_Tree(prompt, own) for prompt, own in zip(prompts, choices, strict=True)]
    for part in _parts(trees):
        _read_trees(network, part)
    return [tree.logprobs for tree in trees]


class _Tree:
    """A prompt and its continuations, but for their last tokens, which are only predicted."""

    def __init__(self, prompt: Tokens, choices: Sequence[Tokens]) -> None:
        self.length = len(prompt)
        self.tokens = [*prompt, *(token for choice in choices for token in choice[:-1])]
        self.positions = list(range(self.length))
        self.logprobs = [0.0] * len(choices)
        self.wanted: list[tuple[int, int, int]] = []
        """Continuation, one of its tokens, and the token of the tree that predicts it."""
        owners: list[int] = []
        for i, choice in enumerate(choices):
            start = len(self.positions) - 1
            places = [self.length - 1, *range(start + 1, start + len(choice))]
            self.wanted += [(i, token, at) for token, at in zip(choice, places, strict=True)]
            self.positions += range(self.length, self.length + len(choice) - 1)
            owners += [i] * (len(choice) - 1)
        own = torch.tensor(owners)
        allowed = (own[:, None] == own).tril()
        seen = torch.cat([torch.ones(len(owners), self.length, dtype=torch.bool), allowed], 1)
        self.mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attend within the tree: [heads, tokens, size] each."""
        n = self.length
        found = [
            scaled_dot_product_attention(
                queries[None, :, :n],
                keys[None, :, :n],
                values[None, :, :n],
                is_causal=True,
                scale=scale,
            )[0]
        ]
        if len(self.tokens) > n:
            found.append(
                scaled_dot_product_attention(
                    queries[None, :, n:],
                    keys[None],
                    values[None],
                    attn_mask=self.mask.to(queries.dtype),
                    scale=scale,
                )[0]
            )
        return torch.cat(found, 1)


def _read_trees(network: Network, trees: Sequence[_Tree]) -> None:
    groups = network.num_heads // network.num_key_heads
    sizes = [len(tree.tokens) for tree in trees]
    starts = [0, *accumulate(sizes)]

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(
            trees,
            *(part.transpose(0, 1).split(sizes, 1) for part in (queries, keys, values)),
            strict=True,
        )
        found = [
            tree.attend(q, *(part.repeat_interleave(groups, 0) for part in own), network.scale)
            for tree, q, *own in parts
        ]
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


def _parts(trees: Sequence[_Tree]) -> Iterator[list[_Tree]]:
    part: list[_Tree] = []
    for tree in trees:
        if part and sum(len(each.tokens) for each in [*part, tree]) > READ_TOKENS:
            yield part
            part = []
        part.append(tree)
    yield part


def score_stream(
    open_stream: Callable[[], Stream],
    special: SpecialTokens,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    max_tokens: int | None,
) -> list[list[float]]:
    """Return the same as `score_packed`, by any stream.

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
    return found


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
    logprobs: Sequence[Sequence[float]],
    sampling: Sampling,
    total_s: float,
) -> list[list[Completion]]:
    """Make a completion per prompt: its likeliest continuation, and what each one's is.

    Nothing is decoded, so all the time is that of reading.

    Raises:
        EngineError: a model's logits are not finite.
    """
    if not all(math.isfinite(one) for own in logprobs for one in own):
        raise EngineError(
            "the model's logits are not finite; float16 overflows in some models, where bfloat16 "
            "or float32 does not"
        )
    read = [len(p) + sum(map(len, own)) for p, own in zip(prompts, choices, strict=True)]
    shares = share_time(total_s, total_s, read, [[0]] * len(prompts))
    found: list[list[Completion]] = []
    for prompt, own, each, [(compute_s, prefill_s)] in zip(
        prompts, choices, logprobs, shares, strict=True
    ):
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
                    choice_logprobs=tuple(each),
                    choice_tokens=tuple(map(len, own)),
                )
            ]
        )
    return found
