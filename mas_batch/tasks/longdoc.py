"""How the answers to a document's parts become one: which go into one prompt, and with what.

Pure: `agents.answering` asks. Merging by a model is not associative, so pieces keep the
document's order, and which of them meet depends on the document and the prompt's room alone.
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
    """Sentences of the source carried along with a piece, at most."""


@dataclass(frozen=True, slots=True)
class Extractive:
    """The most central sentences stand for the whole: nothing is asked again."""

    num_evidence: int
    """Sentences of the source that stand for election beside a part's answer, at most."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The answer to a stretch of consecutive parts, with what the source itself says there."""

    text: str
    evidence: tuple[str, ...]
    """Sentences of the source, most central of their stretch, in its order."""
    first: int
    """Number of the stretch's first part, from 1."""
    last: int
    """Number of its last part."""
    cut: bool = False
    """Whether `max_new_tokens` ended the answer, and with it perhaps a sentence."""


def evidence(text: str, fits: Fits, limit: int) -> tuple[str, ...]:
    """Return the most central sentences of a part, in its order, that together fit.

    Merging summaries of summaries amplifies what a model makes up, unless sentences of the
    source are carried along: Chang et al., "BooookScore", 2024; Ou and Lapata, "Context-aware
    hierarchical merging for long document summarization", 2025.
    """
    return _chosen(sentences(text), fits, limit) if limit else ()


def merged(group: Sequence[Piece], text: str, fits: Fits, limit: int) -> Piece:
    """Put the answer that a group was merged to in its place.

    Its evidence is chosen anew from the group's, so that a piece takes no more room at a
    higher level than at a lower one.
    """
    quotes = [quote for piece in group for quote in piece.evidence]
    return Piece(text, _chosen(quotes, fits, limit), group[0].first, group[-1].last)


def pack(
    pieces: Sequence[Piece], fits: Callable[[Sequence[Piece]], bool]
) -> list[tuple[Piece, ...]]:
    """Cut one level into groups of neighbours, each as large as fits, from the first piece on.

    Evidence gives way to progress: where not one pair fits, the last sentence of every piece's
    evidence is dropped, and again. With none left there may be groups of one only: then the
    pieces cannot be merged.

    Args:
        pieces: all of a document's, in its order.
        fits: whether a group's prompt leaves room for the answer; should hold for the
            beginnings of what it holds for. Asked O(log of the fan-in) times per group.
    """
    for most in range(max(len(piece.evidence) for piece in pieces), -1, -1):
        shorter = [replace(piece, evidence=piece.evidence[:most]) for piece in pieces]
        groups = _pack(shorter, fits)
        if len(groups) < len(pieces):
            break
    whole = {piece.first: piece for piece in pieces}  # a lone piece goes up unchanged
    return [group if len(group) > 1 else (whole[group[0].first],) for group in groups]


def describe(num_evidence: int) -> str:
    """Say in words, to a model, what `merge_text` shows it."""
    quotes = "; lines after > are quoted from it" if num_evidence else ""
    return f"summaries of consecutive parts of one document, in order{quotes}"


def merge_text(group: Sequence[Piece]) -> str:
    """Write a group as the text of a prompt: each answer, then what its source says."""
    return "\n\n".join(
        "\n".join([piece.text, *(f"> {quote}" for quote in piece.evidence)]) for piece in group
    )


def extract(pieces: Sequence[Piece], fits: Fits) -> str:
    """Choose the most central sentences of all answers and their evidence, in document order.

    The last sentence of a cut answer is passed over unless it is all there is. Where no
    sentence fits, the shortest stands alone: an answer is not empty.
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
    """Count the pieces from the first on that fit together; a lone one always does."""
    bound = 2
    # Doubling brackets the group, so that a long document is never tokenised to its end.
    while bound < len(pieces) and fits(pieces[:bound]):
        bound *= 2
    return largest(min(bound, len(pieces)), lambda n: n == 1 or fits(pieces[:n]))


def _chosen(pool: Sequence[str], fits: Fits, limit: int | None) -> tuple[str, ...]:
    return tuple(pool[i] for i in select(pool, fits, limit))
