"""Labels read from a model's probabilities: the answers, who may read them, whole runs, merges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mas_batch import pipeline
from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.method import MergeSpec
from mas_batch.aggregate.stopping import StoppingRule, undecided
from mas_batch.aggregate.vote import pool, vote
from mas_batch.engines.base import Completion, Request, Sampling
from mas_batch.engines.job_options import check_options
from mas_batch.errors import JobError, Reason
from mas_batch.incremental.identity import asked_as
from mas_batch.job import Job, fingerprint
from mas_batch.job import Task as TaskSection
from mas_batch.job_file import check_job
from mas_batch.merging import check_merging
from mas_batch.records import ANSWERS, Answer, Record
from mas_batch.run_folder.kept_job import as_asked
from mas_batch.run_folder.read import open_run
from mas_batch.tasks import make_task
from tests.clusters import summarizers
from tests.direct_client import DirectClient
from tests.test_answering import Recorder
from tests.test_stopping import records, rows

LABELS = ("A", "very B", "C")
TASK = make_task(TaskSection(kind="classify", labels=LABELS))
PROFILE = AgentProfile("agent", "family", "{text}", "", Sampling(4, choices=LABELS))
ASKED = {"": (-1.0, -8.0, -3.0), "like A": (-1.0, -9.0, -4.0), "like B": (-2.0, -5.0, -4.0)}
"""Text → what the model says of the labels."""


@dataclass
class Scorer(Recorder):
    """Scores choices by a table of texts and contexts; every prompt takes a second."""

    scores: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(ASKED))

    def _one(self, request: Request, sampling: Sampling, sample: int) -> Completion:
        scores = self.scores[(request.context or "") + request.text]
        return Completion(
            sampling.choices[0], (1,), scores[0], 1, "stop", 5, 1.0, 1.0,
            choice_logprobs=scores, choice_tokens=(1, 2, 1),
        )  # fmt: skip


def read(engine: Scorer, *texts: str) -> list[Answer]:
    records = [Record(f"r{i}", text) for i, text in enumerate(texts)]
    return answer_records(records, TASK, DirectClient(engine), PROFILE)


def test_a_label_is_what_the_text_speaks_for_most() -> None:
    first, second = read(Scorer(), "like A", "like B")
    odds = [math.exp(x) for x in (0, -1, -1)]  # less what is said of an empty text
    assert first.probs == pytest.approx([odd / sum(odds) for odd in odds])
    assert (first.text, first.label) == ("A", "A")
    # By its own log-probability it would be A.
    assert (second.text, second.label) == ("very B", "very B")
    assert (second.sum_logprob, second.completion_tokens) == (-5.0, 2)
    assert (second.prompt_tokens, second.finish_reason) == (5, "stop")
    # The time of the empty text is that of the records.
    assert [first.t_compute_s, first.t_prefill_s] == [1.5, 1.5]


def test_the_empty_text_is_asked_about_once() -> None:
    engine = Scorer()
    client = DirectClient(engine)
    for text in ("like A", "like B"):
        answers = answer_records([Record("r", text)], TASK, client, PROFILE)
    assert [sorted(call) for call in engine.texts] == [["", "like A"], ["like B"]]
    assert answers == [
        replace(
            read(Scorer(), "like A", "like B")[1], record_id="r", t_compute_s=1.0, t_prefill_s=1.0
        )
    ]


def test_the_empty_text_has_the_records_context() -> None:
    priors = {"X ": (-4.0, -1.0, -4.0), "Y ": (-1.0, -4.0, -4.0)}
    seen = {context + "like A": (-2.0, -2.0, -2.0) for context in ("X ", "Y ")}
    engine = Scorer(scores={**ASKED, **priors, **seen})
    client, profile = DirectClient(engine), replace(PROFILE, prompt="{context} {text}")
    contexts = ["X ", "Y ", None, "X "]
    asked = [Record(f"r{i}", "like A", context=each) for i, each in enumerate(contexts)]
    first, second, third, fourth = answer_records(asked, TASK, client, profile)
    assert engine.texts[0].count("") == 3
    odds = [math.exp(x) for x in (2, -1, 2)]
    assert first.probs == fourth.probs == pytest.approx([odd / sum(odds) for odd in odds])
    assert second.label == "very B"
    assert third.probs == read(Scorer(), "like A")[0].probs
    # Tokens of the empty texts are no answer's; their time is shared by those that they are for.
    assert {answer.prompt_tokens for answer in (first, second, third, fourth)} == {5}
    assert [a.t_compute_s for a in (first, second, third, fourth)] == [1.5, 2.0, 2.0, 1.5]
    answer_records(asked[:1], TASK, client, profile)
    assert len(client.known) == 1, "of contexts, which are many, none is kept"


def test_without_the_empty_text_nothing_can_be_read() -> None:
    (answer,) = read(Scorer(scores={"like A": ASKED["like A"]}), "like A")
    assert (answer.reason, answer.probs, answer.label) == (Reason.ENGINE_ERROR, None, None)
    assert answer.message.startswith("the prompt of an empty text: KeyError")


@pytest.mark.parametrize("scores", [(-1.0, -2.0), (-1.0, -math.inf, -2.0)])
def test_a_label_without_a_probability_is_an_error(scores: tuple[float, ...]) -> None:
    bad, good = read(Scorer(scores={**ASKED, "odd": scores}), "odd", "like A")
    assert (bad.reason, good.reason) == (Reason.ENGINE_ERROR, None)
    assert "of 3 choices have a log-probability" in bad.message


def test_a_text_in_parts_has_the_mean_of_their_probabilities() -> None:
    engine = Scorer(max_context_tokens=6)
    left, right = read(engine, "like A", "like B")
    (answer,) = read(engine, "like A like B")
    assert answer.num_parts == 2
    assert left.probs is not None
    assert right.probs is not None
    means = [(a + b) / 2 for a, b in zip(left.probs, right.probs, strict=True)]
    assert answer.probs == pytest.approx(means)
    assert answer.label == LABELS[means.index(max(means))]


# --- Who reads labels

AGENT = {"name": "a", "model": "/nowhere/model", "engine": "transformers"}
CLASSIFY = {"kind": "classify", "labels": list(LABELS)}
MakeJob = Callable[..., Job]


def test_runs_that_read_replies_keep_their_names(make_job: MakeJob, tmp_path: Path) -> None:
    def agent_of(task: dict[str, Any] = CLASSIFY, **changes: Any) -> dict[str, Any]:
        job = make_job(task=task, agents=[{**AGENT, **changes}])
        found: dict[str, Any] = job.identity()["agents"][0]
        reads = asked_as(job, job.agents[0])["reads"]
        assert (reads == asked_as(make_job(), make_job().agents[0])["reads"]) == (
            "reads" not in found
        )
        return found

    sections = {"agents": [{**AGENT, "reads": "reply"}], "output": {"path": "runs"}}
    pinned = {"name": "pinned", "corpus": {"path": "corpus.jsonl"}, "task": CLASSIFY, **sections}
    assert fingerprint(check_job(pinned).identity()) == "113d26d3d64aeb42", "as before `reads`"
    assert agent_of()["reads"] == "labels"
    assert agent_of() == agent_of(reads="labels")
    assert agent_of(engine="auto")["reads"] == "labels"
    assert "reads" not in agent_of(reads="reply")
    assert "reads" not in agent_of(engine="openai", model="openai:m")
    assert "reads" not in agent_of(samples=3, sampling={"temperature": 1.0})
    assert "reads" not in agent_of({"kind": "summarize"})
    vectors, decoder = tmp_path / "vectors", tmp_path / "decoder"
    for folder, file in ((vectors, "modules.json"), (decoder, "config.json")):
        folder.mkdir()
        (folder / file).write_text("{}")
    assert "reads" not in agent_of(engine="auto", model=str(vectors))
    assert agent_of(engine="auto", model=str(decoder))["reads"] == "labels"


def test_a_run_of_the_version_before_is_known_to_have_read_replies(make_job: MakeJob) -> None:
    job = make_job(task=CLASSIFY, agents=[AGENT, {**AGENT, "name": "b"}])
    now = {agent.name: asked_as(job, agent) for agent in job.agents}
    assert as_asked(job, {"asked_as": now}) is job
    then = {**now, "b": {key: value for key, value in now["b"].items() if key != "reads"}}
    first, second = as_asked(job, {"asked_as": then}).agents
    assert (first.reads, second.reads) == (None, "reply")
    assert [agent.reads for agent in as_asked(job, {}).agents] == ["reply", "reply"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": "words"}, "reads"),
        ({"reads": "labels", "samples": 2, "sampling": {"temperature": 1.0}}, "nothing is drawn"),
        (
            {"reads": "labels", "model": "echo", "engine": "echo"},
            r"agents\.a\.reads: .*transformers",
        ),
    ],
)
def test_who_may_not_read_labels(changes: dict[str, Any], message: str, make_job: MakeJob) -> None:
    with pytest.raises(JobError, match=message):
        check_options(make_job(task=CLASSIFY, agents=[{**AGENT, **changes}]))


def test_only_labels_can_be_read(make_job: MakeJob) -> None:
    with pytest.raises(JobError, match=r"agents\.a\.reads: only for task\.kind classify"):
        make_job(agents=[{**AGENT, "reads": "reply"}])


# --- A run on a tiny model


def tiny_model(path: Path) -> str:
    """Save a random model of few words; it never says a label by itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "</s>", "A", "very", "B", "C", *(f"w{i}" for i in range(58))]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", model_max_length=64
    )
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            initializer_range=0.6, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def test_a_run_reads_labels_and_none_is_unparsable(make_job: MakeJob, tmp_path: Path) -> None:
    agent = {"name": "a", "model": tiny_model(tmp_path / "model")}
    rows = [{"id": f"r{i}", "text": f"w{i} w{2 * i} " * (1 + 19 * (i == 3))} for i in range(12)]
    sections = {"task": {**CLASSIFY, "max_new_tokens": 8}, "merge": {"method": "mean"}}
    agents = [agent, {**agent, "name": "b", "reads": "reply"}]
    job = make_job(rows, agents=agents, partition={"max_records": 5}, **sections)
    with summarizers(1, "classify") as client:
        run = open_run(pipeline.run(job, client=client).run)

    answers = run.arrow("answers").to_pylist()
    read = [row for row in answers if row["agent_id"] == "a"]
    assert len(read) == 12
    assert all(row["label"] == row["text"] in LABELS and row["reason"] is None for row in read)
    assert all(sum(row["probs"]) == pytest.approx(1) for row in read)
    assert {row["num_parts"] for row in read} == {1, 2}
    assert len({row["label"] for row in read}) > 1
    replied = [row for row in answers if row["agent_id"] == "b"]
    assert {row["reason"] for row in replied} == {"unparsable_answer"}
    assert all(row["probs"] is None for row in replied)
    for row, result in zip(read, run.arrow("results").to_pylist(), strict=True):
        assert (result["answer"], result["confidence_kind"]) == (row["label"], "pooled")
        assert result["confidence"] == max(row["probs"])


# --- Merges


def said(agent: str, label: str, *probs: float) -> Ballot:
    return Ballot(agent, agent, 0, label, label, probs=probs or None)


def test_probabilities_are_pooled() -> None:
    ballots = [said("a", "A", 0.5, 0.1, 0.4), said("b", "A", 0.6, 0, 0.4), said("c", "C", 0, 0, 1)]
    merged = pool(ballots, LABELS, [1, 1, 1])
    assert (merged.answer, merged.confidence_kind, merged.tie) == ("C", "pooled", False)
    assert merged.confidence == pytest.approx(0.6)
    assert merged.margin == pytest.approx(0.6 - 1.1 / 3)
    assert [c.weight for c in merged.support] == pytest.approx([0.6, 1.1 / 3])
    assert pool(ballots[::-1], LABELS, [1, 1, 1]) == merged
    assert pool(ballots, LABELS, [1, 1, 0.1]).answer == "A"


def test_what_comes_without_probabilities_is_a_vote() -> None:
    ballots = [said("a", "A"), said("b", "C"), said("c", "A")]
    merged, voted = pool(ballots, LABELS, [1, 1, 1]), vote(ballots)
    assert (merged.answer, merged.confidence) == (voted.answer, voted.confidence) == ("A", 2 / 3)


@pytest.mark.parametrize("probs", [None, [0.95, 0.02, 0.03]])
def test_a_lone_answer_without_probabilities_is_not_sure(probs: list[float] | None) -> None:
    spec = MergeSpec("mean", None, {}, None, 0.0, "label", 3, LABELS)
    (row,) = rows("r", "A")
    answers = pa.Table.from_pylist([{**row, "probs": probs}], ANSWERS)
    results, _ = merge_answers(records("r"), answers, spec)
    result = results.to_pylist()[0]
    known = probs is not None
    assert (result["answer"], result["confidence_kind"]) == ("A", "pooled")
    assert (result["confidence"] is None, result["margin"] is None) == (not known, not known)
    assert undecided(records("r"), answers, spec, StoppingRule(0.9, 3)) == ([] if known else ["r"])


def test_one_reader_is_as_sure_as_it_is() -> None:
    merged = pool([said("a", "A", 0.5, 0.1, 0.4)], LABELS, [1])
    assert (merged.answer, merged.confidence) == ("A", 0.5)
    assert merged.margin == pytest.approx(0.1)


def test_a_pool_can_stop_and_escalate_where_a_mean_of_numbers_cannot(make_job: MakeJob) -> None:
    agents = [{**AGENT, "name": name} for name in "abc"]
    routing = {
        "adaptive": {"first": 1, "confidence": 0.9},
        "escalate": {"agent": "c", "below": 0.5},
    }
    job = make_job(task=CLASSIFY, agents=agents, routing=routing, merge={"method": "mean"})
    spec, stopping = check_merging(job)
    assert isinstance(spec, MergeSpec)
    assert stopping is not None
    with pytest.raises(JobError, match="standard error"):
        check_merging(job.with_changes(task=TaskSection(kind="score")))
