"""Splitting loses nothing, fits, cuts at natural places and asks `fits` seldom."""

# ruff: noqa: RUF001 - punctuation of other scripts is meant

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.errors import Reason, RecordError
from mas_batch.tasks.splitting import Part, largest, split

TEXTS = st.text(st.sampled_from("ab ß.!?\n\t。」é字\u2029\"'") | st.characters(), max_size=200)
WORDS = st.integers(min_value=1, max_value=12)


def at_most_chars(limit: int):
    return lambda text: len(text) <= limit


def at_most_words(limit: int):
    return lambda text: len(text.split()) <= limit


@given(TEXTS, st.integers(min_value=1, max_value=40))
def test_parts_fit_and_give_the_text_back(text, limit):
    parts = split(text, at_most_chars(limit))
    assert "".join(part.text + part.separator_after for part in parts) == text
    assert all(len(part.text) <= limit for part in parts)
    assert all(part.text for part in parts) or not text
    assert not any(part.separator_after.strip() for part in parts)


@given(TEXTS, WORDS)
def test_only_the_first_part_can_begin_with_whitespace(text, limit):
    parts = split(text, at_most_words(limit))
    assert not any(part.text[0].isspace() for part in parts[1:])


@given(st.lists(st.sampled_from(["one", "two2", "three"]), min_size=1, max_size=80), WORDS)
def test_packing_is_greedy(words, limit):
    parts = split(" ".join(words), at_most_words(limit))
    assert len(parts) == math.ceil(len(words) / limit)


def test_a_text_that_fits_stays_whole():
    assert split("  one\n\ntwo  ", at_most_words(2)) == [Part("  one\n\ntwo  ")]


def test_cuts_after_paragraphs_first():
    text = "One. Two.\n\nThree three.\n \nFour. Five. Six six."
    assert split(text, at_most_words(5)) == [
        Part("One. Two.\n\nThree three.", "\n \n"),
        Part("Four. Five. Six six."),
    ]


def test_a_heading_alone_is_no_part():
    text = "Heading\n\nOne two three. Four five six."
    assert split(text, at_most_words(4)) == [
        Part("Heading\n\nOne two three.", " "),
        Part("Four five six."),
    ]


def test_cuts_after_sentences_where_a_paragraph_is_too_long():
    text = "A short one.\n\nIs this (really) so? “Yes!” It is… Well, enough of this now."
    assert [part.text for part in split(text, at_most_words(6))] == [
        "A short one.",
        "Is this (really) so? “Yes!”",
        "It is…",
        "Well, enough of this now.",
    ]


def test_an_abbreviation_before_a_small_letter_ends_no_sentence():
    text = "We met. It was approx. ten then."
    assert [part.text for part in split(text, at_most_words(5))] == [
        "We met.",
        "It was approx. ten then.",
    ]


def test_lines_are_kept_whole():
    text = "first item here\nsecond item\nthird item"
    assert split(text, at_most_words(4)) == [
        Part("first item here", "\n"),
        Part("second item\nthird item"),
    ]


def test_sentences_of_scripts_without_spaces():
    text = "これは本です。「あれは何ですか？」分かりません。"
    assert split(text, at_most_chars(12)) == [
        Part("これは本です。"),
        Part("「あれは何ですか？」"),
        Part("分かりません。"),
    ]


def test_a_word_too_long_is_cut_inside():
    assert split("ab abcdefgh ij", at_most_chars(3)) == [
        Part("ab", " "),
        Part("abc"),
        Part("def"),
        Part("gh", " "),
        Part("ij"),
    ]


def test_a_whole_word_is_not_cut_to_fill_a_part():
    assert [part.text for part in split("ab abcdefgh", at_most_chars(8))] == ["ab", "abcdefgh"]


def test_trailing_whitespace_is_a_separator():
    assert split("one two \n", at_most_words(1)) == [Part("one", " "), Part("two", " \n")]


def test_nothing_fits():
    with pytest.raises(RecordError, match="not even one character") as caught:
        split("word", lambda text: False)
    assert caught.value.reason is Reason.TOO_LONG


@given(st.integers(min_value=0, max_value=100), st.integers(min_value=0, max_value=100))
def test_largest_is_the_last_that_holds(limit, bound):
    assert largest(limit, lambda n: n <= bound) == min(limit, bound)


def test_what_is_returned_was_seen_to_fit_even_if_fits_is_not_monotone():
    # Tokenisers are a little so: a longer text can have a token less.
    def fits(text: str) -> bool:
        return len(text) <= 20 and len(text) % 7 != 3

    parts = split("word and word and another " * 20, fits)
    assert all(fits(part.text) for part in parts)


def test_fits_is_asked_seldom_and_about_short_strings():
    text = " ".join(f"word{i}" for i in range(20_000))  # one sentence: no easy place to cut
    asked: list[int] = []

    def fits(part: str) -> bool:
        asked.append(len(part))
        return len(part.split()) <= 500

    parts = split(text, fits)
    assert len(parts) == 40
    assert len(asked) <= 20 * len(parts)
    longest = max(len(part.text) for part in parts)
    # But for the first look at the whole.
    assert max(asked[1:]) <= 2.1 * longest
