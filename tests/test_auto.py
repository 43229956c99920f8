"""`auto` chooses among mbr, best and vote by what the corpus shows, and says why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import METHODS, MergeSpec
from mas_batch.aggregate.reductions import Partial
from mas_batch.job_file import check_job
from mas_batch.merging import check_merging, merge_spec
from mas_batch.stages.publishing import _merge_facts
from tests.test_merge import answer, records, table
from tests.test_merge import spec as vote_spec

LEARNING = METHODS["auto"].weights[None]
TEXTS = ("the cat sat on the old mat", "the cat sat on the mat", "a dog ran over the hill")


def spec() -> MergeSpec:
    return replace(vote_spec(), method="auto", utility="chrf", agents=("beam", "greedy", "hot"))


def row(record: str, agent: str, text: str, logprob: float | None = None) -> dict[str, Any]:
    return answer(record, agent, text, sum_logprob=logprob, completion_tokens=1)


def chosen(rows: Sequence[Mapping[str, Any]], families: Mapping[str, str]) -> tuple[MergeSpec, str]:
    """Learn from the rows, counted in two partitions; returns the merge and why."""
    assert LEARNING is not None
    halves = [[r for r in rows if (r["record_id"] < "r2") == first] for first in (True, False)]
    auto = spec()
    partials: list[Partial] = [
        LEARNING.count(table(*half), auto, auto.agents, None) for half in halves
    ]
    counts = LEARNING.reduction.combine(partials)
    assert LEARNING.reduction.combine(partials[::-1]) == counts
    text = LEARNING.find(json.loads(json.dumps(counts)), auto, auto.agents, families, None)
    lesson = LEARNING.read(auto, text)
    return lesson.spec, lesson.why


def rows_of(texts: Mapping[str, str], logprobs: Mapping[str, float | None]) -> list[dict[str, Any]]:
    return [
        row(f"r{i}", agent, text.format(i), logprobs.get(agent))
        for i in range(4)
        for agent, text in texts.items()
    ]


OF_ONE_MODEL = dict.fromkeys(("beam", "greedy", "hot"), "one model")
OF_THREE = {"beam": "a", "greedy": "b", "hot": "c"}
ALIKE = dict(zip(OF_ONE_MODEL, TEXTS, strict=True))
LOGPROBS: dict[str, float | None] = {"beam": -0.1, "greedy": -0.2, "hot": -0.3}


def test_of_one_model_the_likeliest_agent_is_published_not_the_consensus() -> None:
    rows = rows_of(ALIKE, LOGPROBS)
    rows[2] = row("r0", "hot", TEXTS[1], -0.01)
    found, why = chosen(rows, OF_ONE_MODEL)
    assert "best: beam, greedy, hot are of one model" in why
    assert "beam's answers are the likeliest" in why
    merged, _ = merge_answers(records("r0"), table(*rows[:3]), found)
    assert merged["answer"].to_pylist() == [TEXTS[0]]
    assert merged["confidence_kind"].to_pylist() == ["expected_utility"]
    assert merged["support"].to_pylist()[0][0]["agents"] == ["beam"]
    assert _merge_facts(found)["chosen_by"] == "auto"


def test_an_answer_that_the_others_contradict_is_not() -> None:
    rows = rows_of(ALIKE, LOGPROBS)
    rows[:3] = [row("r0", agent, text, LOGPROBS[agent])
                for agent, text in zip(ALIKE, (TEXTS[2], *TEXTS[:2]), strict=True)]  # fmt: skip
    merged, _ = merge_answers(records("r0"), table(*rows[:3]), chosen(rows, OF_ONE_MODEL)[0])
    assert merged["answer"].to_pylist()[0] in TEXTS[:2]


def test_an_agent_that_nobody_supports_does_not_make_a_model_s_consensus_evidence() -> None:
    families = {"beam": "one model", "greedy": "one model", "hot": "another"}
    texts = {**ALIKE, "hot": "zzz qqq {}"}
    assert "best: beam, greedy are of one model" in chosen(rows_of(texts, LOGPROBS), families)[1]


@pytest.mark.parametrize(
    ("families", "logprobs"),
    [
        (OF_THREE, LOGPROBS),
        (OF_ONE_MODEL, {**LOGPROBS, "hot": None}),  # an answer that does not say
    ],
)
def test_else_free_texts_are_merged_by_learned_mbr(
    families: dict[str, str], logprobs: dict[str, float | None]
) -> None:
    texts = {"beam": TEXTS[0], "greedy": TEXTS[1], "hot": "the cat sat on a mat"}
    found, _ = chosen(rows_of(texts, logprobs), families)
    assert (found.method, found.weights) == ("mbr", "learned")
    assert found.accuracies.keys() == {"beam", "greedy", "hot"}


def test_short_answers_that_most_agents_give_are_voted_on() -> None:
    texts = {"beam": "Lisbon {}", "greedy": "lisbon {}", "hot": "Porto {}"}
    found, why = chosen(rows_of(texts, {}), OF_THREE)
    assert found.method == "vote"
    assert "100% of the records have a majority for one short answer" in why


def job(**sections: Any) -> Any:
    agents = [{"name": name, "model": f"echo:{name}"} for name in ("a", "b", "c")]
    return check_job(
        {
            "name": "j",
            "corpus": {"path": "c.txt"},
            "task": {"kind": "translate", "language": "fr"},
            "agents": sections.pop("agents", agents),
            "output": {"path": "runs"},
            **sections,
        }
    )


def test_auto_is_the_default_of_free_texts_where_there_is_something_to_choose() -> None:
    assert merge_spec(job()).method == "auto"
    one = {"agents": [{"name": "a", "model": "echo:a"}]}
    weights = {"merge": {"weights": "learned"}}
    known = {"merge": {"accuracies": {"a": 0.9}}}
    for sections in (one, weights, known):
        assert merge_spec(job(**sections)).method == "mbr"
    check_merging(job(routing={"escalate": {"agent": "c", "below": 0.5}}))
    check_merging(job(routing={"adaptive": {"first": 2, "confidence": 0.9}}))
