"""ROVER: free texts are aligned word by word, and every word is voted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mas_batch.aggregate.ballots import (
    Ballot,
    Candidate,
    Verdict,
    gather,
    rank_candidates,
    shares_of,
    to_units,
    verdict,
)
from mas_batch.aggregate.method import Method

MAX_WORDS = 1000
"""Texts are aligned if none has more words: the table of an alignment has a cell for every pair."""

Slot = list[str]
"""One place of the word transition network: each aligned text's word there, "" for none."""


def rover(ballots: Sequence[Ballot], weights: Sequence[float] | None = None) -> Verdict:
    """Return the text of the words that most weight is behind; it may be no agent's answer.

    The texts are aligned one after the other to the network of those before them. The outcome
    depends on their order, which here is canonical, whatever the ballots' order: most weight
    first, then the tie rule of `rank_candidates`. Texts of equal `key` are one, with their
    weights added. Words are split at white space and joined by one blank: line breaks are lost.

    The confidence is the winners' mean share of the weight per slot, the margin their mean
    lead; `tie` says that somewhere the best two were equal and the rule decided: the longer
    word, then the greater in order of code points. The support says in which share of the
    slots an answer agrees with the published one, and `chosen` is the answer that agrees most.

    Args:
        weights: positive, one per ballot; None: 1 each.

    Where a text has more than `MAX_WORDS` words, none is aligned: the answer that most weight is
    behind is published whole, and its confidence is its share of the weight, as if different
    texts had no word in common.

    Source: Fiscus, "A post-processing system to yield reduced word error rates: recognizer
    output voting error reduction (ROVER)", ASRU 1997, voting by frequency. Cost: O(N² L²) for
    N texts of L words: for sentences and paragraphs, not for documents.
    """
    units = [to_units(weight) for weight in weights or [1.0] * len(ballots)]
    candidates = rank_candidates(gather(ballots, units))
    texts = [candidate.backers[0].key.split() for candidate in candidates]
    if max(map(len, texts)) > MAX_WORDS:
        return _whole(candidates)
    slots = _network(texts)
    tallies = [_ranked_votes(slot, candidates) for slot in slots]
    winners = [votes[0][1] for votes in tallies]
    support = _support(candidates, slots, winners)
    num_units = max(1, len(slots)) * sum(units)
    first = sum(votes[0][0] for votes in tallies)
    second = sum(votes[1][0] for votes in tallies if len(votes) > 1)
    shares = shares_of([candidate.weight for candidate in support])
    closest = verdict(
        support, shares, first / num_units, "word_agreement", (first - second) / num_units
    )
    # Where most say nothing in every slot, the closest answer is published after all.
    answer = " ".join(filter(None, winners)) or closest.answer
    tie = any(len(votes) > 1 and votes[0][0] == votes[1][0] for votes in tallies)
    return replace(closest, answer=answer, value=None, tie=tie)


def _whole(candidates: Sequence[Candidate]) -> Verdict:
    """Publish the answer of most weight as it is."""
    total = sum(candidate.score for candidate in candidates)
    shares = [candidate.score / total for candidate in candidates]
    margin = shares[0] - sum(shares[1:2])
    return verdict(candidates, shares, shares[0], "word_agreement", margin)


def _network(texts: Sequence[Sequence[str]]) -> list[Slot]:
    """Align the texts, each to those before it."""
    slots: list[Slot] = [[word] for word in texts[0]]
    for num_aligned, words in enumerate(texts[1:], start=1):
        slots = _aligned(slots, words, num_aligned)
    return slots


def _aligned(slots: Sequence[Slot], words: Sequence[str], num_aligned: int) -> list[Slot]:
    """Add a text at the least cost, back from the end of the table of `_costs`.

    Of equal ways the one that pairs a word with a slot is taken, then the one without a word.
    """
    known = [frozenset(slot) for slot in slots]
    costs = _costs(known, words)
    network: list[Slot] = []
    i, j = len(words), len(slots)
    while i or j:
        if i and j and costs[i][j] == costs[i - 1][j - 1] + (words[i - 1] not in known[j - 1]):
            i, j = i - 1, j - 1
            network.append([*slots[j], words[i]])
        elif j and costs[i][j] == costs[i][j - 1] + ("" not in known[j - 1]):
            j -= 1
            network.append([*slots[j], ""])
        else:
            i -= 1
            network.append([*[""] * num_aligned, words[i]])
    return network[::-1]


def _costs(known: Sequence[frozenset[str]], words: Sequence[str]) -> list[list[int]]:
    """[i][j]: edits between the first i words and the first j slots.

    A word costs nothing where the slot has it, no word where the slot has a text without one.
    """
    row = [0]
    for slot in known:
        row.append(row[-1] + ("" not in slot))
    costs = [row]
    for word in words:
        above, row = row, [row[0] + 1]
        for j, slot in enumerate(known):
            row.append(
                min(above[j] + (word not in slot), row[j] + ("" not in slot), above[j + 1] + 1)
            )
        costs.append(row)
    return costs


def _ranked_votes(slot: Slot, candidates: Sequence[Candidate]) -> list[tuple[int, str]]:
    """Add up the weight behind each word of a slot; best first."""
    votes: Counter[str] = Counter()
    for word, candidate in zip(slot, candidates, strict=True):
        votes[word] += candidate.score
    ranked = sorted(votes.items(), key=lambda item: (item[1], len(item[0]), item[0]), reverse=True)
    return [(score, word) for word, score in ranked]


def _support(
    candidates: Sequence[Candidate], slots: Sequence[Slot], winners: Sequence[str]
) -> list[Candidate]:
    """Score each answer by the share of the slots where its word won."""
    agreeing = []
    for i, candidate in enumerate(candidates):
        hits = sum(slot[i] == winner for slot, winner in zip(slots, winners, strict=True))
        share = hits / max(1, len(slots))
        agreeing.append(replace(candidate, score=to_units(share), weight=share))
    return rank_candidates(agreeing)


ROVER = Method(
    verdict=lambda ballots, spec, shared: rover(ballots, spec.weights_of(ballots)),
    columns=("text",),
    exact=True,
    confidence_kinds=("word_agreement",),
    stopping="its text is made of all answers word by word, so each further one may change it",
    not_escalated=None,
)
