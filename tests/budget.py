"""`pytest --budget`: the suite fails when it takes longer than the repository says it may."""

from __future__ import annotations

import time
import tomllib
from typing import Any

import pytest

_START = pytest.StashKey[float]()


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        action="store_true",
        help="fail when it takes longer than `budget_s` in pyproject.toml",
    )


def start(config: pytest.Config) -> None:
    config.stash[_START] = time.monotonic()


def check(session: pytest.Session) -> None:
    """Fail a session that was successful but too slow; not in the processes of pytest-xdist."""
    config = session.config
    if not config.getoption("--budget") or hasattr(config, "workerinput"):
        return
    budget_s = _budget_s(config)
    spent_s = time.monotonic() - config.stash[_START]
    if spent_s > budget_s and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def report(terminalreporter: Any) -> None:
    config = terminalreporter.config
    if config.getoption("--budget"):
        spent_s = time.monotonic() - config.stash[_START]
        budget_s = _budget_s(config)
        words = "within" if spent_s <= budget_s else "OVER: see the slowest above;"
        terminalreporter.section("budget")
        terminalreporter.write_line(f"{spent_s:.0f} s, {words} the budget of {budget_s:g} s")


def _budget_s(config: pytest.Config) -> float:
    facts = tomllib.loads((config.rootpath / "pyproject.toml").read_text(encoding="utf-8"))
    return float(facts["tool"]["mas-batch"]["tests"]["budget_s"])
