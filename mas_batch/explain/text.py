"""An explanation as people and machines see it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mas_batch.explain.explanation import Explanation
from mas_batch.explain.story import CandidateWorker, Decision, News, OutcomeKind, Step, TryOutcome
from mas_batch.safe_text import printable

_MAX_CANDIDATES = 10
"""Rows of a table of candidates; `--json` has all of a large cluster's."""

_PURPOSES = {
    "retry": "retry after a failure",
    "careful": "careful: record by record, after a worker died at it",
    "copy": "copy of a slow task",
    "probe": "probe of a worker that kept failing",
}
_FIGURES = {
    "in_flight": ("in flight", "{:.0f}"),
    "in_flight_tokens": ("tokens", "{:,.0f}"),
    "num_answered": ("answered", "{:,.0f}"),
    "num_asked": ("asked", "{:,.0f}"),
    "tokens_per_s": ("tok/s", "{:,.0f}"),
    "agreement": ("agreed", "{:.0%}"),
}
_OUTCOMES = {
    OutcomeKind.ANSWERED: ("answered in", "green"),
    OutcomeKind.FAILED: ("failed after", "yellow"),
    OutcomeKind.PUT_OFF: ("put off after", "yellow"),
    OutcomeKind.LOST: ("lost after", "yellow"),
    OutcomeKind.OVERTAKEN: ("not waited for", "dim"),
    OutcomeKind.OPEN: ("no outcome: it is at work, or the run's process ended", "dim"),
}


def to_json(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as plain data that `json.dumps` takes; times in ISO 8601, UTC."""
    facts: dict[str, Any] = json.loads(json.dumps(asdict(explanation), default=datetime.isoformat))
    return facts


def print_explanation(out: Console, explanation: Explanation) -> None:
    """Print who was asked about a partition, when, why and to what end."""
    first, last = explanation.first_record + 1, explanation.first_record + explanation.num_records
    which = f"record {first:,}" if first == last else f"records {first:,} to {last:,}"
    about = f"{which}, about {explanation.estimated_tokens:,} tokens per answer"
    title = (f"partition {explanation.partition}", "bold")
    out.print(Text.assemble(title, f" (0 to {explanation.num_partitions - 1}): {about}"))
    out.print(explanation.run, soft_wrap=True, highlight=False, markup=False)
    for execution in explanation.executions:
        out.print(f"\n[bold]execution of {execution.started:%Y-%m-%d %H:%M:%S} UTC[/]")
        for step in execution.steps:
            _print_step(out, step, execution.started)
    out.print()
    for problem in explanation.problems:
        out.print(Text(printable(f"in doubt: {problem}"), style="yellow"))
    for agent_id, run in explanation.reused.items():
        out.print(Text(f"{agent_id} was not asked: its answers are those of {printable(run)}"))
    state = "merged" if explanation.is_merged else "not merged"
    agents = ", ".join(explanation.answered_by)
    answers = f"answers of {agents} are committed" if agents else "no answers are committed"
    out.print(Text(f"now: {state}; {answers}"))


def _print_step(out: Console, step: Step, started: datetime) -> None:
    line = Table.grid(padding=(0, 2))
    line.add_column(no_wrap=True, style="cyan")
    pattern = "%H:%M:%S.%f" if step.time.date() == started.date() else "%m-%d %H:%M:%S.%f"
    time = step.time.strftime(pattern)[:-3]
    if isinstance(step, News):
        good = step.event in ("PartitionMerged", "PartitionAnswered")
        line.add_row(time, Text(printable(step.message), style="green" if good else "yellow"))
        out.print(line)
        return
    purpose = f" (attempt {step.attempt}, {_PURPOSES.get(step.purpose, step.purpose)})"
    whom = ((step.agent_id, "bold"), " on ", (step.worker, "bold"))
    line.add_row(time, Text.assemble("asked ", *whom, purpose))
    out.print(line)
    out.print(_indented(Text(_reason(step))))
    if len(step.candidates) > 1:
        out.print(_indented(_candidates_table(step.candidates)))
    out.print(_indented(_outcome(step.outcome)))


def _indented(what: Text | Table) -> Padding:
    return Padding(what, (0, 0, 0, 4), expand=False)


def _reason(step: Decision) -> str:
    if step.purpose == "copy":
        return step.why
    busy = f", {step.num_busy:,} busy" if step.num_busy else ""
    if len(step.candidates) == 1:
        return f"the only free worker{busy}: {step.policy} had no choice"
    return f"by {step.policy}: {step.why}; among {len(step.candidates):,} free workers{busy}"


def _candidates_table(candidates: tuple[CandidateWorker, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("worker", overflow="fold")
    table.add_column("agent", overflow="fold")
    figures = sorted(
        {key for c in candidates for key in c.figures},
        key=lambda key: (list(_FIGURES).index(key) if key in _FIGURES else len(_FIGURES), key),
    )
    for key in figures:
        table.add_column(_FIGURES.get(key, (key,))[0], justify="right", no_wrap=True)
    shown = sorted(candidates, key=lambda c: not c.chosen)[:_MAX_CANDIDATES]
    for candidate in shown:
        table.add_row(
            "→" if candidate.chosen else "",
            Text(printable(candidate.worker)),
            Text(candidate.agent_id),
            *(_figure(key, candidate.figures.get(key)) for key in figures),
            style="bold" if candidate.chosen else None,
        )
    if len(candidates) > len(shown):
        table.add_row("", f"{len(candidates) - len(shown):,} more")
    return table


def _figure(key: str, value: float | None) -> str:
    if value is None or (key == "tokens_per_s" and not value):
        return "–"  # not measured yet
    return _FIGURES[key][1].format(value) if key in _FIGURES else f"{value:g}"


def _outcome(outcome: TryOutcome) -> Text:
    text, style = _OUTCOMES[outcome.kind]
    text += "" if outcome.after_s is None else f" {outcome.after_s:,.2f} s"
    if outcome.kind is OutcomeKind.ANSWERED:
        text += f" ({outcome.compute_s:,.2f} s of model time): {outcome.num_answers:,} answers"
        text += f", {outcome.num_failed:,} failed" if outcome.num_failed else ""
    text += f": {outcome.message}" if outcome.message else ""
    text += "; the agent is given up on this partition" if outcome.given_up else ""
    return Text(printable(text), style=style)
