"""Tables as our commands print them: no lines, one column for words, figures on the right."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


def plain_table(header: Iterable[str], num_left: int = 1) -> Table:
    """Begin a table; its first `num_left` columns hold words, the others figures."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for position, title in enumerate(header):
        left = position < num_left  # in a narrow terminal words are broken, figures never
        table.add_column(title, justify="left" if left else "right", no_wrap=not left)
    return table


def print_section(console: Console, title: str, about: str, table: Table) -> None:
    """Print a table below its title and what is to be said about it."""
    console.print(Text.assemble("\n", (title, "bold"), ("  " + about if about else "", "dim")))
    console.print(table)
