"""Faults from inside: Dask preloads this file into the processes of a run under test.

The plan comes in the environment as JSON: `fault`, `folder` (for markers: what shall happen
once happens in one process, once) and whatever the fault needs. What happens is real: signals,
memory, exceptions where a model or a disk would raise them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import Scheduler, Worker

from mas_batch.agents import host, work
from mas_batch.errors import EngineError, ModelError

PLAN = json.loads(os.environ.get("MAS_BATCH_CHAOS", "{}"))


def once(name: str) -> bool:
    """Whether this is the first process and time to ask; the marker also tells the test."""
    try:
        (Path(PLAN["folder"]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around_report(before: bool) -> None:
    """Die just before or just after the report of the planned number of answers is sent."""
    send, seen = host.report, 0

    def report(topic: str, task: str, facts: Any) -> None:
        nonlocal seen
        seen += task == "answer_partition"
        due = task == "answer_partition" and seen >= PLAN["after"]
        if due and before and once("fired"):
            die()
        send(topic, task, facts)
        if due and not before:
            time.sleep(0.05)  # the batched stream sends every few milliseconds
            if once("fired"):
                die()

    host.report = report


def in_answers(act: Callable[[], None]) -> None:
    """Act once, in the middle of the planned number of partitions."""
    ask, seen = work.answer_records, 0

    def answer_records(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen >= PLAN["after"] and once("fired"):
            act()
        return ask(*args)

    work.answer_records = answer_records


def hang() -> None:
    while True:
        time.sleep(60)


def eat_memory() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1 << 20)) * 32)
        time.sleep(0.02)


def failing_worker(worker: Worker) -> None:
    """One host fails fast on everything, the first few times or for good."""
    if worker.name != PLAN["worker"]:
        return
    ask, num_failed = work.answer_records, 0

    def answer_records(*args: Any) -> Any:
        nonlocal num_failed
        if num_failed < PLAN["times"]:
            num_failed += 1
            once("fired")
            raise EngineError("this worker's engine is broken")
        return ask(*args)

    work.answer_records = answer_records


def unloadable_worker(worker: Worker) -> None:
    """One host cannot load its model."""
    if worker.name != PLAN["worker"]:
        return

    def load_engine(*args: Any) -> Any:
        once("fired")
        raise ModelError("the weights on this worker are damaged")

    host.load_engine = load_engine


async def act_on_scheduler(scheduler: Scheduler) -> None:
    """At the planned moment of the run take a busy worker away, or all it knows."""
    rng = random.Random(PLAN["seed"])

    def busy_ones() -> list[str]:
        return sorted(
            address
            for address, ws in scheduler.workers.items()
            if ws.processing and str(ws.name).startswith(PLAN["agent"])
        )

    while not busy_ones():
        await asyncio.sleep(0.05)
    await asyncio.sleep(PLAN["delay_s"])
    while not (busy := busy_ones()):  # between two partitions
        await asyncio.sleep(0.002)
    if not once("fired"):
        return
    chosen = [rng.choice(busy)]
    if PLAN["fault"] == "retire":
        await scheduler.retire_workers(workers=chosen, stimulus_id="chaos")
    else:
        await scheduler.restart_workers(chosen, stimulus_id="chaos", on_error="return")


async def dask_setup(node: Worker | Scheduler) -> None:
    match PLAN.get("fault"), node:
        case (("retire" | "restart"), Scheduler()):
            node.chaos = asyncio.create_task(act_on_scheduler(node))
        case "kill-before-report", Worker():
            around_report(before=True)
        case "kill-after-report", Worker():
            around_report(before=False)
        case "kill-during-compute", Worker():
            in_answers(die)
        case "hang", Worker():
            in_answers(hang)
        case "memory", Worker():
            in_answers(eat_memory)
        case "fail-fast", Worker():
            failing_worker(node)
        case "fail-to-load", Worker():
            unloadable_worker(node)
