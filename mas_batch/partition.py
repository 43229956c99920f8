"""Records to partitions under a token budget: the unit of routing, retry and resume.

Pure and lazy: one partition is held at a time. Where a partition ends depends only on the records
before its end, so a corpus that grows at its end keeps its earlier partitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mas_batch.records import Record

_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Partition:
    """Neighbouring records of the corpus, in its order."""

    index: int
    first_record: int
    """Position of the first record in the corpus, from 0."""
    records: tuple[Record, ...]
    estimated_tokens: int
    """Text, context, prompt and new tokens of the usable records."""


def estimate_tokens(text: str) -> int:
    """Estimate a text's tokens without a tokenizer: its UTF-8 bytes / 4, rounded up.

    Bytes, not characters, because a tokenizer with byte fallback spends more tokens on a
    character of a script it hardly knows, up to one per byte. Such a tokenizer never needs
    more than one token per byte, so the true number is at most 4 times the estimate (random
    bytes, long numbers, rare scripts); it is below the estimate where a token spans more
    than 4 bytes (most English prose, long runs of one character). Good enough for budgets, not
    for context limits.
    """
    return -(-_num_bytes(text) // _BYTES_PER_TOKEN)


def partition(
    records: Iterable[Record], *, max_tokens: int, max_records: int, tokens_per_record: int
) -> Iterator[Partition]:
    """Cut records into the longest runs that fit both budgets.

    Args:
        records: read lazily, one record ahead of the partition being yielded.
        max_tokens: the most estimated tokens of a partition; a record that has more by itself
            gets a partition of its own.
        max_records: the most records of a partition. Unusable records count here, though
            they cost no tokens.
        tokens_per_record: prompt overhead plus new tokens, added to every usable record.

    Raises:
        ValueError: a limit below 1, or a negative `tokens_per_record`.
    """
    if max_tokens < 1 or max_records < 1 or tokens_per_record < 0:
        raise ValueError(
            f"max_tokens {max_tokens} and max_records {max_records} must be at least 1, "
            f"tokens_per_record {tokens_per_record} at least 0"
        )
    return _cut(records, max_tokens, max_records, tokens_per_record)


def _cut(
    records: Iterable[Record], max_tokens: int, max_records: int, tokens_per_record: int
) -> Iterator[Partition]:
    index = first = tokens = 0
    run: list[Record] = []
    for record in records:
        cost = _cost(record, tokens_per_record)
        if run and (len(run) == max_records or tokens + cost > max_tokens):
            yield Partition(index, first, tuple(run), tokens)
            index, first, tokens = index + 1, first + len(run), 0
            run = []
        run.append(record)
        tokens += cost
    if run:
        yield Partition(index, first, tuple(run), tokens)


def _cost(record: Record, tokens_per_record: int) -> int:
    if record.text is None:
        return 0
    context = estimate_tokens(record.context) if record.context else 0
    return estimate_tokens(record.text) + context + tokens_per_record


def _num_bytes(text: str) -> int:
    # ASCII, the common case, needs no copy. Lone surrogates (unusable texts) must not raise.
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
