"""Small inline SVG charts: no script, no text inside (HTML carries the labels), colours by CSS.

Horizontal positions are percentages, so a chart fills its place on a phone as on paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

NUM_SHADES = 5
BAR_HEIGHT = 14
HISTOGRAM_HEIGHT = 120
LINE_HEIGHT = 18
AREA_HEIGHT = 30
"""CSS pixels."""


def shades(values: Sequence[float]) -> list[str]:
    """Return a CSS class for each part of a whole: the larger the part, the stronger its colour."""
    largest = sorted(values, reverse=True)[:NUM_SHADES]
    return [f"s{1 + largest.index(v) if v in largest else NUM_SHADES}" for v in values]


def stacked(
    label: str, values: Sequence[float], classes: Sequence[str], whole: float | None = None
) -> Markup:
    """Draw parts of a whole beside each other in one bar.

    Args:
        values: none negative; all 0 draws an empty bar.
        classes: a CSS class per value, for its colour.
        whole: what the full width stands for; None: the values' sum.
    """
    total = whole or sum(values) or 1.0
    bars, left = [], 0.0
    for value, name in zip(values, classes, strict=True):
        width = 100 * value / total
        if width > 0:
            bars.append(_rect(left, width, 0, BAR_HEIGHT, name))
        left += width
    return _svg(label, BAR_HEIGHT, bars, "stacked")


def histogram(label: str, counts: Sequence[int]) -> Markup:
    """Draw one column per count, the highest as high as the chart; a count above 0 is visible."""
    highest = max(counts, default=0) or 1
    width = 100 / max(1, len(counts))
    bars = []
    for position, count in enumerate(counts):
        height = max(2.0, HISTOGRAM_HEIGHT * count / highest) if count else 0.0
        bars.append(
            _rect(position * width + 0.2, width - 0.4, HISTOGRAM_HEIGHT - height, height, "s1")
        )
    return _svg(label, HISTOGRAM_HEIGHT, bars, "histogram")


def interval(label: str, value: float | None, low: float | None, high: float | None) -> Markup:
    """Draw a value in [0, 1] as a dot, and its interval as a line."""
    middle = LINE_HEIGHT / 2
    marks = [_line(0, 100, middle, "track")]
    if low is not None and high is not None:
        marks.append(_line(100 * low, 100 * high, middle, "range"))
    if value is not None:
        marks.append(Markup('<circle cx="{:.2f}%" cy="{:g}" r="4.5"/>').format(100 * value, middle))
    return _svg(label, LINE_HEIGHT, marks, "interval")


def pair(label: str, said: float, was: float) -> Markup:
    """Draw two values in [0, 1] on one line: what was said (a bar), what was true (a dot)."""
    middle = LINE_HEIGHT / 2
    marks = [
        _rect(0, 100 * said, middle - 4, 8, "s3"),
        Markup('<circle cx="{:.2f}%" cy="{:g}" r="4.5"/>').format(100 * was, middle),
    ]
    return _svg(label, LINE_HEIGHT, marks, "interval")


def area(label: str, values: Sequence[float], highest: float) -> Markup:
    """Draw values along time as a filled step line; `highest` is the chart's full height."""
    height = AREA_HEIGHT
    points = [f"0,{height}"]
    for position, value in enumerate(values):
        level = height * (1 - min(1.0, value / highest)) if highest else height
        points += [f"{position},{level:.1f}", f"{position + 1},{level:.1f}"]
    points.append(f"{len(values)},{height}")
    return Markup(
        '<svg class="area" role="img" aria-label="{}" width="100%" height="{}" '
        'viewBox="0 0 {} {}" preserveAspectRatio="none"><polygon points="{}"/></svg>'
    ).format(label, height, max(1, len(values)), height, " ".join(points))


def _svg(label: str, height: float, marks: Sequence[Markup], name: str) -> Markup:
    return (
        Markup('<svg class="{}" role="img" aria-label="{}" width="100%" height="{:g}">').format(
            name, label, height
        )
        + Markup("").join(marks)
        + Markup("</svg>")
    )


def _rect(left: float, width: float, top: float, height: float, name: str) -> Markup:
    return Markup(
        '<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="{:.1f}" height="{:.1f}"/>'
    ).format(escape(name), left, width, top, height)


def _line(left: float, right: float, y: float, name: str) -> Markup:
    return Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="{:g}" y2="{:g}"/>').format(
        name, left, right, y, y
    )
