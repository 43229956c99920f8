"""Cut a text that is too long for a model's context into parts that fit, losing no character."""

# ruff: noqa: RUF001 - punctuation of other scripts is meant

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mas_batch.errors import Reason, RecordError


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a text."""

    text: str
    separator_after: str = ""
    """What is between this part and the next one in the text: whitespace, or nothing."""


class _Break(NamedTuple):
    """A place to cut: a part may end at `end`; the next part then starts at `resume`."""

    end: int
    resume: int


# A gap is whitespace, or the end of a sentence in a script that writes none after it.
_GAP = re.compile(r"[。！？｡]+[」』】）”’»]*(?P<space>\s*)|\s+")
_SENTENCE_END = re.compile(r"[.!?…‽؟۔।॥።。！？｡][\"'”’»)\]」』】）]*\Z")
_MAX_CLOSERS = 8
"""Characters before a gap that are searched for the end of a sentence and its closing quotes."""


def split(text: str, fits: Callable[[str], bool]) -> list[Part]:
    """Cut `text` into the longest parts that fit, at the most natural places.

    A part ends at the last end of a sentence or line that fits, or at the end of a paragraph in
    the second half of that stretch. If not even one sentence fits, it ends after a word; if no
    word fits, inside a word. Parts joined with their separators are `text` again. A part never
    begins with whitespace, except the first part of a text that does.

    `fits` may be costly (it tokenises). If it holds for a string, it should hold for the string's
    prefixes; where it does not, parts may be shorter than possible, but never too long. It is
    called with O(log words) strings per part, each at most about twice as long as a part.

    Raises:
        RecordError: `too_long`, if not even one character fits.
    """
    if fits(text):
        return [Part(text)]
    levels = _breaks(text)
    parts: list[Part] = []
    start, stride = 0, 1
    while start < len(text):
        cut = _cut(text, start, stride, levels, fits)
        parts.append(Part(text[start : cut.end], text[cut.end : cut.resume]))
        stride = max(1, _after(levels[-1], cut.end) - _after(levels[-1], start))
        start = cut.resume
    return parts


def sentences(text: str) -> list[str]:
    """Cut a text into its sentences; the end of a line ends one too. Whitespace is dropped."""
    _, breaks, _ = _breaks(text)
    starts = [0, *(cut.resume for cut in breaks)]
    cuts = (text[start : cut.end].strip() for start, cut in zip(starts, breaks, strict=False))
    return [sentence for sentence in cuts if sentence]


def largest(limit: int, holds: Callable[[int], bool]) -> int:
    """Return the largest n in 1..limit for which bisection finds `holds(n)` true, 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _cut(
    text: str,
    start: int,
    stride: int,
    levels: tuple[list[_Break], list[_Break], list[_Break]],
    fits: Callable[[str], bool],
) -> _Break:
    """Choose where the part that begins at `start` ends; `stride` is a first guess in words."""
    paragraphs, sentences, words = levels
    first = _after(words, start)
    # Doubling brackets the part, so that a long text is never tokenised to its end.
    while first + stride <= len(words) and fits(text[start : words[first + stride - 1].end]):
        stride *= 2
    bound = words[min(first + stride, len(words)) - 1].end
    for breaks in (sentences, words):
        near = breaks[_after(breaks, start) : _after(breaks, bound)]
        if n := _last_that_fits(text, start, [b.end for b in near], fits):
            cut = near[n - 1]
            paragraph = paragraphs[max(0, _after(paragraphs, cut.end) - 1)]
            late = start + (cut.end - start) / 2 <= paragraph.end < cut.end
            return paragraph if late and fits(text[start : paragraph.end]) else cut
    inside = range(start + 1, words[first].end)
    n = _last_that_fits(text, start, inside, fits)
    if not n:
        raise RecordError(Reason.TOO_LONG, "not even one character of the text fits the context")
    return _Break(inside[n - 1], inside[n - 1])


def _last_that_fits(text: str, start: int, ends: Sequence[int], fits: Callable[[str], bool]) -> int:
    return largest(len(ends), lambda n: fits(text[start : ends[n - 1]]))


def _after(breaks: Sequence[_Break], position: int) -> int:
    """Count the breaks that end at or before `position`."""
    return bisect_right(breaks, position, key=lambda b: b.end)


def _breaks(text: str) -> tuple[list[_Break], list[_Break], list[_Break]]:
    """List the places to cut after paragraphs, after sentences and after words.

    Each list also has the places of the list before it, and the end of the text.
    """
    paragraphs: list[_Break] = []
    sentences: list[_Break] = []
    words: list[_Break] = []
    for match in _GAP.finditer(text):
        end = match.start() if match["space"] is None else match.start("space")
        cut = _Break(end, match.end())
        if end == 0 or cut.resume == len(text):
            continue
        gap = text[end : cut.resume]
        words.append(cut)
        if _ends_sentence(text, cut):
            sentences.append(cut)
        if gap.count("\n") > 1 or "\u2029" in gap:
            paragraphs.append(cut)
    last = _Break(len(text.rstrip()) or len(text), len(text))
    return [*paragraphs, last], [*sentences, last], [*words, last]


def _ends_sentence(text: str, cut: _Break) -> bool:
    if "\n" in text[cut.end : cut.resume]:  # a line of a list, a poem, a transcript
        return True
    before = text[max(0, cut.end - _MAX_CLOSERS) : cut.end]
    # A small letter after the full stop: an abbreviation.
    return bool(_SENTENCE_END.search(before)) and not text[cut.resume].islower()
