"""What people and logs see of a run."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from mas_batch.monitor.events import (
    AgentLost,
    AgentReady,
    AnswerFailed,
    PartitionAnswered,
    PartitionMerged,
    RunStarted,
)
from mas_batch.monitor.progress import Bar, LogLines, Throughput

STARTED = RunStarted("runs/x-1", 4, 40, 1, 10, 2, 3, ("x-0",), "http://127.0.0.1:8787/status")
READY = AgentReady("plain", "plain-0", 1.5)
ANSWERED = PartitionAnswered(1, "plain", "plain-0", 1, 10, 10, 0, 900, 300, 2.0, 0.1, 0.1)
MERGED = PartitionMerged(1, 9, 1)
FAILED = AnswerFailed(2, "plain", "plain-0", 1, "cannot open [/data/x.gguf]", given_up=False)
LOST = AgentLost("plain", "plain-0", "[Errno 2] no such [file]")


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


def test_log_lines_are_few_and_quoted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mas_batch.run")
    read = LogLines(every_s=0.0)
    for event in (STARTED, READY, ANSWERED, MERGED, FAILED):
        read(event)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == [
        "event=run_started",
        "event=agent_ready",
        "event=progress",
        "event=answer_failed",
    ]
    assert "records=20/40" in lines[2]
    assert 'message="cannot open [/data/x.gguf]"' in lines[3]


def test_throughput_of_nothing_is_nothing() -> None:
    assert Throughput().per_second(5) == 0.0
