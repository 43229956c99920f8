"""Answering a partition: one answer per good record and sample, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch import job
from mas_batch.agents.answering import AgentProfile, answer_records, prompt_hash
from mas_batch.engines import load_engine
from mas_batch.engines.base import (
    Completion,
    Engine,
    EngineClient,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.client import LoopClient
from mas_batch.engines.loop import EngineLoop
from mas_batch.errors import Reason, RunError
from mas_batch.models import fetch
from mas_batch.records import Answer, Record
from mas_batch.tasks import Task, make_task
from tests.direct_client import DirectClient

GREEDY = Sampling(max_new_tokens=4)
PROFILE = AgentProfile("agent", "family", "{text}", "", GREEDY)


@dataclass
class Recorder:
    """A real engine that says what it was asked in capitals, and keeps the requests.

    A token is a word. Every reply has log-probability -1 and takes a second.
    """

    max_context_tokens: int = 1000
    max_batch_tokens: int | None = None
    takes_messages: bool = True
    only_translates: bool = False
    samples: bool = True
    calls: list[list[Request]] = field(default_factory=list)

    tokenized: list[str] = field(default_factory=list)

    def tokenize(self, request: Request) -> TokenizedPrompt:
        self.tokenized.append(request.text)
        turns = request.messages if self.takes_messages else ()
        own = sum(len(turn.content.split()) for turn in turns) or len(request.text.split())
        return TokenizedPrompt(own)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append(list(requests))
        return [[self._one(r, sampling, s) for s in range(sampling.num_samples)] for r in requests]

    def describe(self) -> Mapping[str, Any]:
        return {"engine": "recorder"}

    def close(self) -> None:
        """Nothing to free."""

    def _one(self, request: Request, sampling: Sampling, sample: int) -> Completion:
        words = request.text.upper().split()
        said = words[: sampling.max_new_tokens]
        said += ["!"] * sample
        finish_reason = "length" if len(words) > sampling.max_new_tokens else "stop"
        prompt_tokens = tokenized_prompt(self, request).num_tokens
        return Completion(
            " ".join(said), (), -1.0, len(said), finish_reason, prompt_tokens, compute_s=1.0
        )

    @property
    def texts(self) -> list[list[str]]:
        return [[request.text for request in call] for call in self.calls]


def echo(**options: Any) -> Engine:
    return load_engine("echo", fetch("echo"), EngineConfig(options=options))


def task_of(kind: str, **keys: Any) -> Task:
    if kind == "classify":
        keys.setdefault("labels", ("A", "B"))
    return make_task(job.Task(kind=kind, **keys))  # type: ignore[arg-type]


def records_of(*texts: str) -> list[Record]:
    return [Record(f"r{i}", text) for i, text in enumerate(texts)]


def ask(
    texts: Sequence[str], engine: Engine, kind: str = "translate", profile: AgentProfile = PROFILE
) -> list[Answer]:
    return answer_records(records_of(*texts), task_of(kind), DirectClient(engine), profile)


def samples(number: int) -> AgentProfile:
    return replace(PROFILE, sampling=replace(GREEDY, num_samples=number, temperature=1.0))


# --- Whole texts


def test_an_answer_holds_all_that_is_known():
    (answer,) = ask(["one two"], Recorder())
    assert answer == Answer(
        record_id="r0",
        agent_id="agent",
        family_id="family",
        sample_id=0,
        text="ONE TWO",
        sum_logprob=-1.0,
        prompt_tokens=2,
        completion_tokens=2,
        t_compute_s=1.0,
    )


def test_a_text_that_fits_is_tokenized_once():
    engine = Recorder()
    ask(["one two", "three"], engine)
    assert engine.tokenized == ["one two", "three"]


@pytest.mark.parametrize(
    ("kind", "text", "label", "value"), [("classify", "b", "B", None), ("score", "7", None, 7.0)]
)
def test_labels_and_values_are_parsed(kind, text, label, value):
    (answer,) = ask([text], Recorder(), kind)
    assert (answer.label, answer.value) == (label, value)


def test_one_answer_per_record_and_sample_in_order():
    answers = ask(["a", "b"], Recorder(), profile=samples(2))
    assert [(a.record_id, a.sample_id, a.text) for a in answers] == [
        ("r0", 0, "A"),
        ("r0", 1, "A !"),
        ("r1", 0, "B"),
        ("r1", 1, "B !"),
    ]


def test_unusable_records_are_not_asked_about():
    bad = Record("bad", None, reason=Reason.MISSING_TEXT)
    engine = Recorder()
    answers = answer_records(
        [bad, *records_of("x")], task_of("translate"), DirectClient(engine), PROFILE
    )
    assert [answer.record_id for answer in answers] == ["r0"]
    assert engine.texts == [["x"]]
    assert answer_records([bad], task_of("translate"), DirectClient(engine), PROFILE) == []


def test_a_record_without_text_and_reason_breaks_the_contract():
    with pytest.raises(RunError, match="'odd' has neither"):
        answer_records(
            [Record("odd", None)], task_of("translate"), DirectClient(Recorder()), PROFILE
        )


def test_the_agents_prompt_and_the_records_context_reach_the_engine():
    engine = Recorder()
    profile = replace(PROFILE, prompt="{context}: {text}", system="be {language}")
    record = Record("r", "where?", context="in Rome")
    answer_records([record], task_of("reply"), DirectClient(engine), profile)
    ((request,),) = engine.calls
    assert [turn.content for turn in request.messages] == ["be English", "in Rome: where?"]
    assert request.text == "where?"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("error", Reason.ENGINE_ERROR),
        ("out_of_memory", Reason.OUT_OF_MEMORY),
        ("unparsable", Reason.UNPARSABLE_ANSWER),
    ],
)
def test_what_fails_fails_alone(fault, reason):
    engine = echo(faults={"bad": fault}, labels=["A", "B"])
    good, bad, other = ask(["good", "bad", "other"], engine, "classify")
    assert (good.reason, other.reason) == (None, None)
    assert {good.label, other.label} <= {"A", "B"}
    assert (bad.reason, bad.text, bad.label, bad.sum_logprob) == (reason, None, None, None)
    assert bad.finish_reason == ("stop" if fault == "unparsable" else "error")
    assert bad.message


def test_an_unparsable_reply_keeps_what_it_took():
    (answer,) = ask(["many words but no number"], Recorder(), "score")
    assert answer.reason is Reason.UNPARSABLE_ANSWER
    assert answer.message == "expected a number from 0 to 10, got 'MANY WORDS BUT NO'"
    assert (answer.completion_tokens, answer.t_compute_s) == (4, 1.0)
    assert (answer.finish_reason, answer.sum_logprob) == ("length", None)


# --- Seeds


def seeds(texts: Sequence[str], profile: AgentProfile = PROFILE) -> dict[str, int]:
    engine = Recorder(max_context_tokens=8)
    ask(texts, engine, profile=profile)
    return {request.text: request.seed for call in engine.calls for request in call}


def test_seeds_do_not_depend_on_neighbours():
    together = seeds(["a", "b", "c d e f g h"])
    assert seeds(["a"])["a"] == together["a"]
    assert len(set(together.values())) == len(together) == 4
    assert all(0 <= seed < 2**63 for seed in together.values())


@pytest.mark.parametrize("change", [{"seed": 1}, {"agent_id": "other"}])
def test_seeds_depend_on_the_agent(change):
    assert seeds(["a"], replace(PROFILE, **change)) != seeds(["a"])


def test_seeds_are_the_same_for_ever():
    assert seeds(["a"]) == {"a": 1551941543086708654}


def test_answers_do_not_depend_on_the_partition():
    texts = [f"record {i} with some more words" for i in range(6)]
    whole = ask(texts, echo(), profile=samples(3))
    for i, record in enumerate(records_of(*texts)):
        alone = answer_records([record], task_of("translate"), DirectClient(echo()), samples(3))
        expected = whole[3 * i : 3 * i + 3]
        assert [replace(a, t_compute_s=0.0) for a in alone] == [
            replace(a, t_compute_s=0.0) for a in expected
        ]


# --- Texts over the context: 8 tokens, 4 of them for the answer


LONG = "One two.\n\nThree four. Five six seven."


def test_parts_are_asked_in_the_first_call_and_joined():
    engine = Recorder(max_context_tokens=8)
    short, long = ask(["short", LONG], engine)
    (call,) = engine.texts
    assert sorted(call) == ["Five six seven.", "One two.\n\nThree four.", "short"]
    assert (short.text, short.num_parts) == ("SHORT", 1)
    assert (long.text, long.num_parts) == ("ONE TWO. THREE FOUR. FIVE SIX SEVEN.", 2)


def test_parts_add_up():
    engine = Recorder(max_context_tokens=8)
    (answer,) = ask(["a b c d e f g h i"], engine)
    assert answer.num_parts == 3
    assert (answer.text, answer.finish_reason) == ("A B C D E F G H I", "stop")
    assert (answer.sum_logprob, answer.t_compute_s) == (-3.0, 3.0)
    assert (answer.prompt_tokens, answer.completion_tokens) == (9, 9)


def test_a_likelihood_that_is_not_known_of_every_part_is_not_known():
    (answer,) = ask(["a b c d e f"], echo(max_context_tokens=8))
    assert answer.num_parts == 2
    assert answer.sum_logprob is None


def test_samples_are_joined_sample_by_sample():
    engine = Recorder(max_context_tokens=8)
    answers = ask(["a b c d e f"], engine, profile=samples(3))
    assert [a.text for a in answers] == ["A B C D E F", "A B C D ! E F !", "A B C D ! ! E F ! !"]


def test_an_answer_is_cut_if_a_part_is():
    profile = replace(PROFILE, sampling=Sampling(max_new_tokens=2))
    (answer,) = ask(["a b c d e f g"], Recorder(max_context_tokens=8), profile=profile)
    assert (answer.text, answer.finish_reason) == ("A B G", "length")


def test_a_part_that_fails_fails_its_record_and_says_which():
    engine = echo(max_context_tokens=8, faults={"e": "error"})
    bad, good = ask(["a b c d e f", "g h"], engine)
    assert (bad.reason, bad.text, bad.num_parts) == (Reason.ENGINE_ERROR, None, 2)
    assert bad.message.startswith("part 2 of 2: EngineError: fault")
    assert bad.completion_tokens == 4
    assert good.text == "g h"


# Summaries of parts: the parts hold `context - 4` words, so do the prompts that merge them


MERGE = job.Task(kind="summarize", evidence=0, max_new_tokens=4)
SHOWN = "(summaries of consecutive parts of one document, in order)"
"""What the prompt says of the answers: 9 words."""


def words(number: int) -> str:
    return " ".join(f"w{i}" for i in range(number))


def summarize(
    text: str, engine: Engine, profile: AgentProfile = PROFILE, **keys: Any
) -> list[Answer]:
    task = make_task(MERGE.model_copy(update=keys))
    return answer_records(records_of(text), task, DirectClient(engine), profile)


def test_summaries_are_merged_level_by_level():
    engine = Recorder(max_context_tokens=24)
    (answer,) = summarize(words(84), engine)
    # 84 words in parts of 20; 5 answers of 4 words; a prompt has room for 11 words of answers.
    assert [sorted(call) for call in engine.texts[1:]] == [
        ["W0 W1 W2 W3\n\nW20 W21 W22 W23", "W40 W41 W42 W43\n\nW60 W61 W62 W63"],
        ["W0 W1 W2 W3\n\nW40 W41 W42 W43"],
        ["W0 W1 W2 W3\n\nW80 W81 W82 W83"],  # the fifth part's went up unchanged
    ]
    assert answer.text == "W0 W1 W2 W3"
    assert (answer.num_parts, answer.finish_reason) == (5, "length")
    assert (answer.sum_logprob, answer.t_compute_s) == (-9.0, 9.0)
    assert answer.completion_tokens == 9 * 4
    assert answer.prompt_tokens == 84 + 4 * (9 + 8)
    assert engine.calls[1][0].messages[-1].content.split("\n\n")[0] == SHOWN


def test_tasks_that_share_a_loop_are_answered_as_if_each_were_alone():
    texts = [[words(30), "short", words(25)], [words(7), words(50)], [words(26)]]

    def answered(asked: list[str], client: EngineClient) -> list[Answer]:
        return answer_records(records_of(*asked), make_task(MERGE), client, samples(2))

    engine = Recorder(max_context_tokens=24, max_batch_tokens=100)
    loop = EngineLoop(lambda: engine)
    with closing(loop), ThreadPoolExecutor(3) as threads:
        found = [threads.submit(answered, each, LoopClient(loop, engine)) for each in texts]
        for own, each in zip(found, texts, strict=True):
            alone = Recorder(max_context_tokens=24, max_batch_tokens=100)
            assert own.result() == answered(each, DirectClient(alone))


def test_evidence_of_the_source_goes_along():
    engine = Recorder(max_context_tokens=40)
    text = "The dam failed. " * 8 + "A cat sat. " + "Rain made the river rise. " * 6
    (answer,) = summarize(text, engine, evidence=1)
    merge = engine.texts[-1][0]
    assert merge == "THE DAM FAILED. THE\n> The dam failed.\n\nRAIN MADE THE RIVER"  # five words
    assert answer.text == "THE DAM FAILED. THE"


def test_all_records_and_samples_share_the_call_of_a_level():
    engine = Recorder(max_context_tokens=24)
    texts = [words(30), "short", words(25)]
    records = records_of(*texts)
    answers = answer_records(records, make_task(MERGE), DirectClient(engine), samples(2))
    assert [len(call) for call in engine.calls] == [5, 4]
    assert [(a.record_id, a.sample_id, a.text) for a in answers] == [
        ("r0", 0, "W0 W1 W2 W3"),
        ("r0", 1, "W0 W1 W2 W3"),
        ("r1", 0, "SHORT"),
        ("r1", 1, "SHORT !"),
        ("r2", 0, "W0 W1 W2 W3"),
        ("r2", 1, "W0 W1 W2 W3"),
    ]
    later = engine.calls[1]
    assert len({request.seed for request in later}) == len({r.request_id for r in later}) == 4
    assert any("!" in request.text for request in later)  # a sample merges its own answers


class Finisher(Recorder):
    """Ends by itself when it merges."""

    def _one(self, request: Request, sampling: Sampling, sample: int) -> Completion:
        completion = Recorder._one(self, request, sampling, sample)
        ended = "\n\n" in request.text
        return replace(completion, finish_reason="stop") if ended else completion


def test_the_last_merge_says_whether_the_answer_was_cut():
    (answer,) = summarize(words(30), Finisher(max_context_tokens=24))
    assert (answer.finish_reason, answer.text) == ("stop", "W0 W1 W2 W3")
    profile = replace(PROFILE, sampling=Sampling(max_new_tokens=4))
    engine = echo(max_context_tokens=24, words=4)
    (answer,) = summarize(words(30), engine, profile)
    assert (answer.finish_reason, answer.text) == ("stop", "w0 w1 w2 w3")
    (answer,) = summarize(words(30), engine, profile, long_documents="join")
    assert (answer.finish_reason, answer.text) == ("stop", "w0 w1 w2 w3\n\nw20 w21 w22 w23")
    (answer,) = summarize(words(30), echo(max_context_tokens=24), profile, long_documents="join")
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("bad", "message", "tokens"),
    [
        ("w25", "part 2 of 3: EngineError: fault", 8),
        ("w0 w1 w2 w3\n\nw20", "merging parts 1 to 2: EngineError: fault", 12),
        ("w0 w1 w2 w3\n\nw40", "merging parts 1 to 3: EngineError: fault", 16),
    ],
)
def test_what_fails_on_the_way_is_named_and_what_it_took_is_kept(bad, message, tokens):
    engine = echo(max_context_tokens=24, words=4, faults={bad: "error"})
    (answer,) = summarize(words(60), engine)
    assert (answer.reason, answer.text, answer.num_parts) == (Reason.ENGINE_ERROR, None, 3)
    assert answer.message.startswith(message)
    assert (answer.finish_reason, answer.completion_tokens) == ("error", tokens)


def test_a_sentence_that_the_limit_cut_is_not_extracted():
    text = "One two. Three four five six. " * 6
    (answer,) = summarize(text, Recorder(max_context_tokens=24), long_documents="extractive")
    assert (answer.text, answer.finish_reason) == ("ONE TWO.", "length")


def test_summaries_of_which_no_two_fit_a_prompt_are_given_up():
    (answer,) = summarize(words(40), Recorder(max_context_tokens=20))
    assert answer.reason is Reason.TOO_LONG
    assert answer.message == (
        "no two neighbouring answers to its parts fit a prompt together; "
        "the context is 20 tokens, 4 of them for the answer (task.max_new_tokens)"
    )
    assert (answer.completion_tokens, answer.finish_reason, answer.num_parts) == (12, "error", 3)
    (answer,) = summarize(words(40), Recorder(max_context_tokens=20), long_documents="extractive")
    assert answer.text == "W0 W1 W2 W3"


@given(
    st.lists(st.integers(min_value=1, max_value=60), min_size=1, max_size=4),
    st.integers(min_value=1, max_value=9),
    st.integers(min_value=2, max_value=20),
    st.sampled_from(["summarize", "translate", "classify", "score", "reply"]),
)
def test_asking_ends_with_an_answer_or_a_reason_for_each(lengths, max_new, context, kind):
    texts = [" ".join(["w"] * n) for n in lengths]
    profile = replace(PROFILE, sampling=Sampling(max_new_tokens=max_new))
    answers = ask(texts, Recorder(max_context_tokens=context), kind, profile)
    assert [a.record_id for a in answers] == [f"r{i}" for i in range(len(texts))]
    assert all((a.text is None) == (a.reason is not None) for a in answers)


def test_the_prompt_counts_too():
    engine = Recorder(max_context_tokens=8)
    profile = replace(PROFILE, prompt="say it : {text}")
    (answer,) = ask(["a b"], engine, profile=profile)
    assert answer.num_parts == 2
    (answer,) = ask(["a b"], engine, profile=replace(profile, prompt="say it : please {text}"))
    assert answer.reason is Reason.TOO_LONG
    assert answer.message.startswith("not even one character")
    assert answer.finish_reason == "error"


def test_a_context_too_long_shows_in_num_parts():
    record = Record("r", "red fox?", context="a dog runs. " * 40 + "The red fox sleeps.")
    profile = replace(PROFILE, prompt="{context} {text}")
    engine = Recorder(max_context_tokens=100)
    (answer,) = answer_records([record], task_of("reply"), DirectClient(engine), profile)
    assert answer.num_parts > 1
    assert "The red fox sleeps." in engine.calls[0][0].messages[0].content


# --- Who may do what, and which prompt it was


def test_translation_models_get_parts_by_their_own_count():
    engine = Recorder(max_context_tokens=8, takes_messages=False)
    profile = replace(PROFILE, prompt="a prompt that is long but never read {text}")
    (answer,) = ask(["a b c d e f"], engine, profile=profile)
    assert (answer.text, answer.num_parts) == ("A B C D E F", 2)


def test_prompt_hash_changes_with_the_prompt_only():
    task = task_of("reply")
    base = prompt_hash(task, PROFILE)
    assert base == prompt_hash(task, replace(PROFILE, seed=3, agent_id="x", sampling=GREEDY))
    assert base == prompt_hash(task_of("translate"), PROFILE)  # the same template
    changed = [
        prompt_hash(task, replace(PROFILE, prompt="Say {text}")),
        prompt_hash(task, replace(PROFILE, system="Be brief.")),
        prompt_hash(task, replace(PROFILE, prompt=None)),
        prompt_hash(task_of("reply", language="German"), replace(PROFILE, system=None)),
        prompt_hash(task_of("reply"), replace(PROFILE, system=None)),
    ]
    assert len({base, *changed}) == 6
