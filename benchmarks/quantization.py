"""What fewer bits save and cost: memory, speed, perplexity and answers of one model.

    python benchmarks/quantization.py [--documents 24] [--new-tokens 48] [--ways fp32 bf16 int8]

Each way is loaded by a process of its own. `weights`: bytes of all tensors of the model. `private`:
what the process has of its own after the load, more than before it: weights of a mapped file are
not among it, packed ones are. `prefill`: prompts read per second, of all documents with one new
token each. `decode`: the tokens after those. `perplexity`: of the documents' first 256 tokens.
`changed`: answers that are not word for word those of the first way. `int8-module` is int8 by
torchao's own module, which is what runs where weights are not packed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from decoding import make_requests, stepped
from documents import MODEL

from mas_batch.engines import load_engine
from mas_batch.engines.base import EngineConfig, Sampling
from mas_batch.engines.transformers.perplexity import Passage
from mas_batch.models import fetch

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int8-bf16": {"quantize": "int8", "dtype": "bfloat16"},
    "fp32-module": {"options": {"pack_weights": False}},
    "int8-module": {"quantize": "int8", "options": {"pack_weights": False}},
}
PERPLEXITY_TOKENS = 256


def weights_bytes(model: Any) -> int:
    """Return the bytes of a model's tensors, each counted once."""
    parts: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        names = ("qdata", "scale") if hasattr(tensor, "qdata") else ()
        for part in [getattr(tensor, name) for name in names] or [tensor]:
            parts[part.data_ptr()] = part.numel() * part.element_size()
    return sum(parts.values())


def private_bytes() -> int:
    """Return anonymous memory in use: that of files is shared with other processes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    model, before, start = fetch(MODEL), private_bytes(), time.perf_counter()
    engine: Any = load_engine(
        "transformers", model, EngineConfig(device="cpu", threads=options.threads, **WAYS[way])
    )
    load_s = time.perf_counter() - start
    requests = make_requests(engine, options.documents)
    facts = {
        "load_s": load_s,
        "weights_bytes": weights_bytes(engine._model),
        "private_bytes": private_bytes() - before,
    }
    clock = time.perf_counter
    stepped(engine, requests[:2], Sampling(4), clock)
    read_s, _ = stepped(engine, requests, Sampling(1), clock)
    whole_s, answers = stepped(engine, requests, Sampling(options.new_tokens), clock)
    tokens = [list(r.tokenized.tokens) for r in requests if r.tokenized]
    asked = [Passage(own[:PERPLEXITY_TOKENS]) for own in tokens]
    return facts | {
        "prefill": sum(map(len, tokens)) / read_s,
        "decode": sum(len(answer) - 1 for answer in answers) / (whole_s - read_s),
        "perplexity": engine.perplexity(asked),
        "check": engine.describe().get("perplexity"),
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["fp32", "bf16", "int8"])
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    print(f"torch {torch.__version__}, {options.threads} threads, {options.documents} documents")
    print("| way | weights MB | private MB | load s | prefill tok/s | decode tok/s | perplexity "
          "| answers changed |")  # fmt: skip
    print("|---" * 8 + "|")
    first: list[list[int]] | None = None
    for way in options.ways:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--only", way]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        facts = json.loads(out.splitlines()[-1])
        first = first or facts["answers"]
        changed = sum(a != b for a, b in zip(facts["answers"], first, strict=True))
        row = [
            f"{facts['weights_bytes'] / 1e6:.0f}",
            f"{facts['private_bytes'] / 1e6:.0f}",
            f"{facts['load_s']:.1f}",
            f"{facts['prefill']:.0f}",
            f"{facts['decode']:.1f}",
            f"{facts['perplexity']:.3f}",
            f"{changed} of {len(first)}",
        ]
        print(f"| {way} | {' | '.join(row)} |", flush=True)
        if facts["check"]:
            print(f"<!-- check at load: {facts['check']} -->", flush=True)


if __name__ == "__main__":
    main()
