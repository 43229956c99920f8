"""Workers of other code: what is compared, what travels, and who is asked in their place."""

from __future__ import annotations

import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from distributed import Client, get_worker

import mas_batch
from mas_batch import pipeline, task_call
from mas_batch.agents.spec import AgentSpec
from mas_batch.agents.texts import Answered
from mas_batch.aggregate.escalation import Escalation
from mas_batch.aggregate.reductions import RUN_STATISTICS, Reduction
from mas_batch.aggregate.reliability import AgentReliability, Reliability
from mas_batch.aggregate.tree import tree_reduce
from mas_batch.by_name import _restore
from mas_batch.code_version import code_version, hash_of_modules
from mas_batch.errors import ModelError, VersionError
from mas_batch.events import HostLost, PartitionMerged
from mas_batch.job import Job, Task
from mas_batch.latency.times import TaskTimes
from mas_batch.merging import check_merging
from mas_batch.records import Answer
from mas_batch.run_folder.ref import RunRef
from mas_batch.run_folder.storage import Store
from tests.test_run import Recorder

MakeJob = Callable[..., Job]
PACKAGE = Path(mas_batch.__file__).parent


def test_equal_code_has_equal_hashes_in_a_folder_and_in_a_zip(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    copy = Path(shutil.copytree(PACKAGE, tmp_path / "copy" / "mas_batch", ignore=ignored))
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        for file in sorted(copy.rglob("*")):
            archive.write(file, file.relative_to(copy.parent))
    zipped = zipfile.Path(tmp_path / "zipped.zip", "mas_batch/")
    own = code_version().partition("+")[2]
    assert own == hash_of_modules(PACKAGE) == hash_of_modules(copy) == hash_of_modules(zipped)
    (copy / "report" / "style.css").write_text("")
    assert hash_of_modules(copy) == own, "only code counts"
    (copy / "job.py").write_text((copy / "job.py").read_text().replace("256", "255", 1))
    assert hash_of_modules(copy) != own


OLDER = "class Shape:\n    name: str\n    gone: int\n    limit: int = 3\n"
NEWER = "class Shape:\n    added: tuple = ()\n    name: str\n    limit: int = 3\n    needed: int\n"


def test_a_value_of_an_older_shape_keeps_its_fields_by_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("shapes")
    monkeypatch.setitem(sys.modules, "shapes", module)

    def define(source: str) -> Any:
        names = "from mas_batch.by_name import *\nfrom dataclasses import dataclass\n"
        head = "@pickled_by_name\n@dataclass(frozen=True, slots=True, kw_only=True)\n"
        exec(names + head + source, module.__dict__)
        return module.Shape  # type: ignore[attr-defined]

    older = pickle.dumps(define(OLDER)(name="n", gone=1, limit=7))
    define(NEWER)
    value = pickle.loads(older)
    assert (value.name, value.limit, value.added) == ("n", 7, ())
    assert not hasattr(value, "gone")
    assert not hasattr(value, "needed"), "nothing stands in for it"


class Visitor(pickle.Pickler):
    """Notes the classes of this package's values that are pickled."""

    def __init__(self) -> None:
        super().__init__(BytesIO())
        self.classes: set[type] = set()

    def reducer_override(self, value: Any) -> Any:
        if type(value).__module__.startswith("mas_batch."):
            self.classes.add(type(value))
        return NotImplemented


def test_everything_that_travels_is_pickled_by_name(make_job: MakeJob) -> None:
    job = make_job(
        task={"kind": "classify", "labels": ["x", "y"]},
        agents=[{"name": name, "model": f"echo:{name}"} for name in "ab"],
        merge={"method": "vote"},
        routing={"adaptive": {"first": 1}},
    )
    merge, stopping = check_merging(job)
    learned = Reliability("vote", "", 1, None, None, None, {"a": AgentReliability("f", 1)})
    ref = RunRef(
        Store(job.output.path), "t", job.task, replace(merge, reliability=learned), stopping,
        pa.schema([]), keep_text=True, escalation=Escalation("a", 1, 0.5),
    )  # fmt: skip
    answers = Answered((Answer("r", "a", "f", 0, "yes"),), TaskTimes(), 0.0)
    visitor = Visitor()
    visitor.dump([ref, AgentSpec(job.agents[0], 1), RUN_STATISTICS, answers])
    slotted = {each for each in visitor.classes if "__slots__" in vars(each)}
    assert len(slotted) == 11
    assert [each for each in slotted if each.__setstate__ is not _restore] == []


def test_what_was_added_to_a_section_has_its_default(make_job: MakeJob) -> None:
    whole = make_job().task
    state = whole.__getstate__()
    fields = {name: value for name, value in state["__dict__"].items() if name != "evidence"}
    task = Task.__new__(Task)
    task.__setstate__({**state, "__dict__": fields})
    assert task == whole


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of workers in this process that say that they have other code."""
    names = set[str]()

    def code() -> str:
        return "0.0.9+other" if get_worker().name in names else code_version()

    monkeypatch.setattr(task_call, "code_version", code)
    return names


def test_a_worker_with_other_code_merges_and_counts_nothing(
    cluster_client: Client, make_job: MakeJob, changed: set[str]
) -> None:
    changed.add("spare")  # it hosts no agent
    rows = [{"id": f"r{i}", "text": f"some words about {i}"} for i in range(16)]
    sections = {"partition": {"max_records": 2}, "merge": {"method": "mbr", "weights": "learned"}}
    events = Recorder()
    summary = pipeline.run(make_job(rows, **sections), client=cluster_client, emit=events)
    assert summary.manifest["counts"]["results"] == 16
    assert "spare" not in {event.worker for event in events.of(PartitionMerged)}


def test_a_worker_with_other_code_is_refused_by_name_or_allowed(
    cluster_client: Client, make_job: MakeJob, changed: set[str]
) -> None:
    changed.add("weak-0")
    events = Recorder()
    whose = r"agents\.weak: .* worker weak-0 \(.*\) has mas_batch 0\.0\.9\+other"
    with pytest.raises(ModelError, match=f"{whose}, and this run is of 0"):
        pipeline.run(make_job(), client=cluster_client, emit=events)
    assert [agent for event in events.of(HostLost) for agent in event.agents] == ["weak"]
    job = make_job(cluster={"mixed_versions": "allow"})
    assert pipeline.run(job, client=cluster_client).manifest["repeatable"] is False


def test_where_every_worker_has_other_code_nothing_is_counted(
    cluster_client: Client, changed: set[str]
) -> None:
    changed.update({"strong-0", "weak-0", "spare"})
    reduction = Reduction("n", dict, lambda partials: {}, dict)
    with pytest.raises(VersionError, match=r"cluster\.mixed_versions: allow"):
        tree_reduce(cluster_client, dict, [()], reduction, wait_s=60, code=code_version())
