"""What a run's folder says about the run: its job, its engines, and in the end its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml

from mas_batch.errors import RunError
from mas_batch.job import Job
from mas_batch.run_folder.plan import Plan
from mas_batch.run_folder.ranges import Ranges, to_ranges
from mas_batch.run_folder.storage import Store
from mas_batch.safe_text import without_credentials


def write_job(run: Store, job: Job) -> None:
    """Write the effective job to the run, without storage options, which may hold secrets."""
    secret = {"corpus": {"storage_options"}, "output": {"storage_options"}}
    kept = job.model_dump(mode="json", exclude=secret)
    for agent in kept["agents"]:
        agent["options"].pop("extra_body", None)  # some endpoints expect a key there
    content = yaml.safe_dump(without_credentials_in(kept), sort_keys=False, allow_unicode=True)
    run.replace("job.yaml", content.encode())


def read_job_mapping(run: Store) -> dict[str, Any]:
    """Return job.yaml as plain data, without keys that only earlier versions had."""
    job = run.read_facts("job.yaml", _parse_yaml)
    job.get("routing", {}).pop("mode", None)  # it never changed a result
    return job


def _parse_yaml(content: bytes) -> Any:
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def without_credentials_in(value: Any) -> Any:
    """Return plain data without the credentials in its URLs; prompts stay as they are.

    Call it before the data is YAML, which may break a URL over two lines.
    """
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, list):
        return [without_credentials_in(item) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("prompt", "system") else without_credentials_in(item)
            for key, item in value.items()
        }
    return value


def check_invariant(plan: Plan, num_results: int, num_failures: int) -> None:
    """Check that rows in = rows in results + rows in failures.

    Raises:
        RunError: they differ; nothing must be published.
    """
    if plan.num_records != num_results + num_failures:
        raise RunError(
            f"{plan.num_records} records went in, {num_results} results + {num_failures} "
            "failures came out; nothing is published; please report this defect"
        )


def write_engines(run: Store, facts: Mapping[str, Any]) -> None:
    """Write what the engines say of themselves; a later execution may not load any of them."""
    run.replace("engines.json", json.dumps(facts, ensure_ascii=False, indent=1).encode())


def read_engines(run: Store) -> dict[str, Any]:
    """Return agent → what its engine said of itself when it was last loaded."""
    if not run.exists("engines.json"):
        return {}
    return run.read_facts("engines.json")


def manifest_files(
    plan: Plan,
    answers: Mapping[str, Ranges],
    failures: Mapping[int, str],
    review: Iterable[int],
) -> dict[str, Any]:
    """Say which files are valid, in a size that hardly grows with the number of partitions.

    Results and answers have one possible name per partition: `results` is ranges `[first, stop)`
    of partition numbers, so is `review`, and `answers` is agent → ranges. A failures file's
    name holds a hash: `failures` is names, in corpus order.

    Args:
        answers: agent → ranges of the partitions whose merge has its answers.
        failures: partition → its failures file; only partitions that have one.
        review: partitions that have a review file.
    """
    reviewed = np.zeros(plan.num_partitions, np.bool_)
    reviewed[list(review)] = True
    return {
        "results": to_ranges(np.ones(plan.num_partitions, np.bool_)),
        "review": to_ranges(reviewed),
        "failures": [failures[partition] for partition in sorted(failures)],
        "answers": {agent: [list(pair) for pair in ranges] for agent, ranges in answers.items()},
    }


def write_manifest(run: Store, manifest: Mapping[str, Any]) -> None:
    """Publish the manifest: from then on readers see the run as complete."""
    run.replace("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def read_manifest(run: Store) -> dict[str, Any] | None:
    """Return the manifest of a published run, else None.

    Raises:
        RunError: it is cut or damaged.
    """
    if not run.exists("manifest.json"):
        return None
    return run.read_facts("manifest.json")
