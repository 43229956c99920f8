"""Readers of a run's events: a bar for people, log lines for machines."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mas_batch.events import (
    AnswerFailed,
    AnswersReused,
    BreakerChanged,
    Escalated,
    EscalationSampled,
    Event,
    HostDraining,
    HostLost,
    HostReady,
    HostsScaled,
    Learned,
    PartitionAnswered,
    PartitionMerged,
    PartitionUndecided,
    RunFinished,
    RunStarted,
    ServerAway,
)
from mas_batch.safe_text import printable

logger = logging.getLogger("mas_batch.run")


class Throughput:
    """Counts what one execution did, for the line of totals."""

    def __init__(self) -> None:
        self.records = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.undecided = 0
        """Times that one more agent was asked about a record."""
        self._start: float | None = None
        self._last = 0.0
        self._counts_records = True

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        now = time.monotonic()
        match event:
            case HostReady():
                self._start = self._start or now
            case PartitionAnswered():
                self.prompt_tokens += event.prompt_tokens
                self.completion_tokens += event.completion_tokens
                self._last = now
            case PartitionUndecided():
                self.undecided += event.num_undecided
            case Escalated() | EscalationSampled():
                self._counts_records = False  # all have been counted: what comes is a second pass
            case PartitionMerged():
                self.records += (event.num_results + event.num_failures) * self._counts_records
                self._last = now

    @property
    def answering_s(self) -> float:
        """Seconds from the first agent that was ready to the last answer or merge."""
        return max(0.0, self._last - self._start) if self._start else 0.0

    def per_second(self, count: int) -> float:
        """Rate of a count over the time of answering."""
        return count / self.answering_s if self.answering_s > 0 else 0.0


class Bar:
    """A line for the whole run and one per agent; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} records"),
            TextColumn("{task.fields[rate]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._throughput = Throughput()
        self._total: TaskID | None = None
        self._num_records = 0
        self._agents: dict[str, TaskID] = {}
        self._agent_tokens: Counter[str] = Counter()
        self._agent_compute_s: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._throughput(event)
        match event:
            case RunStarted():
                self._started(event)
            case Escalated() | EscalationSampled():
                self._escalated(event)
            case PartitionAnswered():
                self._answered(event)
            case PartitionMerged() if self._total is not None:
                rate = self._throughput.per_second(self._throughput.completion_tokens)
                undecided = self._throughput.undecided
                self._progress.update(
                    self._total,
                    advance=event.num_results + event.num_failures,
                    rate=f"{rate:.0f} tok/s" + (f", {undecided} asked further" * bool(undecided)),
                )
            case _ if line := sentence(event):
                self._console.log(line)

    def _started(self, event: RunStarted) -> None:
        for run in event.earlier_runs:
            self._console.log(f"the job or its corpus changed since run {run}: this is a new run")
        if event.partitions_done or event.answers_done:
            self._console.log(
                f"resuming: {event.partitions_done} of {event.num_partitions} partitions merged, "
                f"{event.answers_done} more partition answers are kept"
            )
        if event.dashboard_link:
            self._console.log(f"dashboard: {event.dashboard_link}")
        self._num_records = event.num_records
        self._total = self._progress.add_task(
            "merged", total=event.num_records, completed=event.records_done, rate=""
        )

    def _escalated(self, event: Escalated | EscalationSampled) -> None:
        self._console.log(_escalation(event))
        what = "escalated" if isinstance(event, Escalated) else "sampled"
        self._total = self._progress.add_task(what, total=event.num_records, rate="")
        self._add_agent(event.agent_id, event.num_records)

    def _answered(self, event: PartitionAnswered) -> None:
        self._agent_tokens[event.agent_id] += event.completion_tokens
        self._agent_compute_s[event.agent_id] += event.compute_s
        if event.agent_id not in self._agents:
            self._add_agent(event.agent_id, self._num_records)
        rate = self._agent_tokens[event.agent_id] / max(1e-9, self._agent_compute_s[event.agent_id])
        self._progress.update(
            self._agents[event.agent_id], advance=event.num_records, rate=f"{rate:.0f} tok/s"
        )

    def _add_agent(self, agent_id: str, total: int) -> None:
        self._agents[agent_id] = self._progress.add_task(f"  {agent_id}", total=total, rate="")


def _escalation(event: Escalated | EscalationSampled) -> str:
    of = f"{event.num_records:,} of {event.num_records_of_all:,} records"
    if isinstance(event, EscalationSampled):
        return (
            f"{event.agent_id} is asked about a sample, {of}, to find which it must be asked about"
        )
    share = event.num_records / max(1, event.num_records_of_all)
    line = f"{event.agent_id} is asked about the least confident {of} ({share:.1%})"
    return f"{line}: {event.why}" if event.why else line


def sentence(event: Event) -> str | None:
    """Return what people read of an event, in rich's markup; None if it is not worth a line."""
    match event:
        case AnswersReused(None):
            return "since last: there is no earlier run, so the agents are asked about every record"
        case AnswersReused(run, records, answers, refused):
            whys = [
                f"\n[yellow]{a} is asked about every record: {_safe(w)}" for a, w in refused.items()
            ]
            reused = _listed({**records, "reused answers": sum(answers.values())})
            return f"since {run}: {reused}{''.join(whys)}"
        case HostReady(worker, agents, load_s, engine):
            ready = f"{', '.join(agents)} ready on {_safe(worker)} ({load_s:.1f} s)"
            return ready + _loud(engine.get("warnings", ()))
        case HostLost(worker, agents, message):
            return f"[yellow]{', '.join(agents)} on {_safe(worker)}: {_safe(message)}"
        case HostDraining(worker, agents, message):
            return (
                f"{', '.join(agents)} on {_safe(worker)} is asked nothing further: {_safe(message)}"
            )
        case BreakerChanged(agent_id, worker, state, message):
            style = "green" if state == "closed" else "yellow"
            return f"[{style}]{agent_id} on {_safe(worker)}, breaker {state}: {_safe(message)}"
        case ServerAway():
            so_far = f" ({event.away_s:.0f} s so far)" if event.away_s else ""
            return (
                f"[yellow]{event.agent_id} on {_safe(event.worker)} waits for its server{so_far}: "
                f"{_safe(event.message)}; asked again in {event.again_in_s:.0f} s, "
                f"given up after {event.wait_s:g} s"
            )
        case Learned(method, weights, why, warnings):
            each = ", ".join(f"{agent} {weight:.3f}" for agent, weight in weights.items())
            learned = f"{method} has learned: {_safe(each)}{'; ' if each else ''}{_safe(why)}"
            return learned + _loud(warnings)
        case HostsScaled(wanted, backlog):
            return f"hosts wanted: {_listed(wanted)} (partitions to do: {_listed(backlog)})"
        case AnswerFailed(partition, agent_id, worker, attempt, message, given_up):
            which = f"partition {partition}, {agent_id} on {_safe(worker)}, attempt {attempt}"
            what = "given up" if given_up else "asked again"
            return f"[yellow]{which}: {_safe(message)}; {what}"
    return None


def _loud(warnings: Iterable[str]) -> str:
    return "".join(f"\n[bold red]{_safe(warning)}[/]" for warning in warnings)


def _safe(text: str) -> str:
    """Make the words of a library or a model safe for the console: no markup, no escapes."""
    return escape_markup(printable(text))


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{agent_id} {number}" for agent_id, number in numbers.items())


class LogLines:
    """Quiet `key=value` lines: what matters, and a sign of life every `every_s` seconds."""

    def __init__(self, every_s: float = 30.0) -> None:
        self._every_s = every_s
        self._last = time.monotonic()
        self._throughput = Throughput()
        self._records = (0, 0)

    def __call__(self, event: Event) -> None:
        """Log an event, if it is worth a line."""
        self._throughput(event)
        match event:
            case RunStarted():
                self._records = (event.records_done, event.num_records)
                _log(
                    "run_started",
                    run=event.run,
                    records=event.num_records,
                    partitions=event.num_partitions,
                    partitions_done=event.partitions_done,
                    earlier_runs=",".join(event.earlier_runs),
                    dashboard=event.dashboard_link,
                )
            case AnswersReused(run, records, answers, refused):
                whys = "; ".join(f"{agent}: {why}" for agent, why in refused.items())
                _log("since_last", run=run, reused=sum(answers.values()), refused=whys, **records)
            case HostReady(worker, agents, load_s, engine):
                which = {"agents": ",".join(agents), "worker": worker, "load_s": round(load_s, 2)}
                _log("host_ready", **which, warnings=" ".join(engine.get("warnings", ())))
            case HostLost(worker, agents, message):
                _log("host_lost", agents=",".join(agents), worker=worker, message=message)
            case HostDraining(worker, agents, message):
                _log("host_draining", agents=",".join(agents), worker=worker, message=message)
            case BreakerChanged(agent_id, worker, state, message):
                _log("breaker", agent=agent_id, worker=worker, state=state, message=message)
            case ServerAway(_, agent_id, worker, message, away_s, again_in_s, wait_s):
                seconds = {"away_s": round(away_s), "again_in_s": round(again_in_s)}
                _log(
                    "server_away",
                    **{"agent": agent_id, "worker": worker, **seconds},
                    wait_s=wait_s,
                    message=message,
                )
            case HostsScaled(wanted, backlog):
                _log("hosts_scaled", wanted=_listed(wanted), backlog=_listed(backlog))
            case AnswerFailed(partition, agent_id, worker, attempt, message, given_up):
                which = {"partition": partition, "agent": agent_id, "worker": worker}
                _log("answer_failed", **which, attempt=attempt, given_up=given_up, message=message)
            case Learned(method, weights, why, warnings):
                _log("learned", method=method, why=why, warnings=" ".join(warnings), **weights)
            case EscalationSampled(agent_id, num_records, num_of_all):
                _log("escalation_sampled", agent=agent_id, records=f"{num_records}/{num_of_all}")
            case Escalated(agent_id, num_records, num_of_all, why):
                _log("escalated", agent=agent_id, records=f"{num_records}/{num_of_all}", why=why)
            case RunFinished():
                _log(
                    "run_finished",
                    results=event.num_results,
                    failures=event.num_failures,
                    undecided=self._throughput.undecided or None,
                    wall_s=round(event.wall_s, 1),
                )
            case PartitionMerged() if time.monotonic() - self._last > self._every_s:
                self._last = time.monotonic()
                done = self._records[0] + self._throughput.records
                tokens = self._throughput.completion_tokens
                _log(
                    "progress",
                    records=f"{done}/{self._records[1]}",
                    undecided=self._throughput.undecided or None,
                    tokens_per_s=round(self._throughput.per_second(tokens), 1),
                )


def _log(event: str, **facts: Any) -> None:
    words = (f"{key}={_quoted(value)}" for key, value in facts.items() if value not in (None, ""))
    logger.info("event=%s %s", event, " ".join(words))


def _quoted(value: Any) -> str:
    text = printable(str(value))
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ' "=\n') else text
