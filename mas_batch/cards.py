"""Cards: what a notebook shows of an object: a small HTML table, in which all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from mas_batch.safe_text import printable, without_credentials

MAX_CHARS = 300
"""The most characters of one value."""

_NAME = "text-align:left;font-weight:normal;opacity:.65;vertical-align:top;padding:.1em 1em .1em 0"
_VALUE = "text-align:left;padding:.1em 0"


def card(kind: str, name: str, facts: Mapping[str, object]) -> str:
    """Return a card in HTML that takes its colours and its font from the page around it.

    Credentials are stripped from values; a value of None is left out.
    """
    rows = "".join(
        f'<tr><th scope="row" style="{_NAME}">{escape(label)}</th>'
        f'<td style="{_VALUE}">{_as_html(value)}</td></tr>'
        for label, value in facts.items()
        if value is not None
    )
    return (
        '<div style="border-left:3px solid #1f6f8b;padding:.2em 0 .2em .9em">'
        f'<div><b>{_as_html(name)}</b> <span style="opacity:.65">{escape(kind)}</span></div>'
        f'<table style="border-collapse:collapse">{rows}</table></div>'
    )


def _as_html(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else printable(without_credentials(str(value)))
    return escape(text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…")
