"""How the answers to a document's parts become one: which of them go into one prompt.

Pure: `agents.answering` asks. Merging by a model is not associative, so pieces keep the
document's order, and which pieces are merged with each other depends only on the document and on
the room in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mas_batch.aggregate.extractive import select
from mas_batch.tasks.splitting import largest, sentences

Fits = Callable[[str], bool]
"""Whether a text is within the budget."""


@dataclass(frozen=True, slots=True)
class Hierarchical:
    """The same agent merges neighbours, level by level, until one answer is left."""

    prompt: str
    """Template of the user turn; `{text}` is what `merge_text` makes of the pieces."""
    num_evidence: int
    """The most sentences of the source that go with a piece."""


@dataclass(frozen=True, slots=True)
class Extractive:
    """The most central sentences are the answer to the whole: the agent is not asked again."""

    num_evidence: int
    """The most sentences of a part's source that are candidates beside those of its answer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The answer to a stretch of consecutive parts, with sentences of the source."""

    text: str
    evidence: tuple[str, ...]
    """The most central sentences of the stretch's source, in its order."""
    first: int
    """Number of the stretch's first part, from 1."""
    last: int
    """Number of its last part."""
    cut: bool = False
    """Whether `max_new_tokens` ended the answer, perhaps within a sentence."""


def evidence(text: str, fits: Fits, limit: int) -> tuple[str, ...]:
    """Return the most central sentences of a part that fit together, in the part's order.

    Merging summaries of summaries amplifies what a model makes up, unless sentences of the
    source are carried along: Chang et al., "BooookScore", 2024; Ou and Lapata, "Context-aware
    hierarchical merging for long document summarization", 2025.
    """
    return _chosen(sentences(text), fits, limit) if limit else ()


def merge_group(group: Sequence[Piece], text: str, fits: Fits, limit: int) -> Piece:
    """Return the piece that replaces a group, whose merged answer is `text`.

    Its evidence is chosen anew from the group's evidence, so that a piece takes no more room at
    a higher level than at a lower one.
    """
    quotes = [quote for piece in group for quote in piece.evidence]
    return Piece(text, _chosen(quotes, fits, limit), group[0].first, group[-1].last)


def pack(
    pieces: Sequence[Piece], fits: Callable[[Sequence[Piece]], bool]
) -> list[tuple[Piece, ...]]:
    """Cut one level into groups of neighbours, each as large as fits, from the first piece on.

    Where not one pair fits, the last sentence of every piece's evidence is dropped, until a pair
    fits. If none fits without any evidence, all groups have one piece: the pieces cannot be
    merged.

    Args:
        pieces: all pieces of a document, in its order.
        fits: whether a group's prompt leaves room for the answer; if it holds for a group, it
            should hold for the group's beginnings. Called O(log of the fan-in) times per group.
    """
    for most in range(max(len(piece.evidence) for piece in pieces), -1, -1):
        shorter = [replace(piece, evidence=piece.evidence[:most]) for piece in pieces]
        groups = _pack(shorter, fits)
        if len(groups) < len(pieces):
            break
    whole = {piece.first: piece for piece in pieces}  # a lone piece keeps all its evidence
    return [group if len(group) > 1 else (whole[group[0].first],) for group in groups]


def describe(num_evidence: int) -> str:
    """Describe to a model, in words, what `merge_text` shows it."""
    quotes = "; lines after > are quoted from it" if num_evidence else ""
    return f"summaries of consecutive parts of one document, in order{quotes}"


def merge_text(group: Sequence[Piece]) -> str:
    """Write a group as the text of a prompt: each answer, followed by its evidence."""
    return "\n\n".join(
        "\n".join([piece.text, *(f"> {quote}" for quote in piece.evidence)]) for piece in group
    )


def extract(pieces: Sequence[Piece], fits: Fits) -> str:
    """Choose the most central sentences of all answers and their evidence, in document order.

    The last sentence of a cut answer is left out unless it is the only one. If no sentence fits,
    the shortest is returned: an answer must not be empty.
    """
    pool: list[str] = []
    for piece in pieces:
        said = sentences(piece.text)
        pool += (said[:-1] or said) if piece.cut else said
        pool += piece.evidence
    return " ".join(_chosen(pool, fits, None)) or min(pool, key=len)


def _pack(
    pieces: Sequence[Piece], fits: Callable[[Sequence[Piece]], bool]
) -> list[tuple[Piece, ...]]:
    groups: list[tuple[Piece, ...]] = []
    start = 0
    while start < len(pieces):
        size = _fan_in(pieces[start:], fits)
        groups.append(tuple(pieces[start : start + size]))
        start += size
    return groups


def _fan_in(pieces: Sequence[Piece], fits: Callable[[Sequence[Piece]], bool]) -> int:
    """Count the pieces from the first on that fit together; a lone piece always fits."""
    bound = 2
    # Doubling brackets the group, so that a long document is never tokenised to its end.
    while bound < len(pieces) and fits(pieces[:bound]):
        bound *= 2
    return largest(min(bound, len(pieces)), lambda n: n == 1 or fits(pieces[:n]))


def _chosen(pool: Sequence[str], fits: Fits, limit: int | None) -> tuple[str, ...]:
    return tuple(pool[i] for i in select(pool, fits, limit))
