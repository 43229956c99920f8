"""What people and logs see of a run."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from mas_batch.events import (
    AnswerFailed,
    BreakerChanged,
    HostDraining,
    HostLost,
    HostReady,
    HostsScaled,
    PartitionAnswered,
    PartitionMerged,
    PartitionUndecided,
    RunFinished,
    RunStarted,
    ServerAway,
)
from mas_batch.monitor.progress import Bar, LogLines, Throughput

STARTED = RunStarted("runs/x-1", 4, 40, 1, 10, 2, 3, ("x-0",), "http://127.0.0.1:8787/status")
READY = HostReady("plain-0", ("plain",), 1.5)
ANSWERED = PartitionAnswered(1, "plain", "plain-0", 1, 10, 10, 0, 900, 300, compute_s=2.0)
MERGED = PartitionMerged(1, 9, 1)
FAILED = AnswerFailed(2, "plain", "plain-0", 1, "cannot open [/data/x.gguf]", given_up=False)
LOST = HostLost("plain-0", ("plain",), "[Errno 2] no such [file]")
ROUTING = (
    HostDraining("plain-0", ("plain",), "the worker's status is 'paused'"),
    BreakerChanged("plain", "plain-1", "open", "3 failures in a row; no [file]"),
    ServerAway(3, "plain", "plain-0", "http://x/v1: [refused]", 4.2, 8.0, 600.0),
    HostsScaled({"plain": 4, "large": 1}, {"plain": 9, "large": 0}),
    PartitionUndecided(1, 6, 10),
)


def test_the_bar_shows_records_rate_and_every_agent() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=130, color_system=None)
    with Bar(console) as bar:
        for event in (STARTED, READY, ANSWERED, MERGED, FAILED, LOST):
            bar(event)
    text = screen.getvalue()
    assert "this is a new run" in text
    assert "1 of 4 partitions merged" in text
    assert "http://127.0.0.1:8787/status" in text
    assert "20/40 records" in text
    assert "10/40 records" in text
    assert "150 tok/s" in text  # of the agent: 300 tokens in 2 s of model time
    assert "cannot open [/data/x.gguf]; asked again" in text, "a message is not markup"
    assert "[Errno 2] no such [file]" in text


def test_the_bar_tells_of_workers_and_counts_the_undecided() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=180, color_system=None)
    with Bar(console) as bar:
        for event in (STARTED, READY, *ROUTING, MERGED):
            bar(event)
    text = screen.getvalue()
    assert "plain on plain-0 is asked nothing further: the worker's status is 'paused'" in text
    assert "plain on plain-1, breaker open: 3 failures in a row; no [file]" in text
    assert "plain on plain-0 waits for its server (4 s so far): http://x/v1: [refused]; " in text
    assert "asked again in 8 s, given up after 600 s" in text
    assert "hosts wanted: plain 4, large 1 (partitions to do: plain 9, large 0)" in text
    assert "6 asked further" in text
    assert "undecided" not in text, "what is counted needs no line"


def test_log_lines_tell_of_workers_and_count_the_undecided(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mas_batch.run")
    read = LogLines()
    for event in (*ROUTING, RunFinished(9, 1, 2.0)):
        read(event)
    assert [record.getMessage() for record in caplog.records] == [
        "event=host_draining agents=plain worker=plain-0 "
        "message=\"the worker's status is 'paused'\"",
        "event=breaker agent=plain worker=plain-1 state=open "
        'message="3 failures in a row; no [file]"',
        "event=server_away agent=plain worker=plain-0 away_s=4 again_in_s=8 wait_s=600.0 "
        'message="http://x/v1: [refused]"',
        'event=hosts_scaled wanted="plain 4, large 1" backlog="plain 9, large 0"',
        "event=run_finished results=9 failures=1 undecided=6 wall_s=2.0",
    ]


def test_log_lines_are_few_and_quoted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mas_batch.run")
    read = LogLines(every_s=0.0)
    for event in (STARTED, READY, ANSWERED, MERGED, FAILED):
        read(event)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == [
        "event=run_started",
        "event=host_ready",
        "event=progress",
        "event=answer_failed",
    ]
    assert "records=20/40" in lines[2]
    assert 'message="cannot open [/data/x.gguf]"' in lines[3]


def test_throughput_of_nothing_is_nothing() -> None:
    assert Throughput().per_second(5) == 0.0
