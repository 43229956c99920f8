"""The plan command's options, and a plan as a terminal shows it and as programs read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dask.utils import parse_timedelta
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mas_batch.errors import JobError
from mas_batch.latency.phases import ALL
from mas_batch.planning.prediction import (
    AgentPrediction,
    Allocation,
    HostsPrediction,
    RunPrediction,
)
from mas_batch.terminal import plain_table

_FASTER = 0.98
"""An allocation that takes more than this share of a smaller one's time is left to `--json`."""


def parse_deadline(text: str) -> float:
    """Return seconds.

    Raises:
        JobError: it is not a time above 0.
    """
    try:
        seconds = float(parse_timedelta(text, default="s"))
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise JobError(f"{text!r} is not a time; allowed: such as 2h, 90m, 3600", key="--deadline")
    return seconds


def parse_hosts(text: str) -> tuple[int, int]:
    """Return the fewest and the most.

    Raises:
        JobError: it is not one number or two, at least 1, the smaller first.
    """
    match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most <= 4096:
        raise JobError(
            f"{text!r} is not allowed; allowed: such as 4 or 1-8, at most 4096", key="--hosts"
        )
    return fewest, most


def to_json(found: RunPrediction) -> dict[str, Any]:
    """Return the plan as plain data; `total_memory_bytes` is of all hosts of the job."""
    return {**asdict(found), "total_memory_bytes": _memory(found.posts)}


def print_plan(out: Console, found: RunPrediction) -> None:
    """Print a plan: how long, what for, what it waits for, and what other hosts would do."""
    out.print(Text.assemble((found.job, "bold"), f": {_corpus(found)}"))
    cost = f" (took {_duration(found.measuring_s)})" if found.measuring_s else ""
    out.print(Text(f"measured: {found.source}{cost}", style="dim"))
    out.print()
    out.print(Text.assemble("expected: ", (_duration(found.own.duration_s), "bold green")))
    out.print(Text(f"  {_phases(found.phases)}", style="dim"))
    out.print(
        Text(
            f"  predictions in benchmarks were off by {found.median_error:.0%} in the median, by "
            f"{found.worst_error:.0%} at worst",
            style="dim",
        )
    )
    out.print()
    out.print(_agents(found.agents))
    out.print()
    out.print(_posts(found.posts))
    total = _memory(found.posts)
    if total is not None:
        out.print(Text(f"memory at the peak, all hosts: {_bytes(total)}"))
    out.print(Text.assemble("bottleneck: ", (found.bottleneck.what, "yellow")))
    out.print(Text(f"  what would help: {found.bottleneck.help}"))
    out.print()
    out.print(_allocations(found))
    _print_recommendation(out, found)
    for note in found.notes:
        out.print(Text(f"taken for granted: {note}", style="dim"))


def _duration(seconds: float) -> str:
    """Write seconds for people: 4.2 s, 73 s, 12 min, 3 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _corpus(found: RunPrediction) -> str:
    unusable = found.num_records - found.num_usable
    left_out = f" ({unusable:,} unusable)" if unusable else ""
    return (
        f"{found.num_records:,} records{left_out} in {found.num_partitions:,} partitions, "
        f"{found.own.total} hosts, routed by {found.policy}"
    )


def _phases(phases: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_duration(phases[name])}" for name in ALL if phases.get(name))


def _agents(agents: Iterable[AgentPrediction]) -> Table:
    columns = ("answers", "failed", "prompt tokens", "new tokens")
    table = plain_table(("Agent", *columns, "compute", "transfer", "processing"))
    for agent in agents:
        counts = (agent.answers, agent.failed_answers, agent.prompt_tokens, agent.completion_tokens)
        seconds = (agent.compute_s, agent.transfer_s, agent.processing_s)
        table.add_row(
            Text(agent.agent_id), *(f"{count:,}" for count in counts), *map(_duration, seconds)
        )
    return table


def _posts(posts: Iterable[HostsPrediction]) -> Table:
    """Show hosts once for all agents that share them."""
    table = plain_table(("Hosts of", "hosts", "busy", "memory each", "each worker declares"))
    table.columns[-1].justify = "left"
    for post in posts:
        table.add_row(
            Text(", ".join(post.agents)),
            str(post.hosts),
            f"{post.busy_fraction:.0%}",
            "–" if post.memory_bytes is None else _bytes(post.memory_bytes),
            Text(", ".join(f"{name}={amount:g}" for name, amount in post.needs.items())),
        )
    return table


def _memory(posts: Sequence[HostsPrediction]) -> int | None:
    """Return the memory of all hosts."""
    total = 0
    for post in posts:
        if post.memory_bytes is None:
            return None
        total += post.memory_bytes * post.hosts
    return total


def _allocations(found: RunPrediction) -> Table:
    """Show the allocations that are clearly faster than smaller ones, and the job's own."""
    faster: list[Allocation] = []
    for option in found.allocations:
        if not faster or option.duration_s < _FASTER * faster[-1].duration_s:
            faster.append(option)
    others = [option for option in faster if option.hosts != found.own.hosts]
    table = plain_table(("Hosts", "expected"))
    for option in sorted([*others, found.own], key=lambda option: option.total):
        is_own = option is found.own
        numbers = ", ".join(f"{name} {count}" for name, count in option.hosts.items())
        table.add_row(
            Text(numbers + (" (the job's)" if is_own else "")),
            _duration(option.duration_s),
            style="bold" if is_own else None,
        )
    return table


def _print_recommendation(out: Console, found: RunPrediction) -> None:
    recommended = found.recommendation
    if recommended is None:
        return
    option = recommended.allocation
    changes = [
        f"--set agents.{agent.agent_id}.count={option.hosts[agent.post]}"
        for agent in found.agents
        if option.hosts[agent.post] != found.own.hosts[agent.post]
    ]
    style = "bold green" if recommended.meets_deadline else "bold yellow"
    expected = (_duration(option.duration_s), style)
    out.print()
    out.print(Text.assemble("recommended: ", expected, f"; {recommended.why}"))
    out.print(Text(f"  {' '.join(changes) or 'leave the job as it is'}"), soft_wrap=True)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
