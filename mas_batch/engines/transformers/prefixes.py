"""Which tokens of prompts have to be read: what several begin with is read once.

The tree of common prefixes is that of SGLang's RadixAttention (Zheng et al., 2023); here it is
made anew of the prompts that are read together, because a stream's rows own their keys and values.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from torch import Tensor

LEAST_TOKENS = 8
"""A shorter prefix is not worth sharing."""
KEPT_TOKENS = 1024
"""Tokens of prefixes that are kept for the prompts of later calls, of each adapter: 45 MiB of
SmolLM2-135M's."""
_MOST_SEEN = 16
"""Prompts that are remembered; a prefix is kept once a second one of them begins with it."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values per layer [key heads, tokens, size]."""
_Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that some prompts have at the same place, after the same tokens."""

    start: int
    stop: int
    prompts: tuple[int, ...]
    """Whose they are, in ascending order."""


def stretches(prompts: Sequence[Sequence[int]], known: Sequence[int]) -> list[Stretch]:
    """Cut prompts into what is to be read, each stretch after those that it follows.

    The last stretch of every prompt is its own, of at least one token.

    Args:
        known: of each prompt, how many of its first tokens need not be read.
    """
    found: list[Stretch] = []
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    # A stack, because prompts may branch more often than Python calls may nest.
    stack = [(order, 0)] if order else []
    while stack:
        group, start = stack.pop()
        start = max(start, min(known[i] for i in group))
        first = prompts[group[0]]
        if len(group) == 1:
            found.append(Stretch(start, len(first), (group[0],)))
            continue
        # Of sorted prompts, the first and the last have in common what all have.
        common = min(num_common(first, prompts[group[-1]]), len(first) - 1)
        if common - start >= LEAST_TOKENS:
            found.append(Stretch(start, common, tuple(sorted(group))))
            start = common
        # Those that end there have nothing but their last token left, which each reads itself.
        ending = [i for i in group if len(prompts[i]) == common + 1]
        longer = [i for i in group if len(prompts[i]) > common + 1]
        branches = groupby(longer, key=lambda i: prompts[i][common])
        stack += [([i], start) for i in ending]
        stack += [(list(branch), start) for _, branch in branches]
    return found


def alike(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Number groups of prompts: of neighbours in sorted order that share at least half."""
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    groups, group = [0] * len(prompts), 0
    for before, i in pairwise(order):
        one, other = prompts[before], prompts[i]
        group += 2 * num_common(one, other) < max(len(one), len(other))
        groups[i] = group
    return groups


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both begin with. O(tokens), by comparing slices."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True)
class _Own:
    """Those of one adapter, or of none."""

    kept: OrderedDict[_Tokens, Layers] = field(default_factory=OrderedDict)
    seen: deque[_Tokens] = field(default_factory=lambda: deque(maxlen=_MOST_SEEN))


@dataclass(slots=True)
class Prefixes:
    """Keys and values of prefixes that prompts have begun with, those used last.

    Of the same tokens they are others with another adapter; no adapter's drive out another's.
    """

    most_tokens: int = KEPT_TOKENS
    """Of each adapter."""
    _of: dict[str | None, _Own] = field(default_factory=dict)

    def find(self, prompt: Sequence[int], adapter: str | None) -> tuple[int, Layers]:
        """Return how many of a prompt's first tokens are kept, and the layers that have them."""
        kept = self._of[adapter].kept if adapter in self._of else OrderedDict()
        found = [(num_common(tokens, tuple(prompt)), tokens) for tokens in kept]
        num, best = max(found, key=lambda each: each[0], default=(0, ()))
        if num < LEAST_TOKENS:
            return 0, []
        kept.move_to_end(best)
        return num, kept[best]

    def see(
        self, prompt: Sequence[int], adapter: str | None, layers: Callable[[int], Layers]
    ) -> None:
        """Keep what a prompt that was read has in common with one before, unless it is kept.

        Args:
            layers: returns those of so many of its first tokens; they must not change afterwards.
        """
        own, whole = self._of.setdefault(adapter, _Own()), tuple(prompt)
        num = max((num_common(whole, seen) for seen in own.seen), default=0)
        tokens = whole[: min(num, self.most_tokens)]
        own.seen.append(whole)
        if num < LEAST_TOKENS or any(other[: len(tokens)] == tokens for other in own.kept):
            return
        for other in list(own.kept):
            if tokens[: len(other)] == other:  # the longer one has it
                del own.kept[other]
        own.kept[tokens] = layers(len(tokens))
        while sum(map(len, own.kept)) > self.most_tokens:
            own.kept.popitem(last=False)
