"""Everything that needs a GPU, in one table: see `gpu.sh`, which prepares what it needs.

    python benchmarks/gpu.py [--device cuda] [--only equality speed] [--models DIR] [--json FILE]

Each check is a process of its own: one that breaks a device, or hangs, leaves the others theirs.
A check that finds no time left within `--seconds` is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Nothing else may be imported before the packages that are missing have been named.
NEEDED = (
    "numpy", "pyarrow", "torch", "transformers", "tokenizers", "safetensors", "sentencepiece",
    "jinja2", "filelock", "packaging", "psutil", "click", "rich", "fsspec", "pydantic", "PyYAML",
    "dask", "distributed", "bokeh", "prometheus-client",
)  # fmt: skip
HELPFUL = ("dask-cuda", "nvidia-ml-py")
CHECKS = (
    "equality", "memory", "refill", "translation", "encoder", "sharing", "assignment", "speed",
)  # fmt: skip
LEAST_S = 10.0
"""A check is not begun with less time left."""


def found_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_here(options: argparse.Namespace) -> None:
    """Do one check in this process, its facts as JSON."""
    from gpu_checks import Setup, run_check

    setup = Setup.of(options.device, options.folder, options.models)
    facts = run_check(options.check, setup)
    options.json.write_text(json.dumps([asdict(fact) for fact in facts]))


def run_apart(name: str, options: argparse.Namespace, folder: Path, left_s: float) -> list[Any]:
    """Do one check in a process of its own, within the time that is left."""

    def fact(what: str, value: str, holds: bool | None) -> list[Any]:
        return [{"check": name, "what": what, "value": value, "holds": holds}]

    if left_s < LEAST_S:
        return fact("left out", "no time was left", None)
    answer = folder / f"{name}.json"
    command = [sys.executable, __file__, "--check", name, "--device", options.device]
    command += ["--folder", str(folder), "--json", str(answer)]
    if options.models:
        command += ["--models", str(options.models)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=left_s)
    except subprocess.TimeoutExpired:
        return fact("failed", f"it had not ended after {left_s:.0f} s", False)
    if not answer.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        return fact("failed", f"exit {done.returncode}: {lines[-1][:300]}", False)
    facts: list[Any] = json.loads(answer.read_bytes())
    return facts


def device_name(device: str) -> str:
    import torch

    if device == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        sys.exit("gpu.py: PyTorch finds no GPU here; allowed without one: --device cpu")
    return str(torch.cuda.get_device_name(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--models", type=Path, help="folder with translator/ and encoder/")
    parser.add_argument("--seconds", type=float, default=500.0, help="for all checks together")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        run_here(options)
        return
    versions = {name: found_version(name) for name in (*NEEDED, *HELPFUL)}
    missing = [name for name, found in versions.items() if found is None]
    if missing:
        print(f"missing: {', '.join(missing)}", flush=True)
    if wanting := [name for name in missing if name in NEEDED]:
        sys.exit(f"gpu.py: without {', '.join(wanting)} nothing runs; `gpu.sh --pack` brings them")
    name = device_name(options.device)
    print(f"{name}; Python {platform.python_version()}, torch {versions['torch']}, "
          f"transformers {versions['transformers']}\n")  # fmt: skip
    print("| check | what | value | holds |\n|---|---|---|---|", flush=True)
    end, facts = time.monotonic() + options.seconds, []
    with tempfile.TemporaryDirectory() as folder:
        for check in options.only:
            begun = time.monotonic()
            found = run_apart(check, options, Path(folder), end - begun)
            spent = {"what": "seconds", "value": f"{time.monotonic() - begun:.0f}", "holds": None}
            for fact in [*found, {"check": check, **spent}]:
                facts.append(fact)
                holds = {True: "yes", False: "**no**", None: ""}[fact["holds"]]
                print(
                    f"| {fact['check']} | {fact['what']} | {fact['value']} | {holds} |", flush=True
                )
    kept = {"device": name, "versions": versions, "facts": facts}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(kept, indent=1))
    sys.exit(any(fact["holds"] is False for fact in facts))


if __name__ == "__main__":
    main()
