"""Metrics against the field's implementations; the bootstrap against what is known of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from mas_batch.errors import RunError
from mas_batch.evaluation.bootstrap import interval, p_value, resampled_sums
from mas_batch.evaluation.metrics import Metrics, metrics_for
from mas_batch.evaluation.scoring import Worth, best_agent, qualities, worth_of
from mas_batch.evaluation.systems import Evidence, EvidenceBuilder, oracle
from mas_batch.job import Task
from mas_batch.quality import Kind, Quality

Replies = Mapping[str, Sequence[str | None]]
"""Agent → its answer to each record."""

LABELS = Task(kind="classify", labels=("x", "y", "z"))
SCORES = Task(kind="score", minimum=0.0, maximum=10.0)
TEXTS = Task(kind="translate", language="Portuguese")


def evidence_of(
    references: Sequence[str], replies: Replies, merge: Sequence[str | None] | None = None
) -> Evidence:
    """Agents' answers, and a merge; None: the first agent's answers."""
    builder = EvidenceBuilder()
    for position, reference in enumerate(references):
        builder.start_record(reference)
        given = {agent: answers[position] for agent, answers in replies.items()}
        for agent, answer in given.items():
            builder.add(Kind.AGENT, agent, [answer])
        builder.add(Kind.RANDOM, "random agent", given.values())
        builder.add(Kind.RUN, "merge", [merge[position] if merge else next(iter(given.values()))])
    return as_evidence(builder)


def as_evidence(builder: EvidenceBuilder) -> Evidence:
    return Evidence(
        references=builder.references,
        answers=builder.answers,
        record_of=np.array(builder.record_of, np.int64),
        systems=builder.systems(),
        confidences={},
        skipped={},
        num_without_reference=0,
        num_unusable=0,
    )


def judge(
    task: Task,
    kind: str,
    references: Sequence[str],
    replies: Replies,
    merge: Sequence[str | None] | None = None,
) -> tuple[Metrics, dict[str, Quality]]:
    evidence = evidence_of(references, replies, merge)
    metrics = metrics_for(task, kind, evidence)
    systems = [*evidence.systems, oracle(evidence, metrics.goal.losses)]
    baseline = best_agent(evidence.of(Kind.AGENT), metrics.goal)
    judged = qualities(evidence, systems, baseline, metrics, 200, seed=0)
    return metrics, {quality.name: quality for quality in judged}


def value(quality: Quality, metric: str) -> float:
    score = quality.score(metric).value
    assert score is not None
    return score


# Metrics

REFERENCES = ["O gato está na mesa.", "Ele não veio hoje à noite.", "Sim", "Prima o botão Guardar."]
REPLIES = {
    "good": ["O gato está sobre a mesa.", "Ele não veio esta noite.", "Sim", None],
    "bad": ["The cat", "", "Não, nunca!", "Guardar botão o prima"],
}


def test_text_scores_are_the_libraries_to_the_last_bit() -> None:
    _, judged = judge(TEXTS, "text", REFERENCES, REPLIES)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for agent, replies in REPLIES.items():
        texts = [reply or "" for reply in replies]
        quality = judged[agent]
        assert value(quality, "chrF") == sacrebleu.corpus_chrf(texts, [REFERENCES]).score
        assert value(quality, "BLEU") == sacrebleu.corpus_bleu(texts, [REFERENCES]).score
        pairs = list(zip(REFERENCES, texts, strict=True))
        rouge_l = [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
        assert value(quality, "ROUGE-L") == pytest.approx(np.mean(rouge_l))
    assert judged["good"].num_missing == 1
    assert judged["good"].num_records == 4


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=8))
def test_summed_sentence_statistics_are_the_corpus(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = ([*side] for side in zip(*pairs, strict=True))
    evidence = evidence_of(references, {"a": hypotheses})
    metrics = metrics_for(TEXTS, "text", evidence)
    (agent,) = evidence.of(Kind.AGENT)
    chrf, bleu = metrics.sums[:2]
    for metric, score in (
        (chrf, sacrebleu.corpus_chrf(hypotheses, [references]).score),
        (bleu, sacrebleu.corpus_bleu(hypotheses, [references], force=True).score),
    ):
        total = agent.per_record(metric.statistics).sum(axis=0, keepdims=True)
        assert metric.score(total)[0] == score


def test_the_goal_is_chrf_for_translations_and_rouge_l_for_other_texts() -> None:
    goals = {}
    for kind in ("translate", "summarize", "reply"):
        task = Task(kind=kind)
        goals[kind] = judge(task, "text", REFERENCES, REPLIES)[0].goal.name
    assert goals == {"translate": "chrF", "summarize": "ROUGE-L", "reply": "ROUGE-L"}


def test_rouge_says_where_it_is_blind() -> None:
    metrics, judged = judge(Task(kind="summarize"), "text", ["Привет, мир"], {"a": ["Привет, мир"]})
    assert value(judged["a"], "ROUGE-L") == 0
    assert value(judged["a"], "chrF") == 100
    assert "1 of 1 comparisons" in metrics.notes[0]


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(RunError, match=r"sacrebleu.*pip install 'mas_batch\[evaluate\]'"):
        judge(TEXTS, "text", REFERENCES, REPLIES)


def test_labels_by_hand() -> None:
    metrics, judged = judge(
        LABELS,
        "label",
        ["x", "y", "Y ", "z"],
        {"a": ["x", "x", "y", None], "b": ["y", "y", "z", "z"]},
    )
    assert metrics.goal.name == "accuracy"
    assert value(judged["a"], "accuracy") == 0.5  # the missing one is wrong
    assert value(judged["b"], "accuracy") == 0.5
    assert value(judged["random agent"], "accuracy") == 0.5
    assert value(judged["oracle"], "accuracy") == 1.0
    # x: 2·1/(1+2), y: 2·1/(2+1), z: 0
    assert value(judged["a"], "macro-F1") == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert metrics.notes == []


def test_references_outside_the_labels_are_counted() -> None:
    metrics, _ = judge(LABELS, "label", ["x", "q", "q"], {"a": ["x", "x", "x"]})
    assert metrics.notes[0].startswith("2 references are none of the task's labels")


classes = st.sampled_from("xyz")


@given(st.lists(st.tuples(classes, classes), min_size=1, max_size=30))
def test_macro_f1_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    true, said = ([*side] for side in zip(*pairs, strict=True))
    _, judged = judge(LABELS, "label", true, {"a": said})
    expected = sklearn.f1_score(true, said, average="macro", zero_division=0)
    assert value(judged["a"], "macro-F1") == pytest.approx(expected)


def test_numbers_by_hand() -> None:
    metrics, judged = judge(
        SCORES, "value", ["2", "9", "4"], {"a": ["3.0", None, "4.0"], "b": ["0.0", "10.0", "1.0"]}
    )
    assert metrics.goal.name == "MAE"
    assert value(judged["a"], "MAE") == pytest.approx((1 + 9 + 0) / 3)  # missing: 0, not 10
    assert value(judged["b"], "MAE") == pytest.approx((2 + 1 + 3) / 3)
    assert value(judged["oracle"], "MAE") == pytest.approx((1 + 1 + 0) / 3)
    assert value(judged["random agent"], "MAE") == pytest.approx((1.5 + 5 + 1.5) / 3)
    difference = judged["a"].score("MAE").difference
    assert difference is not None
    assert difference.value == pytest.approx(4 / 3), "b has the smaller error: it is the best"


numbers = st.integers(0, 10).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=20))
def test_correlations_are_scipys(pairs: list[tuple[float, float]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    true, said = ([*side] for side in zip(*pairs, strict=True))
    _, judged = judge(SCORES, "value", [str(x) for x in true], {"a": [str(x) for x in said]})
    if len({*true}) == 1 or len({*said}) == 1:
        assert judged["a"].score("Pearson").value is None
    else:
        assert value(judged["a"], "Pearson") == pytest.approx(stats.pearsonr(true, said)[0])
        assert value(judged["a"], "Spearman") == pytest.approx(stats.spearmanr(true, said)[0])


def test_a_reference_that_is_no_number_is_named() -> None:
    with pytest.raises(RunError, match="'good' is not a number"):
        judge(SCORES, "value", ["1", "good"], {"a": ["1.0", "2.0"]})


# Bootstrap


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
def test_all_tables_see_the_same_draws(num_records: int, num_resamples: int, seed: int) -> None:
    table = np.arange(num_records * 2, dtype=np.float64).reshape(num_records, 2)
    tables = {"ones": np.ones((num_records, 1)), "a": table, "b": 3 * table[:, :1]}
    sums = resampled_sums(tables, num_resamples, seed)
    assert sums["ones"].tolist() == [[num_records]] * num_resamples
    assert (sums["b"][:, 0] == 3 * sums["a"][:, 0]).all()
    alone = resampled_sums({"a": table}, num_resamples, seed)
    assert (alone["a"] == sums["a"]).all()


def test_the_draws_do_not_depend_on_the_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"x": np.arange(7.0)[:, None]}
    at_once = resampled_sums(tables, 10, seed=4)["x"]
    monkeypatch.setattr("mas_batch.evaluation.bootstrap._COUNTS_AT_ONCE", 21)
    assert (resampled_sums(tables, 10, seed=4)["x"] == at_once).all()


def test_the_interval_has_the_width_that_theory_says() -> None:
    rng = np.random.default_rng(5)
    correct = (rng.random(900) < 0.8).astype(np.float64)
    sums = resampled_sums({"x": correct[:, None]}, 2000, seed=1)["x"][:, 0] / 900
    low, high = interval(sums)
    p = correct.mean()
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 900), rel=0.1)
    assert low < p < high


def test_p_of_a_difference() -> None:
    assert p_value(np.zeros(99)) == 1.0
    assert p_value(np.ones(99)) == 0.02  # never 0
    assert p_value(np.array([1.0] * 90 + [-1.0] * 9)) == pytest.approx(0.2)
    assert np.isnan(p_value(np.array([np.nan])))


def test_equal_systems_are_told_apart_no_more_often_than_they_should() -> None:
    """Under no difference p is uniform: p < 0.05 in about one of twenty samples."""
    rng = np.random.default_rng(3)
    small = 0
    for _ in range(200):
        difference = (rng.random(300) < 0.6).astype(float) - (rng.random(300) < 0.6)
        sums = resampled_sums({"d": difference[:, None]}, 300, int(rng.integers(1 << 30)))
        small += p_value(sums["d"][:, 0]) < 0.05
    assert 2 <= small <= 22


# Verdicts


def noisy(rng: np.random.Generator, references: Sequence[str], accuracy: float) -> list[str]:
    """Answer wrongly in exactly so many places, drawn at random."""
    wrong = {"x": "y", "y": "z", "z": "x"}
    right = rng.permutation(len(references)) < accuracy * len(references)
    return [r if good else wrong[r] for r, good in zip(references, right, strict=True)]


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        (0.95, 0.6, Worth.EQUAL),  # the run's merge is the first agent
        (0.6, 0.95, Worth.WORSE),
        (0.80, 0.83, Worth.PERHAPS_WORSE),
    ],
)
def test_the_verdict_on_labels(first: float, other: float, expected: Worth) -> None:
    rng = np.random.default_rng(0)
    references = ["x", "y", "z"] * 60
    replies = {"a": noisy(rng, references, first), "b": noisy(rng, references, other)}
    metrics, judged = judge(LABELS, "label", references, replies)
    assert worth_of(judged["merge"], metrics.goal) is expected


def test_the_verdict_on_errors_knows_that_less_is_better() -> None:
    references = [f"{i % 10}.0" for i in range(60)]
    off = [f"{float(reference) + 1}" for reference in references]
    metrics, judged = judge(SCORES, "value", references, {"off": off}, merge=references)
    assert worth_of(judged["merge"], metrics.goal) is Worth.BETTER
    difference = judged["merge"].score("MAE").difference
    assert difference is not None
    assert difference.value == pytest.approx(-1)


def test_systems_are_compared_on_the_records_that_both_were_asked_about() -> None:
    builder = EvidenceBuilder()
    for position in range(40):
        builder.start_record("x")
        # Where `late` is asked, everybody is wrong; elsewhere `always` is right.
        hard = position >= 10
        builder.add(Kind.AGENT, "always", ["y" if hard else "x"])
        if hard:
            builder.add(Kind.AGENT, "late", ["x" if position % 2 else "y"])
    evidence = as_evidence(builder)
    metrics = metrics_for(LABELS, "label", evidence)
    always, late = evidence.systems
    judged = qualities(evidence, [always, late], always, metrics, 100, 0)
    assert judged[1].num_records == 30
    assert judged[1].score("accuracy").value == 0.5
    difference = judged[1].score("accuracy").difference
    assert difference is not None
    assert difference.value == 0.5, "0.5 of the hard ones, of which `always` knows none"
    few = late.within(np.arange(40) < 15)
    assert best_agent([always, few], metrics.goal) is always, "five records say little"
