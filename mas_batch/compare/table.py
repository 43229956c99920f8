"""A comparison as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mas_batch.compare.changes import Change
from mas_batch.compare.comparison import Comparison, Figure, QualityPair
from mas_batch.compare.record_pairs import RecordPair, Records
from mas_batch.report.page import count, figure, seconds, share
from mas_batch.safe_text import clip, printable
from mas_batch.terminal import plain_table, print_section

MAX_CHANGES = 40
"""Keys of a job that are shown; `--json` has all."""
_VALUE_CHARS = 80
_SHARES = {"agreement"}


def print_comparison(out: Console, found: Comparison) -> None:
    """Print how two runs differ: what was asked, by whom, what came of it, and record by record."""
    out.print(Text.assemble(("A ", "bold cyan"), printable(found.location_a)), soft_wrap=True)
    out.print(Text.assemble(("B ", "bold cyan"), printable(found.location_b)), soft_wrap=True)
    for title, changed in (
        ("Job", found.job), ("Models", found.models), ("Versions", found.versions),
    ):  # fmt: skip
        _print_changes(out, title, changed)
    print_section(out, "Totals", "", _figures_table(found.totals))
    if found.time:
        print_section(out, "Time", "", _figures_table(found.time))
    print_section(out, "Agents", "", _agents_table(found))
    if found.quality:
        about = f"{found.quality[0].metric}; 95 % intervals that overlap may be noise"
        print_section(out, "Quality", about, _quality_table(found.quality))
    _print_records(out, found.records)


def _print_changes(out: Console, title: str, changed: Sequence[Change]) -> None:
    if not changed:
        out.print(Text.assemble("\n", (title, "bold"), ("  the same", "dim")))
        return
    table = plain_table(["", "A", "B"], num_left=3)
    for each in changed[:MAX_CHANGES]:
        table.add_row(Text(printable(each.key)), _value(each.a), _value(each.b))
    more = len(changed) - MAX_CHANGES
    print_section(out, title, f"{more:,} more in --json" if more > 0 else "", table)


def _value(value: str | None) -> Text:
    return Text("–", style="dim") if value is None else Text(clip(value, _VALUE_CHARS))


def _figures_table(figures: Iterable[Figure]) -> Table:
    table = plain_table(["", "A", "B", "B / A"])
    for each in figures:
        table.add_row(
            _label(each.name),
            _figure_cell(each.name, each.a),
            _figure_cell(each.name, each.b),
            _ratio(each),
        )
    return table


def _agents_table(found: Comparison) -> Table:
    """Lay out a row per agent and a column per figure that any agent has."""
    every = [each for figures in found.agents.values() for each in figures]
    names = list(dict.fromkeys(e.name for e in every if (e.a, e.b) != (None, None)))
    table = plain_table(["", *map(_label, names)])
    for agent, figures in found.agents.items():
        table.add_row(Text(agent), *(_change(each) for each in figures if each.name in names))
    return table


def _change(each: Figure) -> str:
    a, b = (_figure_cell(each.name, value) for value in (each.a, each.b))
    return a if a == b else f"{a} → {b}"


def _label(name: str) -> str:
    plain = name.removesuffix("_s") if _is_seconds(name) else name.replace("per_s", "per second")
    return plain.replace("_", " ")


def _is_seconds(name: str) -> bool:
    return name.endswith("_s") and not name.endswith("per_s")


def _figure_cell(name: str, value: float | None) -> str:
    if _is_seconds(name):
        return seconds(value)
    return share(value) if name in _SHARES else count(value)


def _ratio(each: Figure) -> str:
    if not each.a or each.b is None or each.a == each.b:
        return ""
    return f"{each.b / each.a:.3g}"


def _quality_table(pairs: Sequence[QualityPair]) -> Table:
    table = plain_table(["", "A", "95 %", "B", "95 %", "B - A", ""])
    for pair in pairs:
        difference = None if pair.a is None or pair.b is None else pair.b - pair.a
        sign = "" if difference is None else "+" if difference >= 0 else "-"
        table.add_row(
            Text(pair.name, style="bold" if pair.kind == "run" else ""),
            figure(pair.a), _range(pair.interval_a), figure(pair.b), _range(pair.interval_b),
            sign + figure(None if difference is None else abs(difference)),
            {None: "", True: "overlap", False: "apart"}[pair.overlap],
        )  # fmt: skip
    return table


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else " ".join(map(figure, interval))


def _print_records(out: Console, records: Records) -> None:
    table = plain_table(["", "records"])
    for label, number in (
        ("in both", records.common), ("answered alike", records.same),
        ("answered otherwise", records.different), ("newly answered", records.newly_answered),
        ("newly failed", records.newly_failed), ("failed in both", records.failed_in_both),
        ("only in A", records.only_a), ("only in B", records.only_b),
    ):  # fmt: skip
        if number or label in ("in both", "answered otherwise"):
            table.add_row(label, f"{number:,}")
    print_section(out, "Records", "", table)
    if records.judged is not None:
        judged = records.judged
        out.print(
            f"{judged.num_records:,} with a reference: {judged.right_in_both:,} right in both, "
            f"{judged.fixed:,} fixed, {judged.broken:,} broken (p = {judged.p:.3f})"
        )
    if records.confidence_change is not None:
        out.print(f"confidence of B minus A, on average: {records.confidence_change:+.3f}")
    elif records.common:
        out.print("confidences are of unlike kinds or none: not compared", style="dim")
    if records.changed:
        about = "surest first"
        print_section(out, "Other answers", about, _pairs_table(records.changed))
    if records.shifted:
        about = "biggest first"
        print_section(out, "Changes of confidence", about, _pairs_table(records.shifted))


def _pairs_table(pairs: Iterable[RecordPair]) -> Table:
    table = plain_table(["record", "A", "B", "conf. A", "conf. B"], num_left=3)
    for pair in pairs:
        answers = (Text(clip(text, _VALUE_CHARS)) for text in (pair.answer_a, pair.answer_b))
        figures = (figure(value, 2) for value in (pair.confidence_a, pair.confidence_b))
        table.add_row(Text(clip(pair.record_id, _VALUE_CHARS)), *answers, *figures)
    return table
