"""Facts → one HTML page without scripts, and without anything from outside → file."""

from __future__ import annotations

from functools import cache

import jinja2
from markupsafe import Markup

from mas_batch.report import charts
from mas_batch.report.collect import collect
from mas_batch.report.facts import Facts
from mas_batch.run_folder.read import Run

NAME = "report.html"
"""In the run's folder."""


def write(run: Run, *, whole: bool = False) -> str:
    """Write the report of a run into it, in the place of an earlier one; returns its location.

    Args:
        whole: see `collect`.

    Raises:
        RunError: a table cannot be read, or the report cannot be written.
    """
    run.store.replace(NAME, render(collect(run, whole=whole)))
    return run.store.location(NAME)


def render(facts: Facts) -> bytes:
    """Return the page, in UTF-8. Everything out of the run is escaped."""
    page = _environment().get_template("page.html").render(facts=facts)
    return page.encode(errors="backslashreplace")  # a lone surrogate, out of a file's name, say


@cache  # to compile the page takes longer than to fill it in
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("mas_batch.report", ".")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "seconds": seconds,
        "share": share,
        "figure": figure,
        "words": words,
        "extract": lambda key, mapping: mapping[key],
    }
    style = Markup(loader.get_source(environment, "style.css")[0])
    environment.globals |= {"charts": charts, "style": style}
    return environment


def count(number: float | None) -> str:
    """Write a count or a rate, with separators; small rates keep their digits."""
    if number is None:
        return "–"
    if isinstance(number, int) or number >= 100:
        return f"{number:,.0f}"
    return f"{number:,.3g}"


def seconds(duration_s: float | None) -> str:
    """Write a duration in the unit that people would say it in."""
    if duration_s is None:
        return "–"
    if duration_s == 0:
        return "0 s"
    if duration_s < 0.9995:
        return f"{duration_s * 1000:.3g} ms" if duration_s >= 1e-4 else "< 0.1 ms"
    if duration_s < 99.5:
        return f"{duration_s:.3g} s"
    minutes, rest = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def share(part: float | None) -> str:
    """Write a share as per cent; only what is 0 or 1 is shown as 0 % or 100 %."""
    if part is None:
        return "–"
    if 0 < part < 0.01:
        return "< 1 %"
    if 0.99 < part < 1:
        return "> 99 %"
    return f"{part:.0%}".replace("%", " %")


def figure(value: float | None, digits: int = 3) -> str:
    """Write a figure with so many decimals; above 1.5 with one: chrF and BLEU go to 100."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) > 1.5 else f"{value:.{digits}f}"


def words(text: str | None) -> str:
    """Write a code (`standard_error`) as words."""
    return (text or "").replace("_", " ")
