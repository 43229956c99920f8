"""A plan as people read it in a terminal, and as machines do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mas_batch.latency.phases import ALL
from mas_batch.planning.planned import AgentForecast, Option, Planned, Range

_SPACING = 0.98
"""Of the shorter and the shorter time: allocations between are left to `--json`."""


def to_json(planned: Planned) -> dict[str, Any]:
    """Return the plan as plain data; `total_memory_bytes` is of all replicas of the job."""
    return {**asdict(planned), "total_memory_bytes": _memory(planned.agents)}


def print_plan(out: Console, planned: Planned) -> None:
    """Print a plan: how long, what for, what it waits for, and what other settings would do."""
    own = planned.own
    out.print(Text.assemble((planned.job, "bold"), f": {_corpus(planned)}"))
    cost = f" (took {duration(planned.measuring_s)})" if planned.measuring_s else ""
    out.print(Text(f"measured: {planned.source}{cost}", style="dim"))
    out.print()
    out.print(Text.assemble(("expected: ", ""), (_range(own.duration), "bold green")))
    out.print(Text(f"  {_phases(planned.phases)}", style="dim"))
    out.print()
    out.print(_agents(planned.agents))
    out.print()
    out.print(_times(planned.agents))
    total = _memory(planned.agents)
    if total is not None:
        out.print(Text(f"memory at the peak, all replicas: {_bytes(total)}"))
    out.print(Text.assemble("bottleneck: ", (planned.bottleneck.what, "yellow")))
    out.print(Text(f"  what would help: {planned.bottleneck.help}"))
    _print_options(out, "Replicas", _replicas, _spaced(planned.allocations, own), own)
    _print_options(out, "Size of partitions", _size, planned.sizes, own)
    if _differ(planned.policies):
        _print_options(out, "Policy", lambda option: option.policy, planned.policies, own)
    _print_recommendation(out, planned)
    for note in planned.notes:
        out.print(Text(f"taken for granted: {note}", style="dim"))


def duration(seconds: float) -> str:
    """Write seconds for people: 4.2 s, 73 s, 12 min, 3 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _corpus(planned: Planned) -> str:
    unusable = planned.num_records - planned.num_usable
    left_out = f" ({unusable:,} unusable)" if unusable else ""
    own = planned.own
    return (
        f"{planned.num_records:,} records{left_out} in {own.num_partitions:,} partitions, "
        f"{own.total} replicas, routed by {own.policy}"
    )


def _range(found: Range) -> str:
    low, high = duration(found.p10_s), duration(found.p90_s)
    return f"{duration(found.median_s)} (eight of ten: {low} to {high})"


def _phases(phases: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {duration(phases[name])}" for name in ALL if phases.get(name))


def _agents(agents: Iterable[AgentForecast]) -> Table:
    table = _table(("Agent", "answers", "failed", "prompt tokens", "new tokens"))
    for agent in agents:
        counts = (agent.answers, agent.failed_answers, agent.prompt_tokens, agent.completion_tokens)
        table.add_row(Text(agent.agent_id), *(f"{count:,}" for count in counts))
    return table


def _times(agents: Iterable[AgentForecast]) -> Table:
    table = _table(("Agent", "replicas", "busy", "memory", "compute", "transfer", "processing"))
    for agent in agents:
        seconds = (agent.compute_s, agent.transfer_s, agent.processing_s)
        table.add_row(
            Text(agent.agent_id),
            str(agent.replicas),
            f"{agent.busy_fraction:.0%}",
            "–" if agent.memory_bytes is None else _bytes(agent.memory_bytes),
            *(duration(spent) for spent in seconds),
        )
    return table


def _memory(agents: Sequence[AgentForecast]) -> int | None:
    known = [a.memory_bytes * a.replicas for a in agents if a.memory_bytes is not None]
    return sum(known) if len(known) == len(agents) else None


def _print_options(
    out: Console, title: str, name: Any, options: Iterable[Option], own: Option
) -> None:
    table = _table((title, "partitions", "expected", "eight of ten"))
    for option in options:
        is_own = _settings(option) == _settings(own)
        low, high = duration(option.duration.p10_s), duration(option.duration.p90_s)
        table.add_row(
            Text(name(option) + (" (the job's)" if is_own else "")),
            f"{option.num_partitions:,}",
            duration(option.duration.median_s),
            f"{low} to {high}",
            style="bold" if is_own else None,
        )
    out.print()
    out.print(table)


def _print_recommendation(out: Console, planned: Planned) -> None:
    found = planned.recommendation
    option, own = found.option, planned.own
    changes = []
    if option.max_records != own.max_records or option.max_tokens != own.max_tokens:
        changes.append(f"--set partition.max_records={option.max_records}")
        changes.append(f"--set partition.max_tokens={option.max_tokens}")
    changes += [
        f"--set agents.{name}.count={count}"
        for name, count in option.replicas.items()
        if count != own.replicas[name]
    ]
    style = "bold yellow" if found.meets_deadline is False else "bold green"
    out.print()
    out.print(Text.assemble("recommended: ", (_range(option.duration), style), f"; {found.why}"))
    out.print(Text(f"  {' '.join(changes) or 'leave the job as it is'}"), soft_wrap=True)


def _spaced(options: Iterable[Option], own: Option) -> list[Option]:
    """Leave out allocations that are hardly faster than fewer replicas, but for the job's own."""
    shown: list[Option] = []
    for option in options:
        fastest_s = min((o.duration.median_s for o in shown), default=float("inf"))
        if option.duration.median_s < _SPACING * fastest_s or option.replicas == own.replicas:
            shown.append(option)
    if all(option.replicas != own.replicas for option in shown):
        shown.append(own)
    return sorted(shown, key=lambda option: option.total)


def _replicas(option: Option) -> str:
    return ", ".join(f"{name} {count}" for name, count in option.replicas.items())


def _size(option: Option) -> str:
    return f"{option.max_records:,} records, {option.max_tokens:,} tokens"


def _settings(option: Option) -> tuple[Any, ...]:
    return (dict(option.replicas), option.max_records, option.max_tokens, option.policy)


def _differ(options: Sequence[Option]) -> bool:
    """Whether the choice among these matters."""
    medians = [option.duration.median_s for option in options]
    return min(medians) < _SPACING * max(medians)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _table(header: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    return table
