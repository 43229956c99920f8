"""Batches under a token budget, and what becomes of a batch that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.agents.account import add
from mas_batch.engines.base import Completion, Message, Request, Sampling, TokenizedPrompt
from mas_batch.engines.batching import complete, next_batch, plan_batches
from mas_batch.engines.claims import MAX_COUNT
from mas_batch.errors import EngineError, OutOfMemoryError, Reason
from mas_batch.records import Answer

LENGTHS = st.lists(st.integers(0, 300), max_size=60)


@dataclass
class UpperCase:
    """An engine that answers with the text in capitals; a token is a character."""

    culprits: frozenset[str] = frozenset()
    """Requests that fail every batch they are in."""
    max_rows: int = 10**6
    """More rows than this are out of memory."""
    memory_error: type[Exception] = OutOfMemoryError
    max_context_tokens: int = 1000
    max_batch_tokens: int | None = None
    takes_messages: bool = True
    batches: list[list[str]] = field(default_factory=list)
    """The ids of every batch that was asked for, failed ones too."""

    def tokenize(self, request: Request) -> TokenizedPrompt:
        return TokenizedPrompt(len(request.text))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.batches.append([request.request_id for request in requests])
        if len(requests) > self.max_rows:
            raise self.memory_error(f"{len(requests)} rows")
        if bad := self.culprits.intersection(self.batches[-1]):
            raise EngineError(f"cannot do {', '.join(sorted(bad))}")
        return [
            [self._answer(r, f"{r.text.upper()}{s}") for s in range(sampling.num_samples)]
            for r in requests
        ]

    def _answer(self, request: Request, text: str) -> Completion:
        return Completion(text, (), None, len(text), "stop", self.tokenize(request).num_tokens)

    def describe(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None: ...


def _requests(texts: Sequence[str]) -> list[Request]:
    return [Request(f"r{i}", text, (Message("user", text),)) for i, text in enumerate(texts)]


@given(LENGTHS, st.integers(0, 50), st.none() | st.integers(1, 2000), st.integers(1, 5))
def test_a_plan_holds_every_position_once_within_the_budget(
    lengths: list[int], new: int, budget: int | None, samples: int
) -> None:
    batches = plan_batches(lengths, new, budget, num_samples=samples)

    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    for batch in batches:
        cost = len(batch) * samples * (max(lengths[i] for i in batch) + new)
        assert budget is None or cost <= budget or len(batch) == 1


@given(LENGTHS, st.integers(1, 2000))
def test_a_plan_goes_from_long_to_short(lengths: list[int], budget: int) -> None:
    in_order = [lengths[i] for batch in plan_batches(lengths, 8, budget) for i in batch]
    assert in_order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 300), min_size=2, max_size=40), st.integers(10, 2000))
def test_a_plan_leaves_no_room_for_the_next_request(lengths: list[int], budget: int) -> None:
    for batch, _ in pairwise(plan_batches(lengths, 8, budget)):
        assert (len(batch) + 1) * (lengths[batch[0]] + 8) > budget


def test_without_a_budget_all_are_one_batch_and_none_makes_none() -> None:
    assert plan_batches([1, 3, 2], 8, None) == [[1, 2, 0]]
    assert plan_batches([], 8, None) == plan_batches([], 8, 100) == []


@given(st.data(), st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(0, 50))
def test_the_next_batch_holds_one_of_the_oldest_within_the_budget(
    data: st.DataObject, lengths: list[int], new: int
) -> None:
    oldest = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))
    budget = data.draw(st.none() | st.integers(1, 2000))

    batch = next_batch(lengths, oldest, new, budget)

    assert len(set(batch)) == len(batch)
    assert oldest.intersection(batch)
    longest = max(lengths[i] for i in batch)
    assert budget is None or len(batch) * (longest + new) <= budget or len(batch) == 1
    in_order = [lengths[i] for i in batch]
    assert in_order == sorted(in_order, reverse=True)
    if budget is None:
        assert len(batch) == len(lengths)


def test_the_last_batch_is_filled_up_with_longer_requests() -> None:
    assert next_batch([1, 9, 1, 8, 2], {0}, 0, 18) == [4, 0, 2]
    assert next_batch([1, 9, 9, 3, 4], {0}, 0, 12) == [4, 3, 0]
    assert next_batch([9, 9, 1], {2}, 0, 9) == [2], "there is no room for a longer one"


@given(
    st.lists(st.text("abc", max_size=30), max_size=30),
    st.integers(1, 200),
    st.integers(1, 7),
    st.integers(1, 3),
    st.data(),
)
def test_every_request_is_answered_in_its_place(
    texts: list[str], budget: int, max_rows: int, samples: int, data: st.DataObject
) -> None:
    ids = [f"r{i}" for i in range(len(texts))]
    culprits = data.draw(st.frozensets(st.sampled_from(ids)) if ids else st.just(frozenset()))
    engine = UpperCase(culprits, max_rows, max_batch_tokens=budget)

    answers = complete(engine, _requests(texts), Sampling(4, num_samples=samples))

    for name, text, completions in zip(ids, texts, answers, strict=True):
        if name in culprits:
            assert [c.reason for c in completions] == [Reason.ENGINE_ERROR] * samples
            assert completions[0].finish_reason == "error"
            assert completions[0].message == f"EngineError: cannot do {name}"
        else:
            assert [c.text for c in completions] == [f"{text.upper()}{s}" for s in range(samples)]


@pytest.mark.parametrize("memory_error", [OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved(memory_error: type[Exception]) -> None:
    engine = UpperCase(max_rows=2, memory_error=memory_error)

    answers = complete(engine, _requests(["a"] * 8), Sampling(4))

    assert all(completions[0].reason is None for completions in answers)
    assert [len(batch) for batch in engine.batches] == [8, 4, 2, 2, 4, 2, 2]


def test_one_row_that_does_not_fit_is_out_of_memory() -> None:
    answers = complete(UpperCase(max_rows=0), _requests(["abc"]), Sampling(4, num_samples=2))

    assert [[c.reason for c in completions] for completions in answers] == [
        [Reason.OUT_OF_MEMORY] * 2
    ]
    assert answers[0][0].prompt_tokens == 3
    assert "0" not in answers[0][0].text


def test_one_culprit_costs_a_logarithm_of_batches() -> None:
    engine = UpperCase(culprits=frozenset({"r5"}))

    complete(engine, _requests(["a"] * 64), Sampling(4))

    assert len(engine.batches) == 1 + 2 * 6


def test_a_prompt_without_room_for_the_answer_never_reaches_the_engine() -> None:
    engine = UpperCase(max_context_tokens=10)

    answers = complete(engine, _requests(["a" * 7, "a" * 6, "a" * 700]), Sampling(4))

    assert [completions[0].reason for completions in answers] == [
        Reason.TOO_LONG,
        None,
        Reason.TOO_LONG,
    ]
    assert answers[0][0].message == ("7 prompt tokens + 4 new are over the model's context of 10")
    assert engine.batches == [["r1"]]


@dataclass
class Boaster(UpperCase):
    """An engine whose claims about a completion no table can hold."""

    claims: Mapping[str, Any] = field(default_factory=dict)

    def _answer(self, request: Request, text: str) -> Completion:
        return replace(super()._answer(request, text), **self.claims)


@pytest.mark.parametrize(
    ("name", "claimed", "kept"),
    [
        ("num_tokens", 2**31, None),
        ("num_tokens", -1, None),
        ("prompt_tokens", 2**40, None),
        ("sum_logprob", float("nan"), None),
        ("sum_logprob", float("-inf"), None),
        ("compute_s", float("nan"), 0.0),
        ("compute_s", -1.0, 0.0),
        ("prefill_s", float("inf"), None),
    ],
)
def test_a_claim_that_makes_no_sense_is_null(name: str, claimed: float, kept: float | None) -> None:
    engine = Boaster(claims={name: claimed})
    ((completion,),) = complete(engine, _requests(["a"]), Sampling(4))
    assert getattr(completion, name) == kept
    assert completion.text == "A0"


def test_counts_of_parts_that_add_up_to_more_than_a_table_holds_are_null() -> None:
    completion = Completion("a", (), None, MAX_COUNT, "stop", MAX_COUNT)
    answer = add(Answer("r", "a", "f", 0, None), [completion] * 2)
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)
    assert add(Answer("r", "a", "f", 0, None), [completion]).prompt_tokens == MAX_COUNT
