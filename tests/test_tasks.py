"""Tasks: prompts are filled literally, replies are read strictly, parts are joined."""

# ruff: noqa: RUF001 - the typographic minus sign is meant

from __future__ import annotations

import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mas_batch import job
from mas_batch.engines.base import Message
from mas_batch.errors import Reason, RecordError
from mas_batch.records import Parsed
from mas_batch.registries import METHODS
from mas_batch.tasks import TASKS, Fitted, make_task
from mas_batch.tasks.splitting import Part


def task_of(kind: str, **keys: typing.Any):
    if kind == "classify":
        keys.setdefault("labels", ("positive", "very positive", "negative"))
    return make_task(job.Task(kind=kind, **keys))  # type: ignore[arg-type]


def user_turn(task, text="TEXT", context=None, prompt=None) -> str:
    return task.messages(text, context, prompt=prompt, system=None)[-1].content


def refused(task, reply: str) -> RecordError:
    with pytest.raises(RecordError) as caught:
        task.parse(reply)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "answer_kind", "merge", "utility"),
    [
        ("summarize", "text", "auto", "rouge-l"),
        ("translate", "text", "auto", "chrf"),
        ("classify", "label", "vote", "chrf"),
        ("score", "value", "mean", "chrf"),
        ("reply", "text", "auto", "chrf"),
    ],
)
def test_defaults(kind, answer_kind, merge, utility):
    task = task_of(kind)
    assert (task.answer_kind, task.default_merge, task.default_utility) == (
        answer_kind,
        merge,
        utility,
    )
    assert merge in METHODS


# --- Prompts


@pytest.mark.parametrize("kind", TASKS)
def test_default_prompts_show_the_text_and_leave_no_field(kind):
    task = task_of(kind, language="German", source_language="Danish", minimum=1.0, maximum=5.5)
    messages = task.messages("THE TEXT", "THE CONTEXT", prompt=None, system=None)
    assert messages[-1].role == "user"
    assert [message.role for message in messages[:-1]] == ["system"] * (kind != "summarize")
    assert "THE TEXT" in messages[-1].content
    prompt = " ".join(message.content for message in messages)
    assert "{" not in prompt
    shown = {
        "summarize": ["German"],
        "translate": ["German", "Danish"],
        "classify": ["positive, very positive, negative"],
        "score": ["1", "5.5"],
        "reply": ["German", "THE CONTEXT"],
    }
    assert all(word in prompt for word in shown[kind])


def test_the_agents_prompt_wins_then_the_jobs_then_the_default():
    task = task_of("summarize", prompt="job: {text}", system="job")
    assert task.messages("x", None, prompt="agent: {text}", system="agent") == (
        Message("system", "agent"),
        Message("user", "agent: x"),
    )
    assert task.messages("x", None, prompt=None, system=None) == (
        Message("system", "job"),
        Message("user", "job: x"),
    )


def test_an_empty_system_prompt_means_no_system_turn():
    (turn,) = task_of("reply").messages("hello", None, prompt=None, system="")
    assert turn == Message("user", "hello")


def test_only_fields_are_replaced():
    prompt = 'Answer as {"label": "…", "n": {0}} {unknown} {} {text!r} {labels}: {text}'
    assert user_turn(task_of("summarize"), "T", prompt=prompt) == (
        'Answer as {"label": "…", "n": {0}} {unknown} {} {text!r} {labels}: T'
    )


@given(st.lists(st.sampled_from(["{", "}", "{text}", "{context}", "{labels}", "\\1", "x"])))
def test_a_record_is_shown_as_it_is(pieces):
    text = "".join(pieces)
    task = task_of("classify", prompt="<{text}|{context}>")
    assert user_turn(task, text, context=text) == f"<{text}|{text}>"


def test_a_reply_without_context_shows_the_question_alone():
    assert user_turn(task_of("reply"), "Where?") == "Where?"
    assert user_turn(task_of("reply"), "Where?", context="") == "Where?"


# --- Free text


@pytest.mark.parametrize(
    ("kind", "reply", "text"),
    [
        ("summarize", "  It rains.\n", "It rains."),
        ("summarize", "Summary: It rains.", "It rains."),
        ("summarize", "**Summary:**\nIt rains.", "It rains."),
        ("summarize", "Here's a one-sentence summary of the text:\n\n“It rains.”", "It rains."),
        ("summarize", "The minister gave a summary: it rains.", None),
        ("summarize", "Summary judgment: it rains.", None),
        ("summarize", "Note: it rains.", None),
        ("summarize", '"Rain" is not "snow"', None),
        ("summarize", '"It rains', None),
        ("summarize", '"', None),
        ("summarize", "First line: a summary: b", None),
        ("summarize", "<think>Is this a summary: no</think>\nIt rains.", "It rains."),
        ("translate", "Here is the German translation: »Es regnet.«", "Es regnet."),
        ("translate", "Translation: Es regnet.", "Es regnet."),
        ("translate", "Summary: Es regnet.", None),
        ("reply", "Answer: 'yes'", "yes"),
        ("reply", "'It's fine'", None),
        ("reply", "🙂", None),
    ],
)
def test_lead_ins_and_quotes_are_dropped_only_where_they_clearly_are_such(kind, reply, text):
    assert task_of(kind).parse(reply) == Parsed(reply if text is None else text)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("reply", ["", " \n\t", "<think>so many words that the limit cut"])
def test_empty_replies_are_refused(kind, reply):
    error = refused(task_of(kind), reply)
    assert error.reason is Reason.EMPTY_ANSWER
    assert "expected" in error.message


@pytest.mark.parametrize("reply", ["Summary:", 'Summary: ""', "''"])
def test_a_lead_in_alone_is_empty(reply):
    assert refused(task_of("summarize"), reply).reason is Reason.EMPTY_ANSWER


# --- Labels


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("positive", "positive"),
        (" **Very  Positive**. ", "very positive"),
        ("\uff30ositive", "positive"),  # full width
        ("The label is 'negative'.", "negative"),
        ("Label: negative\nThe text is negative because it says so.", "negative"),
        ("I find it very positive!", "very positive"),
        ("<think>negative? no.</think>positive", "positive"),
    ],
)
def test_labels_found(reply, label):
    assert task_of("classify").parse(reply) == Parsed(label, label=label)


@pytest.mark.parametrize(
    "reply",
    ["neutral", "positive or negative", "very positive, so positive", "positively", "non-positive"],
)
def test_no_label_or_several_are_unparsable(reply):
    error = refused(task_of("classify"), reply)
    assert error.reason is Reason.UNPARSABLE_ANSWER
    assert error.message == (
        f"expected one of the labels positive, very positive, negative, got {reply!r}"
    )


def test_only_the_start_of_a_reply_is_quoted():
    error = refused(task_of("classify"), "x" * 1000)
    assert "x" * 80 + "'…" in error.message
    assert "x" * 81 not in error.message


@pytest.mark.parametrize(
    ("labels", "reply", "label"),
    [
        (("-1", "0", "1"), "-1", "-1"),
        (("-1", "0", "1"), "It is 1.", "1"),
        (("-1", "0", "1"), "0.5", None),
        (("-1", "0", "1"), "2.1", None),
        (("C", "C++"), "C++", "C++"),
        (("C", "C++"), "This is C++ code", "C++"),
        (("+", "-"), "+", "+"),
        (("Não", "Sim"), "NÃO", "Não"),
        (("a.b", "axb"), "see axb", "axb"),
    ],
)
def test_unusual_labels(labels, reply, label):
    task = task_of("classify", labels=labels)
    if label is None:
        assert refused(task, reply).reason is Reason.UNPARSABLE_ANSWER
    else:
        assert task.parse(reply).label == label


def test_labels_that_replies_cannot_tell_apart_are_refused():
    with pytest.raises(ValidationError, match="labels: Yes, yes!: at least two"):
        task_of("classify", labels=("Yes", "yes!"))


# --- Numbers


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("7", 7.0),
        ("Score: 7.5.", 7.5),
        ("7,5", 7.5),
        ("7/10", 7.0),
        ("I'd say 7 out of 10", 7.0),
        ("7-8", 7.0),
        ("rating-7", 7.0),
        ("On a scale from 0 to 10, I give it a 9", 9.0),
        ("Score (0-10): 8", 8.0),
        ("10", 10.0),
        ("0", 0.0),
        ("GPT4 would say 6", 6.0),
        ("<think>maybe 3</think>4", 4.0),
    ],
)
def test_numbers_found(reply, value):
    parsed = task_of("score").parse(reply)
    assert parsed.value == value
    assert parsed.text == json.dumps(value).removesuffix(".0")


@pytest.mark.parametrize(
    "reply", ["11", "-1", "−3", "10.5", "1,000", "4/5", "seven", "9" * 400, "0 to 10"]
)
def test_no_number_in_the_range_is_unparsable(reply):
    error = refused(task_of("score"), reply)
    assert error.reason is Reason.UNPARSABLE_ANSWER
    assert error.message.startswith("expected a number from 0 to 10, got ")


def test_negative_ranges():
    task = task_of("score", minimum=-1.0, maximum=1.0)
    assert task.parse("On a scale of -1 to 1: -0.5").value == -0.5
    assert task.parse("−1").value == -1.0


# --- Parts


PARTS = (Part("One.", "\n\n"), Part("Two.", " "), Part("Three."))


def answers(*texts: str) -> list[Parsed]:
    return [Parsed(text, label=text) for text in texts]


def test_summaries_are_joined_a_paragraph_each():
    joined = task_of("summarize").join(answers("a", "b", "c"), PARTS)
    assert joined == Parsed("a\n\nb\n\nc")


def test_translations_keep_the_sources_separators():
    joined = task_of("translate").join(answers("Um.", "Dois.", "Três."), PARTS)
    assert joined == Parsed("Um.\n\nDois. Três.")


@pytest.mark.parametrize(
    ("labels", "label"), [("abb", "b"), ("aba", "a"), ("bac", "b"), ("cba", "c")]
)
def test_the_label_of_most_parts_then_of_the_first(labels, label):
    assert task_of("classify").join(answers(*labels), PARTS) == Parsed(label, label=label)


def test_the_mean_of_the_parts_scores():
    scores = [Parsed("", value=value) for value in (1.0, 2.0, 6.5)]
    assert task_of("score").join(scores[:2], PARTS[:2]) == Parsed("1.5", value=1.5)
    assert task_of("score").join([*scores, *scores[1:2]], PARTS).value == 2.875


def words_fit(limit: int):
    return lambda text, context: len(f"{text} {context or ''}".split()) <= limit


def test_a_text_is_cut_and_its_context_shown_with_every_part():
    fitted = task_of("summarize").fit("  one two three ", "c", words_fit(3))
    assert fitted == Fitted((Part("one two", " "), Part("three")), "c", 2)


FACTS = (
    "The shop opens at nine and the staff arrive at eight.\n\n"
    + "Nothing of interest is said in this passage, however long it is. " * 6
    + "\n\nA parcel can be returned within thirty days of delivery.\n\n"
    + "The shop has a garden and the garden has a wall. " * 6
)


def test_a_context_too_long_keeps_what_says_most_about_the_question():
    question = "Can the parcel be returned?"
    fitted = task_of("reply").fit(question, FACTS, words_fit(40))
    assert fitted.parts == (Part(question),)
    assert fitted.context is not None
    assert "A parcel can be returned within thirty days" in fitted.context
    assert len(f"{question} {fitted.context}".split()) <= 40
    assert fitted.num_parts > 1


def test_kept_passages_stand_in_their_own_order():
    fitted = task_of("reply").fit("returned parcel? shop staff?", FACTS, words_fit(180))
    assert fitted.context is not None
    assert fitted.context.index("staff arrive") < fitted.context.index("parcel can be")


def test_of_equal_passages_the_earlier_is_kept():
    context = ("alpha beta " * 36).strip() + "\n\n" + ("gamma delta " * 33).strip()
    fitted = task_of("reply").fit("unrelated?", context, words_fit(80))
    assert fitted.context is not None
    assert "alpha" in fitted.context
    assert "gamma" not in fitted.context


@pytest.mark.parametrize("context", [None, "some context"])
def test_a_question_is_never_cut(context):
    with pytest.raises(RecordError, match="the question alone") as caught:
        task_of("reply").fit("one two three four", context, words_fit(3))
    assert caught.value.reason is Reason.TOO_LONG
