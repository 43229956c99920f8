"""Extractive fragment coverage: as its authors define it."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import mas_batch
from mas_batch import pipeline, show
from mas_batch.aggregate.coverage import fragment_coverage
from mas_batch.aggregate.extractive import terms
from mas_batch.job import Job

WORDS = st.lists(st.sampled_from("abcdefg"), max_size=12).map(" ".join)


def by_fragments(answer: str, source: str) -> float | None:
    """Grusky et al. (2018), figure 2: the longest shared run at each place, greedily."""
    a, s = terms(answer), terms(source)
    fragments: list[list[str]] = []
    i = 0
    while i < len(a):
        longest: list[str] = []
        for j in range(len(s)):
            length = 0
            while i + length < len(a) and j + length < len(s) and a[i + length] == s[j + length]:
                length += 1
            longest = max(longest, a[i : i + length], key=len)
        fragments.append(longest)
        i += max(len(longest), 1)
    return sum(map(len, fragments)) / len(a) if a else None


@given(WORDS, WORDS)
def test_it_is_what_the_fragments_add_up_to(answer: str, source: str) -> None:
    assert fragment_coverage(answer, source) == by_fragments(answer, source)


@given(WORDS, WORDS, WORDS)
def test_more_source_never_covers_less(answer: str, source: str, more: str) -> None:
    covered = fragment_coverage(answer, source)
    assert covered is None or covered <= (fragment_coverage(answer, f"{source} {more}") or 0)


@pytest.mark.parametrize(
    ("answer", "source", "expected"),
    [
        ("The storm closed the harbour.", "a storm CLOSED the railway and the harbour", 1.0),
        ("The storm sank two ships", "The storm closed the harbour", 2 / 5),
        ("nothing of it", "", 0.0),
        ("?!", "a text", None),
        ("大雨", "下雨了", 1 / 2),
    ],
)
def test_words_are_compared_without_case_and_punctuation(
    answer: str, source: str, expected: float | None
) -> None:
    assert fragment_coverage(answer, source) == expected


def test_a_long_documents_result_says_its_coverage(
    cluster_client: Client, make_job: Callable[..., Job]
) -> None:
    rows = [
        {"id": "short", "text": "A cat sat."},
        {"id": "long", "text": "The storm closed the harbour. " * 30, "coverage": "own"},
    ]
    agents = [{"name": "a", "model": "echo", "options": {"max_context_tokens": 90}}]
    job = make_job(
        rows, agents=agents, output={**make_job().output.model_dump(), "keep_text": False}
    )
    run = mas_batch.open_run(pipeline.run(job, client=cluster_client).run)
    short, long = run.arrow().to_pylist()
    assert (short["num_parts"], short["coverage"]) == (1, None)
    assert long["num_parts"] > 1
    assert long["coverage"] == fragment_coverage(long["answer"], rows[1]["text"])
    assert long["source_coverage"] == "own"
    out = Console(file=io.StringIO(), record=True, width=100)
    show.print_run(out, run, 5)
    assert out.export_text().count(f"coverage {long['coverage']:.2f}") == 1
