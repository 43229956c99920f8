"""What a run has reused of an earlier run, read from its manifest: as facts, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def since_facts(manifest: Mapping[str, Any], *, nothing_new: bool = False) -> dict[str, Any] | None:
    """Return what was reused and what was asked; None: the run did not look for an earlier run.

    Args:
        nothing_new: the run was complete before the command: all its answers count as reused.
    """
    agents = {agent["agent_id"]: agent for agent in manifest["agents"]}
    given = {a: each["answers"] + each["failed_answers"] for a, each in agents.items()}
    if nothing_new:
        return {
            "nothing_new": True,
            "run": manifest["run"],
            "reused_answers": sum(given.values()),
            "asked_answers": 0,
        }
    if (since := manifest.get("since")) is None:
        return None
    reused = {a: each.get("reused", 0) for a, each in agents.items()}
    return {
        "nothing_new": False,
        "run": since["run"],
        "reused_answers": sum(reused.values()),
        "asked_answers": sum(given.values()) - sum(reused.values()),
        "records": since["records"],
        "agents": {a: {"reused": reused[a], "asked": given[a] - reused[a]} for a in agents},
        "refused": since["refused"],
    }


def since_lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the facts as lines for people; no line if the run did not look for an earlier run."""
    facts = since_facts(manifest)
    if facts is None:
        return
    if facts["run"] is None:
        yield "since last: there was no earlier run, every record was asked about"
        return
    records = facts["records"]
    what = "failures retried of" if manifest["since"].get("is_retry") else "since"
    yield (
        f"{what} {facts['run']}: {facts['reused_answers']:,} answers reused, "
        f"{facts['asked_answers']:,} asked for; records: {in_words(records)}"
    )
    for agent_id, why in facts["refused"].items():
        yield f"of {agent_id} nothing was reused: {why}"


def in_words(counts: Mapping[str, int]) -> str:
    """Write counts as `2 new, 1 gone`, in the mapping's order."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
