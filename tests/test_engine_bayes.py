from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.engines import load_engine
from mas_batch.engines.base import Completion, EngineConfig, Message, Request, Sampling
from mas_batch.engines.classical.bayes import NaiveBayes, Options
from mas_batch.engines.classical.examples import (
    ExampleOptions,
    Examples,
    fingerprint,
    read_examples,
)
from mas_batch.engines.classical.predicting import most_likely, words
from mas_batch.errors import EngineError, EngineRefusedError, JobError
from mas_batch.models import fetch

ANSWER = Sampling(max_new_tokens=8)

# Introduction to Information Retrieval (2008), table 13.1: the book works it out by hand.
CHINA = [
    ("Chinese Beijing Chinese", "china"),
    ("Chinese Chinese Shanghai", "china"),
    ("Chinese Macao", "china"),
    ("Tokyo Japan Chinese", "not china"),
]
ASKED = "Chinese Chinese Chinese Tokyo Japan"


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    path.write_text("".join(lines))
    return str(path)


def request(text: str, name: str = "r") -> Request:
    return Request(name, text, (Message("user", f"Classify: {text}"),))


def ask(engine: Any, *texts: str, sampling: Sampling = ANSWER) -> list[Completion]:
    return [row[0] for row in engine.generate([request(text) for text in texts], sampling)]


def load(name: str, **options: Any) -> Any:
    return load_engine("auto", fetch(name), EngineConfig(options=options))


def learn(rows: list[tuple[str, str]], **options: Any) -> NaiveBayes:
    texts, labels = zip(*rows, strict=True)
    return NaiveBayes(Examples(texts, labels), Options(examples="-", **options))


def test_the_books_example(tmp_path: Path) -> None:
    engine = load("bayes", examples=write(tmp_path / "china.jsonl", CHINA))
    (completion,) = ask(engine, ASKED)
    yes = 3 / 4 * (3 / 7) ** 3 * (1 / 14) * (1 / 14)
    no = 1 / 4 * (2 / 9) ** 3 * (2 / 9) * (2 / 9)
    assert completion.text == "china"
    assert completion.sum_logprob == pytest.approx(math.log(yes / (yes + no)), abs=1e-12)
    assert (completion.num_tokens, completion.prompt_tokens) == (1, 5)
    assert completion.finish_reason == "stop"


def test_a_uniform_prior_and_less_smoothing_change_the_posterior() -> None:
    (found,) = learn(CHINA, prior="uniform", smoothing=0.5).predict([ASKED])
    yes = (5.5 / 11) ** 3 * (0.5 / 11) ** 2
    no = (1.5 / 6) ** 3 * (1.5 / 6) ** 2
    assert found.text == "not china"
    assert found.log_probability == pytest.approx(math.log(no / (yes + no)), abs=1e-12)


WORDS = st.lists(st.sampled_from("abcdefg"), min_size=0, max_size=8).map(" ".join)
SOME = st.lists(st.tuples(WORDS, st.sampled_from(["x", "y", "z"])), max_size=8)
EXAMPLES = SOME.map(
    lambda rows: [*rows, ("a b c", "x")]
)  # without a word there is nothing to learn


@given(EXAMPLES, WORDS, st.sampled_from([0.1, 1.0]))
def test_the_posterior_is_that_of_the_formula(
    rows: list[tuple[str, str]], asked: str, smoothing: float
) -> None:
    vocabulary = {word for text, _ in rows for word in words(text)}
    joint = {}
    for label in sorted({label for _, label in rows}):
        own = [text for text, other in rows if other == label]
        seen = [word for text in own for word in words(text)]
        total = len(seen) + smoothing * len(vocabulary)
        joint[label] = len(own) / len(rows)
        for word in words(asked):
            if word in vocabulary:
                joint[label] *= (seen.count(word) + smoothing) / total
    (found,) = learn(rows, smoothing=smoothing).predict([asked])
    assert found.log_probability is not None
    assert math.exp(found.log_probability) == pytest.approx(
        max(joint.values()) / sum(joint.values()), rel=1e-9
    )
    assert joint[found.text] == pytest.approx(max(joint.values()), rel=1e-9)


@given(EXAMPLES, st.lists(WORDS, max_size=4), st.randoms())
def test_neither_the_order_of_examples_nor_of_words_matters(
    rows: list[tuple[str, str]], asked: list[str], random: Any
) -> None:
    shuffled = random.sample(rows, len(rows))
    turned = [" ".join(reversed(text.split())) for text in asked]
    assert learn(rows).predict(asked) == learn(shuffled).predict(turned)


def test_what_was_said_before_is_read_if_asked_for(tmp_path: Path) -> None:
    examples = write(tmp_path / "china.jsonl", CHINA)
    before = "Tokyo Japan Tokyo Japan Tokyo Japan"
    asked = Request("r", "Chinese", (), context=before)
    for context, label in ((False, "china"), (True, "not china")):
        engine = load("bayes", examples=examples, context=context)
        ((completion,),) = engine.generate([asked], ANSWER)
        assert completion.text == label
        assert completion.prompt_tokens == (7 if context else 1)


def test_a_reply_is_the_answer_whose_questions_have_the_words(tmp_path: Path) -> None:
    faq = [("how do i pay", "By card.\n\nOr cash."), ("where is my parcel", "On its way.")]
    engine = load("bayes", examples=write(tmp_path / "faq.jsonl", faq))
    paid, sent = ask(engine, "Can I PAY?", "the parcel is late")
    assert (paid.text, sent.text) == ("By card.\n\nOr cash.", "On its way.")
    (cut,) = ask(engine, "pay", sampling=Sampling(max_new_tokens=2))
    assert (cut.text, cut.finish_reason, cut.num_tokens) == ("By card.", "length", 2)


def test_likelihoods_too_small_for_a_float_keep_their_order() -> None:
    (found,) = learn([("a", "x"), ("b", "y")]).predict(["a b b " * 10_000])
    assert found.text == "y"
    assert found.log_probability == 0.0


def test_hypotheses_of_one_answer_add_up() -> None:
    scores, owners = np.log([0.4, 0.3, 0.3]), np.array([0, 1, 1])
    found = most_likely(scores, owners, ("single", "pair"))
    assert found.text == "pair"
    assert found.log_probability == pytest.approx(math.log(0.6))
    assert most_likely(np.zeros(2), np.array([1, 0]), ("b", "a")).text == "b"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8, temperature=1.0, num_samples=2),
        Sampling(8, temperature=0.5),
        Sampling(8, num_beams=2),
    ],
)
def test_it_samples_nothing(tmp_path: Path, sampling: Sampling) -> None:
    engine = load("bayes", examples=write(tmp_path / "china.jsonl", CHINA))
    with pytest.raises(EngineRefusedError, match="picks one answer and samples none"):
        ask(engine, "Tokyo", sampling=sampling)


# --- Options and examples


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({}, "examples", "the engine bayes needs it"),
        (
            {"examples": "{good}", "k": 3},
            "k",
            "allows: examples, text, also, label, context, smoothing, prior",
        ),
        ({"examples": "{good}", "smoothing": 0.0}, "smoothing", "0.0 is not allowed"),
        ({"examples": "{missing}"}, "examples", "missing.jsonl"),
        ({"examples": "{good}", "text": "question"}, "text", "no column 'question'"),
        ({"examples": "{good}", "also": "answer"}, "also", "no column 'answer'"),
        ({"examples": "{good}", "label": "answer"}, "label", "no column 'answer'"),
        ({"examples": "{blank}"}, "label", "example 2 of .* no answer in the column 'label'"),
        ({"examples": "{null}"}, "text", "every example needs a text: null.jsonl, row 1"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, options: dict[str, Any], key: str, message: str
) -> None:
    write(tmp_path / "good.jsonl", CHINA)
    write(tmp_path / "blank.jsonl", [("a", "x"), ("b", " ")])
    (tmp_path / "null.jsonl").write_text('{"text": null, "label": "x"}\n')
    if isinstance(path := options.get("examples"), str):
        options["examples"] = str(tmp_path / f"{path.strip('{}')}.jsonl")
    with pytest.raises(JobError, match=message) as caught:
        load("bayes", **options)
    assert caught.value.key == f"agents.options.{key}"


def test_examples_are_read_as_a_corpus_is(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", CHINA[:2])
    (tmp_path / "2.jsonl").write_text('{"text": "seven", "label": 7}\n')
    engine = load("bayes", examples=f"{tmp_path}/*.jsonl")
    assert ask(engine, "seven")[0].text == "7"
    assert engine.describe()["num_examples"] == 3


def test_a_second_column_is_read_with_the_text(tmp_path: Path) -> None:
    rows = [("how do i pay", "By card."), ("where is it", "On its way.")]
    path = write(tmp_path / "faq.jsonl", rows)
    assert ask(load("bayes", examples=path, also="label"), "card")[0].text == "By card."
    options = ExampleOptions(examples=path, also="label")
    assert read_examples(options).texts == ("how do i pay\nBy card.", "where is it\nOn its way.")


def test_changed_examples_show(tmp_path: Path) -> None:
    path = write(tmp_path / "china.jsonl", CHINA)
    before, facts = fingerprint({"examples": path}), load("bayes", examples=path).describe()
    assert fingerprint({"examples": path}) == before
    write(tmp_path / "china.jsonl", [*CHINA[:3], ("Tokyo Japan Chinese", "japan")])
    assert fingerprint({"examples": path}) != before
    assert load("bayes", examples=path).describe()["examples_sha256"] != facts["examples_sha256"]
    assert fingerprint({"labels": {}}) is None
    for wrong in (str(tmp_path / "missing.jsonl"), 7):
        with pytest.raises(JobError) as caught:
            fingerprint({"examples": wrong})
        assert caught.value.key == "agents.options.examples"


# --- Keywords

TOPICS = {"music": "guitar Drum", "sport": "ball, goal"}


def test_keywords_count_whole_words() -> None:
    engine = load("keywords", labels=TOPICS)
    texts = ("A DRUM and a ball and a guitar", "ball goal drum", "drumming footballs", "drum ball")
    assert [c.text for c in ask(engine, *texts)] == ["music", "sport", "", "music"]
    assert all(c.sum_logprob is None for c in ask(engine, *texts))


def test_keywords_say_what_is_wrong() -> None:
    with pytest.raises(JobError, match="the engine keywords needs it") as caught:
        load("keywords")
    assert caught.value.key == "agents.options.labels"
    with pytest.raises(JobError, match="is not allowed"):
        load("keywords", labels={})


# --- Overlap


def test_overlap_is_the_share_of_the_first_halfs_words() -> None:
    engine = load("overlap", minimum=1.0, maximum=5.0)
    third, none, all_of_it = ask(
        engine, "A cat, a dog\n\nthe CAT\n\ndogs", "dog\n\ncat", "cat\n\ndog cat"
    )
    assert [third.text, none.text, all_of_it.text] == ["2.333", "1.000", "5.000"]


@pytest.mark.parametrize("text", ["only one half", "\n\nno first half", "no second half\n\n"])
def test_overlap_needs_two_halves(text: str) -> None:
    with pytest.raises(EngineError, match="no two halves"):
        ask(load("overlap"), text)


def test_overlap_says_what_is_wrong() -> None:
    with pytest.raises(JobError, match="must be below maximum"):
        load("overlap", minimum=3.0, maximum=3.0)
