"""`since: last`, part by part: the index of records, what makes two agents one, what is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule
from mas_batch.incremental import Settling, asked_as
from mas_batch.incremental.identity import is_random, why_not_reusable
from mas_batch.incremental.index import COLUMNS, RecordIndex, record_keys
from mas_batch.incremental.taking import Tally
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.models import fetch
from mas_batch.records import ANSWERS

Shown = tuple[str, str | None, str | None]
"""Id, text and context of a record."""

IDS = st.sampled_from([f"r{i}" for i in range(12)])
TEXTS = st.one_of(st.none(), st.sampled_from(["", "a", "b", "a\0b", "ä", "\ud800"]))
CORPUS = st.dictionaries(IDS, st.tuples(TEXTS, TEXTS), max_size=12).map(
    lambda corpus: [(record_id, *shown) for record_id, shown in corpus.items()]
)


def table(corpus: Sequence[Shown]) -> pa.Table:
    """As staged; Arrow holds no lone surrogate, so an escape stands for it."""
    rows = [[v.encode("utf-8", "replace").decode() if v else v for v in row] for row in corpus]
    columns = list(zip(*rows, strict=True)) or [[], [], []]
    return pa.table([pa.array(c, pa.string()) for c in columns], names=list(COLUMNS))


@given(CORPUS, CORPUS, st.integers(1, 5))
def test_the_index_finds_what_a_search_by_hand_finds(
    earlier: list[Shown], now: list[Shown], size: int
) -> None:
    parts = [table(earlier[i : i + size]) for i in range(0, len(earlier), size)]
    index = RecordIndex.of(map(record_keys, parts))
    found = index.find(record_keys(table(now)))
    ids, contents = [row[0] for row in _rows(earlier)], [row[1:] for row in _rows(earlier)]
    for i, (record_id, *shown) in enumerate(_rows(now)):
        same = [p for p in range(len(ids)) if contents[p] == shown]
        own = ids.index(record_id) if record_id in ids else None
        position = int(found.position[i])
        assert (position in same) if same else position == -1
        assert bool(found.same_id[i]) == (own in same)
        if own in same:
            assert position == own
            assert found.changed[i] == -1
        else:
            assert found.changed[i] == (-1 if own is None else own)


def _rows(corpus: Sequence[Shown]) -> list[list[Any]]:
    return [list(row.values()) for row in table(corpus).to_pylist()]


def test_context_is_part_of_what_is_shown_and_not_of_the_text() -> None:
    rows: list[Shown] = [("a", "x", None), ("b", "x", ""), ("c", "x", "y"), ("d", None, None)]
    keys = record_keys(table(rows))
    assert len({bytes(key)[:16] for key in keys}) == len(rows)


def test_a_record_takes_48_bytes() -> None:
    index = RecordIndex.of([record_keys(table([(f"r{i}", f"t{i}", None) for i in range(100)]))])
    sizes = [getattr(index, name).nbytes for name in RecordIndex.__slots__]
    assert sum(sizes) == 48 * len(index)


# What makes an agent the same


def job_of(**changes: Any) -> Job:
    agent: dict[str, Any] = {"name": "a", "model": "echo", **changes.pop("agent", {})}
    task = {"kind": "classify", "labels": ["x", "y"], **changes.pop("task", {})}
    return check_job(
        {
            "name": "j",
            "corpus": {"path": "c.jsonl"},
            "task": task,
            "agents": [agent],
            "output": {"path": "runs"},
            **changes,
        }
    )


def published(job: Job, **engine: Any) -> dict[str, Any]:
    return {
        "asked_as": {agent.name: asked_as(job, agent) for agent in job.agents},
        "engines": {agent.name: engine for agent in job.agents},
    }


ANOTHER_AGENT: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"agent": {"model": "echo:b"}}, "model"),
    "engine": ({"agent": {"engine": "echo"}}, "model"),
    "dtype": ({"agent": {"dtype": "float16"}}, "model"),
    "prompt": ({"agent": {"prompt": "which? {text}"}}, "prompt"),
    "the task's prompt": ({"task": {"system": "be brief"}}, "prompt"),
    "temperature": ({"agent": {"sampling": {"temperature": 0.5}}}, "sampling"),
    "seed": ({"agent": {"sampling": {"seed": 3}}}, "sampling"),
    "samples": ({"agent": {"samples": 2}}, "sampling"),
    "new tokens": ({"task": {"max_new_tokens": 9}}, "task"),
    "an option": ({"agent": {"options": {"words": 2}}}, "options"),
}


@pytest.mark.parametrize(("changes", "part"), ANOTHER_AGENT.values(), ids=ANOTHER_AGENT)
def test_an_agent_that_is_asked_otherwise_is_another(changes: dict[str, Any], part: str) -> None:
    now = job_of(**changes)
    why = why_not_reusable(now, now.agents[0], published(job_of()), is_embedded=True)
    assert why is not None
    assert why.startswith("changed since: ")
    assert part in why


def test_labels_are_part_of_the_question_and_of_the_prompt() -> None:
    now = job_of(task={"labels": ["x", "y", "z"]})
    why = why_not_reusable(now, now.agents[0], published(job_of()), is_embedded=True)
    assert why == "changed since: prompt, task"


SAME_AGENT: dict[str, dict[str, Any]] = {
    "hosts": {"agent": {"count": 3, "share": False, "threads": 2, "batch_tokens": 64}},
    "capabilities": {"agent": {"capabilities": ["classify", "big"], "resources": {"GPU": 1}}},
    "merge": {"merge": {"method": "reliability"}},
    "partitions": {"partition": {"max_records": 3}},
    "corpus": {"corpus": {"path": "other.csv", "text": "body"}},
}


@pytest.mark.parametrize("changes", SAME_AGENT.values(), ids=SAME_AGENT)
def test_an_agent_that_only_works_elsewhere_or_faster_is_the_same(changes: dict[str, Any]) -> None:
    now = job_of(**changes)
    assert why_not_reusable(now, now.agents[0], published(job_of()), is_embedded=True) is None


@pytest.mark.parametrize(
    ("option", "is_same"), [({"concurrency": 4}, True), ({"logprobs": True}, False)]
)
def test_the_engine_says_which_options_change_no_answer(
    option: dict[str, Any], is_same: bool
) -> None:
    then = job_of(agent={"model": "openai:m"})
    now = job_of(agent={"model": "openai:m", "options": option})
    why = why_not_reusable(now, now.agents[0], published(then), is_embedded=True)
    assert (why is None) == is_same


def test_an_agent_that_was_not_there_is_another() -> None:
    now = job_of(agent={"name": "b"})
    why = why_not_reusable(now, now.agents[0], published(job_of()), is_embedded=True)
    assert why == "that run did not ask it, or does not say how"


def test_a_model_whose_files_were_replaced_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAS_BATCH_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "m" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    now = job_of(agent={"model": str(weights.parent)})
    then = published(now, sha256=fetch(str(weights.parent)).sha256)
    assert why_not_reusable(now, now.agents[0], then, is_embedded=False) is None
    weights.write_bytes(len(b"{  }").to_bytes(8, "little") + b"{  }")
    why = why_not_reusable(now, now.agents[0], then, is_embedded=False)
    assert why == "changed since: the model's files"
    assert why_not_reusable(now, now.agents[0], published(now), is_embedded=False) == (
        "that run does not say which files its model had"
    )
    weights.unlink()
    weights.parent.rmdir()
    why = why_not_reusable(now, now.agents[0], then, is_embedded=False)
    assert why is not None
    assert "cannot be compared from here" in why


@pytest.mark.parametrize(
    ("model", "is_pinned"),
    [("org/name@" + "0" * 40, True), ("org/name@main", False), ("org/name", False)],
)
def test_a_model_on_a_hub_is_the_same_if_a_commit_names_it(model: str, is_pinned: bool) -> None:
    now = job_of(agent={"model": model})
    why = why_not_reusable(now, now.agents[0], published(now, sha256="abc"), is_embedded=False)
    assert why == (
        None if is_pinned else "its model may have changed: name a commit, org/name@<40 hex digits>"
    )


def test_an_answer_by_lot_belongs_to_the_record() -> None:
    assert not is_random(job_of().agents[0])
    assert is_random(job_of(agent={"sampling": {"temperature": 0.1}}).agents[0])
    assert is_random(job_of(agent={"options": {"error_rate": 0.1}}).agents[0])


# What is enough

SPEC = MergeSpec("vote", None, {}, None, 0.0, "label", 2, ("x", "y"), ("a", "b", "c"))


def answers(agent_id: str, labels: Mapping[str, str]) -> pa.Table:
    rows = [
        {"record_id": r, "agent_id": agent_id, "family_id": agent_id, "sample_id": 0, "attempt": 1,
         "text": label, "label": label, "finish_reason": "stop", "num_parts": 1}
        for r, label in labels.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, ANSWERS)


def records(*ids: str, unusable: Sequence[str] = ()) -> pa.Table:
    reasons = [None] * len(ids) + ["empty"] * len(unusable)
    return pa.table(
        {
            "record_id": pa.array([*ids, *unusable], pa.string()),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def settling(wanted: int, first: int | None = None) -> Settling:
    rule = None if first is None else StoppingRule(None, wanted)
    return Settling({"a": 1, "b": 1, "c": 1}, wanted, first, SPEC, rule)


BOTH = {"1": "x", "2": "x"}


def test_an_agent_counts_whose_answers_are_to_all_usable_records() -> None:
    known = {"a": answers("a", BOTH), "b": answers("b", {"1": "x"}), "c": answers("c", BOTH)}
    choice = settling(3).choose(records("1", "2", unusable=["3"]), known)
    assert list(choice.answers) == ["a", "c"]
    assert not choice.is_settled
    assert settling(3).choose(records("1"), known).is_settled


def test_no_more_count_than_are_asked_for() -> None:
    known = {agent: answers(agent, BOTH) for agent in ("a", "b", "c")}
    choice = settling(2).choose(records("1", "2"), known)
    assert (list(choice.answers), choice.is_settled) == (["a", "b"], True)
    choice = settling(2).choose(records("1", "2"), known, done=["b"])
    assert (list(choice.answers), choice.is_settled) == (["a"], True)


def test_where_nothing_can_be_asked_nobody_has_to_be() -> None:
    choice = settling(3).choose(records(unusable=["1"]), {})
    assert choice.is_settled
    assert {agent: rows.num_rows for agent, rows in choice.answers.items()} == dict.fromkeys(
        "abc", 0
    )


def test_further_answers_count_where_the_first_differ() -> None:
    known = {
        "a": answers("a", BOTH),
        "b": answers("b", {"1": "x", "2": "y"}),
        "c": answers("c", BOTH),
    }
    choice = settling(3, first=2).choose(records("1", "2"), known)
    assert choice.is_settled
    assert choice.answers["c"]["record_id"].to_pylist() == ["2"], "only about what was undecided"


def test_where_a_look_finds_nobodys_answers_somebody_is_asked() -> None:
    known = {"a": answers("a", BOTH), "b": answers("b", {"1": "x", "2": "y"})}
    choice = settling(3, first=2).choose(records("1", "2"), known)
    assert (list(choice.answers), choice.is_settled) == (["a", "b"], False)


def test_where_the_first_agree_nobody_else_counts() -> None:
    known = {agent: answers(agent, BOTH) for agent in ("a", "b", "c")}
    choice = settling(3, first=2).choose(records("1", "2"), known)
    assert (list(choice.answers), choice.is_settled) == (["a", "b"], True)


@pytest.mark.parametrize(
    ("earlier", "present", "counts"),
    [
        ("abc", "ac", (2, 0, 0, 1)),
        ("ac", "zac", (2, 0, 1, 0)),
        ("abc", "azc", (2, 1, 0, 0)),
        ("abc", "cba", (3, 0, 0, 0)),
        ("a", "a", (1, 0, 0, 0)),
    ],
)
def test_where_ids_go_by_place_a_shifted_record_is_not_a_changed_one(
    earlier: str, present: str, counts: tuple[int, ...]
) -> None:
    def keys(texts: str) -> Any:
        return record_keys(table([(f"r{i}", text, None) for i, text in enumerate(texts)]))

    tally = Tally(len(earlier))
    matches = RecordIndex.of([keys(earlier)]).find(keys(present))
    unchanged = matches.position >= 0
    tally.add(matches.position[unchanged], matches.changed[~unchanged])
    assert tuple(tally.counts().values()) == counts
