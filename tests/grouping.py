"""What tests need, as markers, and which of them go to the same process of pytest-xdist.

`make test-fast` leaves out all that these markers name; `make nightly` leaves out nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

MARKERS = {
    "processes": "starts processes",
    "cluster": "runs a Dask cluster, in this process at least",
    "torch": "imports torch",
    "figures": "computes published figures anew, for seconds",
    "nightly": "runs in `make nightly` and not in `make test`",
}
FILES: Mapping[str, str] = {
    **dict.fromkeys(
        ("test_dask_compat", "test_dask_compat_dashboard", "test_dashboard", "test_extending"),
        "cluster",
    ),
    **dict.fromkeys(
        ("test_pool", "test_remerge", "test_routing_run", "test_second_pass", "test_shared_hosts"),
        "cluster",
    ),
    **dict.fromkeys(
        ("test_chaos", "test_cli", "test_faults", "test_incremental_faults"), "processes"
    ),
    **dict.fromkeys(
        ("test_lock", "test_models", "test_output_faults", "test_scheduling"), "processes"
    ),
    **dict.fromkeys(("test_security", "test_tls"), "processes"),
    **dict.fromkeys(("test_browser", "test_notebooks", "test_prometheus"), "nightly"),
    **dict.fromkeys(
        ("test_engine_ctranslate2", "test_engine_marian", "test_engine_nearest"), "torch"
    ),
    **dict.fromkeys(
        ("test_adapters", "test_engine_transformers", "test_transformers_compat"), "torch"
    ),
    **dict.fromkeys(
        ("test_choice_tokens", "test_gpu_checks", "test_label_reading", "test_quantized"), "torch"
    ),
    **dict.fromkeys(
        ("test_shared_prefixes", "test_vllm", "test_vllm_engine", "test_vllm_parts"), "torch"
    ),
    **dict.fromkeys(("test_guarantee", "test_real_answers", "test_reliability_proof"), "figures"),
}
"""Module → what its tests need; those that need more say so themselves."""
FIXTURES = {
    "cluster_client": "cluster",
    "s3_options": "cluster",  # a server, with a thread per request
    "nannies": "processes",
    "own_cluster": "cluster",
    "browser_page": "nightly",
}


def add_markers(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = Path(item.path).stem
        needs = {FIXTURES[name] for name in getattr(item, "fixturenames", ()) if name in FIXTURES}
        needs |= {FILES[module]} if module in FILES else set()
        needs |= {"processes"} if item.get_closest_marker("faults") else set()
        needs |= {"torch"} if item.get_closest_marker("models") else set()
        for name in needs:
            item.add_marker(name)
        # Tests of a module share its cluster, and those with torch its import; tests that start
        # processes share nothing: they go last, one by one, to whoever is free.
        if "torch" in needs:
            item.add_marker(pytest.mark.xdist_group("torch"))
        elif "processes" not in needs:
            item.add_marker(pytest.mark.xdist_group(module))
