"""Two runs side by side: every record counted once, whatever the runs' order and partitioning."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mas_batch import evaluation, pipeline, report
from mas_batch.cli import main
from mas_batch.compare import compare, print_comparison
from mas_batch.compare import record_pairs as join
from mas_batch.compare.changes import Change, changes
from mas_batch.errors import RunError
from mas_batch.remerge import merge_again
from mas_batch.run_folder.read import open_run
from tests.report_runs import answer, failure, made_run, result


def test_jobs_differ_by_key_and_agents_by_name() -> None:
    a = {"agents": [{"name": "x", "k": 1}, {"name": "y", "k": 2}], "merge": {"method": "vote"}}
    b = {"agents": [{"name": "y", "k": 3}], "merge": {"method": "vote", "seen": None}, "n": [1]}
    assert changes(a, b) == (
        Change("agents.x", '{"k": 1}', None),
        Change("agents.y.k", "2", "3"),
        Change("merge.seen", None, "null"),
        Change("n", None, "[1]"),
    )
    assert changes(a, a) == ()


def test_an_empty_mapping_is_told_from_none_at_all() -> None:
    assert changes({"options": {}}, {}) == (Change("options", "{}", None),)
    assert changes({"options": {}}, {"options": {"k": 1}}) == (Change("options.k", None, "1"),)


def test_every_fate_of_a_record(tmp_path: Path) -> None:
    a = [
        result("same", "Yes."),
        result("other", "yes", confidence=0.9),
        result("broken", "yes", confidence=0.4),
        result("gone", "yes"),
        failure("mended"),
        failure("never"),
    ]
    b = [
        result("new", "yes"),
        failure("never"),
        result("mended", "no"),
        failure("broken"),
        result("other", "no", confidence=0.8),
        result("same", "yes", confidence=0.5),
    ]
    runs = made_run(tmp_path / "a", [a[:2], a[2:]]), made_run(tmp_path / "b", [b[:1], b[1:]])
    found = compare(*runs).records
    assert (found.only_a, found.only_b, found.common) == (1, 1, 5)
    assert (found.same, found.different) == (1, 1)  # "Yes." and "yes" are one answer
    assert (found.newly_answered, found.newly_failed, found.failed_in_both) == (1, 1, 1)
    assert [pair.record_id for pair in found.changed] == ["other"]
    assert [pair.record_id for pair in found.shifted] == ["same", "other"]
    assert found.confidence_change == pytest.approx((-0.5 - 0.1) / 2)
    assert found.judged is None


def test_confidences_of_unlike_kinds_are_not_subtracted(tmp_path: Path) -> None:
    a = made_run(tmp_path / "a", [[result("r", confidence=0.5)]])
    b = made_run(tmp_path / "b", [[result("r", confidence=0.9, confidence_kind="posterior")]])
    found = compare(a, b).records
    assert found.confidence_change is None
    assert found.shifted == ()


def test_labels_are_judged_by_the_references(tmp_path: Path) -> None:
    right = {"reference": "x"}
    a = [result(f"r{i}", "x" if i < 3 else "y", **right) for i in range(10)]
    b = [result(f"r{i}", "y" if i == 0 else "x", **right) for i in range(10)]
    judged = compare(made_run(tmp_path / "a", [a]), made_run(tmp_path / "b", [b])).records.judged
    assert judged is not None
    assert (judged.right_in_both, judged.fixed, judged.broken) == (2, 7, 1)
    assert judged.p == pytest.approx(2 * (1 + 8) / 2**8)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(fixed: int, broken: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    assert join.mcnemar(fixed, broken) == pytest.approx(expected)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (1, 0), (3, 9), (250, 301), (400, 400)])
def test_mcnemar_is_exact(fixed: int, broken: int) -> None:
    tosses = fixed + broken
    tail = sum(math.comb(tosses, k) for k in range(min(fixed, broken) + 1))
    assert join.mcnemar(fixed, broken) == pytest.approx(min(1, 2 * tail / 2**tosses), rel=1e-9)


def test_mcnemar_of_many_records_is_near_normal() -> None:
    fixed, broken = 50_000, 50_500
    z = (broken - fixed - 1) / math.sqrt(fixed + broken)
    assert join.mcnemar(fixed, broken) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_the_surest_changes_come_first_whatever_says_so(tmp_path: Path) -> None:
    """Of standard errors the smallest, of agreement the largest; unknown is least sure of all."""
    for kind, order in (("standard_error", "sclu"), ("agreement", "lcsu")):
        known = {"s": 0.1, "c": 0.4, "l": 0.9, "u": None}
        runs = [
            made_run(
                tmp_path / kind / said,
                [[result(k, said, confidence=c, confidence_kind=kind) for k, c in known.items()]],
            )
            for said in ("x", "y")
        ]
        assert [pair.record_id for pair in compare(*runs).records.changed] == list(order)


ABSENT = "absent"
STATES = st.sampled_from([ABSENT, None, "x", "x", "y", "y"])
FATES = st.lists(st.tuples(STATES, STATES), min_size=4, max_size=14)


@given(FATES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_join_counts_each_record_once(fates: list[Any], at_once: int, random: Any) -> None:
    a, b = (
        {f"id {i}": both[side] for i, both in enumerate(fates) if both[side] != ABSENT}
        for side in (0, 1)
    )

    def rows(side: dict[str, str | None]) -> list[list[dict[str, Any]]]:
        made = [failure(key) if x is None else result(key, x) for key, x in side.items()]
        random.shuffle(made)
        cut = random.randint(0, len(made))
        return [made[:cut], made[cut:]]

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "RECORDS_PER_PASS", at_once)
        runs = [made_run(Path(folder, name), rows(side)) for name, side in (("a", a), ("b", b))]
        found = join.compare_records(*runs, 99, judge=False)
    counted = Counter(_fate(a[key], b[key]) for key in a.keys() & b.keys())
    assert (found.only_a, found.only_b) == (len(a.keys() - b.keys()), len(b.keys() - a.keys()))
    for fate in ("same", "different", "newly_answered", "newly_failed", "failed_in_both"):
        assert getattr(found, fate) == counted[fate]
    assert len(found.changed) == counted["different"]


def _fate(a: str | None, b: str | None) -> str:
    if a is None or b is None:
        return {(True, True): "failed_in_both", (True, False): "newly_answered"}.get(
            (a is None, b is None), "newly_failed"
        )
    return "same" if a == b else "different"


def test_a_pass_holds_its_share_of_the_ids(tmp_path: Path) -> None:
    """However many records, one pass's worth is in memory."""
    rows = [result(f"r{i}") for i in range(700)] + [failure(f"f{i}") for i in range(300)]
    run = made_run(tmp_path / "run", [rows[:400], rows[400:]])
    sizes = [join._side(run, number, 10).num_rows for number in range(10)]
    assert sum(sizes) == 1000
    assert max(sizes) < 200


def test_two_real_runs(cluster_client: Client, make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    first = open_run(pipeline.run(job, client=cluster_client).run)
    other = job.model_dump(mode="json")
    other["agents"][1]["options"] = {"words": 3}
    other["merge"]["abstain_below"] = 0.9
    from mas_batch.job_file import check_job

    second = open_run(pipeline.run(check_job(other), client=cluster_client).run)
    found = compare(first, second)
    assert {change.key: (change.a, change.b) for change in found.job} == {
        "agents.weak.options.words": ("2", "3"),
        "merge.abstain_below": ("0.0", "0.9"),
    }
    assert found.records.common == 20
    assert {"wall_s", "records"} <= {figure.name for figure in found.totals}
    assert found.time
    out = io.StringIO()
    print_comparison(Console(file=out, width=120), found)
    assert "agents.weak.options.words" in out.getvalue()
    done = CliRunner().invoke(main, ["compare", first.store.url, second.store.url, "--json"])
    assert json.loads(done.output)["records"]["common"] == 20


def test_quality_is_compared_where_both_are_evaluated(
    cluster_client: Client, make_job: Any
) -> None:
    runs = []
    rows = [{"id": f"r{i}", "text": f"text {i}", "gold": "xy"[i % 2]} for i in range(12)]
    for error_rate in (0.0, 0.5):
        agents = [
            {"name": n, "model": f"echo:{n}", "options": {"labels": ["x", "y"], "error_rate": e}}
            for n, e in (("one", error_rate), ("two", 0.0))
        ]
        corpus = make_job(rows).corpus.model_dump(mode="json") | {"reference": "gold"}
        task = {"kind": "classify", "labels": ["x", "y"]}
        job = make_job(corpus=corpus, task=task, agents=agents)
        run = open_run(pipeline.run(job, client=cluster_client).run)
        evaluation.write(evaluation.evaluate(run, "reference", num_resamples=20), run.store)
        runs.append(run)
    found = compare(*runs)
    (own,) = [pair for pair in found.quality if pair.kind == "run"]
    assert own.name == "the run"
    assert own.metric == "accuracy"
    assert own.overlap is not None
    assert found.records.judged is not None
    assert found.records.judged.num_records == 12


def test_a_run_with_itself(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", [[result("r")]], [[answer("r")]])
    found = compare(run, run)
    assert found.job == found.models == found.versions == ()
    assert found.records.same == found.records.common == 1


def test_a_run_with_its_answers_merged_again(cluster_client: Client, make_job: Any) -> None:
    run = open_run(pipeline.run(make_job(), client=cluster_client).run)
    again = merge_again(run, {"method": "best"}, name="other", client=cluster_client)
    found = compare(run, again)
    assert ("merge.method", "vote", "best") in {(c.key, c.a, c.b) for c in found.job}
    assert found.records.common == 20
    assert "Agreement" in report.render(report.collect(again)).decode()


def test_a_run_without_its_job_is_not_whole(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", [[result("r")]])
    Path(run.store.path("job.yaml")).unlink()
    with pytest.raises(RunError, match=r"job\.yaml: not there"):
        compare(run, run)
