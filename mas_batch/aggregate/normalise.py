"""Canonical forms: of a text, of one answer, and of the whole answers table."""

# ruff: noqa: RUF001  (the look-alike characters below are the subject)

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

from mas_batch.records import ANSWERS, join_answers

# Opening quote → the closing ones it may pair with (languages pair them differently).
_CLOSING = {
    '"': '"',
    "'": "'",
    "`": "`'",
    "“": "”",
    "‘": "’",
    "„": "“”",
    "‚": "‘’",
    "«": "»",
    "»": "«",
    "‹": "›",
    "›": "‹",
    "「": "」",
    "『": "』",
}
_SENTENCE_END = ".!?…。．！？｡؟۔।॥"


def nfc(text: str) -> str:
    """Return `text` with every accented character in its composed form."""
    return unicodedata.normalize("NFC", text)


def nfc_bytes(text: str) -> bytes:
    """Return the sort key of a text: no locale, so the same order on every machine."""
    return nfc(text).encode()


def normalise_text(text: str) -> str:
    """Drop what does not change a short answer: case, spacing, outer quotes, final punctuation.

    Idempotent. A text of nothing but quotes and punctuation keeps them, so that "?" and "!"
    stay two answers.
    """
    # Folding the decomposed form is Unicode's canonical caseless match (section 3.13, D145).
    folded = nfc(unicodedata.normalize("NFD", text).casefold())
    collapsed = " ".join(folded.split())
    return _without_wrapping(collapsed) or collapsed


def deduplicate(answers: pa.Table) -> pa.Table:
    """Keep one row per (record, agent, sample), sorted by them.

    Of repeated rows the lowest attempt stays, then the smallest text bytes (no text last),
    then the smallest of the other columns, so that the choice never depends on row order.
    """
    voter = ["record_id", "agent_id", "sample_id"]
    first = [*voter, "attempt", "text"]
    rest = [name for name in ANSWERS.names if name not in first]
    keys = [(name, "ascending") for name in (*first, *rest)]
    table = join_answers([answers])
    # Arrow sorts no lists: by the digits of the numbers.
    digits = pc.binary_join(table["probs"].cast(pa.list_(pa.string())), " ")
    at = table.column_names.index("probs")
    order = pc.sort_indices(table.set_column(at, "probs", digits), sort_keys=keys)
    table = table.take(order).combine_chunks()
    if table.num_rows < 2:
        return table
    current, previous = table.slice(1), table.slice(0, table.num_rows - 1)
    changes = [pc.not_equal(current[name], previous[name]) for name in voter]
    new = pc.or_(pc.or_(changes[0], changes[1]), changes[2])
    return table.filter(pa.chunked_array([pa.array([True]), *new.chunks]))


def _without_wrapping(text: str) -> str:
    while True:
        bare = text.rstrip(_SENTENCE_END).strip()
        if len(bare) > 1 and bare[-1] in _CLOSING.get(bare[0], ""):
            bare = bare[1:-1].strip()
        if bare == text:
            return text
        text = bare
