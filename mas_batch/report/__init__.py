"""What came of a run, as one page that opens anywhere: `report.html`.

collect.py   pure facts (facts.py, record_facts.py) out of a run's folder, from scan.py (walk.py,
             agreeing_pairs.py) and timing.py
findings.py  what is to be read first, as sentences; label_counts.py: who says which label
charts.py    small inline SVG
page.html    what the page says; style.css how it looks
page.py      facts → page → file
"""

from mas_batch.report.collect import collect
from mas_batch.report.facts import Facts
from mas_batch.report.findings import Finding, findings
from mas_batch.report.label_counts import LabelCounts, label_counts
from mas_batch.report.page import NAME, render, write

__all__ = [
    "NAME",
    "Facts",
    "Finding",
    "LabelCounts",
    "collect",
    "findings",
    "label_counts",
    "render",
    "write",
]
