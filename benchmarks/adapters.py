"""What adapters cost: the same documents with none, one and two of them on one engine.

    python benchmarks/adapters.py [--rank 16] [--documents 32] [--rounds 3] [--threads 2]

The adapters are random and of all linear layers of SmolLM2-135M. `two` gives every other document
the one and the rest the other, so that each step has rows of both; `half` gives one to every other.
Medians of tokens per second; rounds take turns. The texts differ, so new tokens are forced to be as
many: no end token ends a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decoding import load, make_requests, stepped
from safetensors.torch import save_file

from mas_batch.engines.base import Sampling
from mas_batch.models import fetch

WAYS: dict[str, tuple[str | None, ...]] = {
    "none": (None,),
    "one": ("a",),
    "two": ("a", "b"),
    "half": ("a", None),
}
"""Adapters of the documents, in turn."""


def write_adapter(folder: Path, model: Any, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
            for side, shape in shapes.items():
                weight = torch.randn(shape, generator=generator) * 0.01
                weights[f"base_model.model.{name}.lora_{side}.weight"] = weight
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rank", 16), ("documents", 32), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args(arguments)
    engine = load("float32", options.threads, packed=True)
    engine._special = replace(engine._special, end=frozenset())
    engine.drop()
    for seed, name in enumerate("ab"):
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), engine._model, options.rank, seed)
            start = time.perf_counter()
            engine.add_adapter(name, fetch(folder))
            print(f"adapter {name} added in {time.perf_counter() - start:.2f} s")
    requests = make_requests(engine, options.documents)
    sampling = Sampling(options.new_tokens)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, names in WAYS.items():
            asked = [replace(r, adapter=names[i % len(names)]) for i, r in enumerate(requests)]
            seconds, found = stepped(engine, asked, sampling, time.perf_counter)
            rates[way].append(sum(map(len, found)) / seconds)
    none = statistics.median(rates["none"])
    for way, each in rates.items():
        rate = statistics.median(each)
        rounds = ", ".join(f"{one:.1f}" for one in each)
        print(f"{way:5} {rate:6.1f} tokens/s, {rate / none:.2f} of none ({rounds})")


if __name__ == "__main__":
    main()
