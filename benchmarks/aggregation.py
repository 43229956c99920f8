"""What merging costs: votes and learned reliability beside crowd-kit, MBR beside sacrebleu.

    python benchmarks/aggregation.py [--records 1000000] [--beside 100000] [--candidates 16]

Times are of the CPU, all threads added up. 5 agents of accuracy .90/.75/.65/.60/.50 answer with
one of 4 labels. `patterns` is counting them in an Arrow table of answers, which every partition
does on its own; the methods include it, and then work on the distinct patterns, at most 1,024
here. "Per record" is the merge that a run does, which also says who backed what. crowd-kit
(`pip install crowd-kit`) starts from integers in a pandas table.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from crowdkit.aggregation import DawidSkene, MajorityVote
from sacrebleu.metrics import CHRF

from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.patterns import count_answers
from mas_batch.aggregate.posterior_vote import by_reliability
from mas_batch.aggregate.reliability import Posterior, posteriors
from mas_batch.aggregate.vote import vote, weighted_log_odds
from mas_batch.records import ANSWERS

ACCURACIES = {"a0": 0.90, "a1": 0.75, "a2": 0.65, "a3": 0.60, "a4": 0.50}
AGENTS = list(ACCURACIES)
FAMILIES = {agent: agent for agent in AGENTS}
LABELS = ["news", "sport", "opinion", "other"]
MBR_RECORDS = 20

T = TypeVar("T")


def simulate(num_records: int) -> np.ndarray[Any, Any]:
    """Return the answers' label numbers; [N, A]."""
    rng = np.random.default_rng(0)
    shape = (num_records, len(AGENTS))
    truth = rng.integers(len(LABELS), size=(num_records, 1))
    wrong = (truth + rng.integers(1, len(LABELS), size=shape)) % len(LABELS)
    return np.where(rng.random(shape) < np.array(list(ACCURACIES.values())), truth, wrong)


def answers_table(codes: np.ndarray[Any, Any]) -> pa.Table:
    num_records, num_agents = codes.shape
    columns = {field.name: pa.nulls(codes.size, field.type) for field in ANSWERS}
    ids = np.repeat([f"record-{number:08}" for number in range(num_records)], num_agents)
    columns["record_id"] = pa.array(ids, pa.string())
    columns["agent_id"] = columns["family_id"] = pa.array(AGENTS * num_records)
    columns["sample_id"] = pa.array(np.zeros(codes.size, np.int32))
    indices = pa.array(codes.ravel().astype(np.int32))
    columns["label"] = pa.DictionaryArray.from_arrays(indices, LABELS).cast(pa.string())
    return pa.table(columns, schema=ANSWERS)


def ballots_of(codes: Sequence[int]) -> tuple[Ballot, ...]:
    given = zip(AGENTS, (LABELS[code] for code in codes), strict=True)
    return tuple(Ballot(agent, agent, 0, label, label) for agent, label in given)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    done = work()
    return time.process_time() - start, done


def by_log_odds(ballots: tuple[Ballot, ...]) -> Verdict:
    return weighted_log_odds(ballots, ACCURACIES, len(LABELS) - 1)


def merge_patterns(patterns: dict[str, int], merge: Callable[..., Verdict]) -> dict[str, str]:
    rows = {key: ballots_of([int(code) for code in key.split(";")]) for key in patterns}
    return {key: merge(ballots).answer for key, ballots in rows.items()}


def methods(num_records: int) -> dict[str, float]:
    """Return the seconds of each method, patterns included."""
    answers = answers_table(simulate(num_records))
    count_answers(answers.slice(0, 1000), AGENTS, LABELS)  # the first call loads libraries
    counting, patterns = timed(lambda: count_answers(answers, AGENTS, LABELS))
    voting, _ = timed(lambda: merge_patterns(patterns, vote))
    weighing, _ = timed(lambda: merge_patterns(patterns, by_log_odds))
    learning, found = timed(lambda: learn(patterns, AGENTS, FAMILIES, LABELS))
    judging, _ = timed(lambda: posteriors(found, patterns))
    return {
        "patterns": counting,
        "vote": counting + voting,
        "weighted": counting + weighing,
        "reliability": counting + learning + judging,
    }


def crowd_kit(num_records: int) -> dict[str, float]:
    codes = simulate(num_records)
    task, worker = np.indices(codes.shape).reshape(2, -1)
    frame = pd.DataFrame({"task": task, "worker": worker, "label": codes.ravel()})
    majority, _ = timed(lambda: MajorityVote().fit_predict(frame))
    dawid_skene, _ = timed(lambda: DawidSkene(n_iter=100).fit_predict(frame))
    return {"vote": majority, "reliability": dawid_skene}


def per_record(num_records: int) -> dict[str, float]:
    """Return µs per record of the merge that also says who backed what, record by record."""
    codes = simulate(num_records)
    records = [ballots_of(row) for row in codes.tolist()]
    found = learn(count_answers(answers_table(codes), AGENTS, LABELS), AGENTS, FAMILIES, LABELS)
    known: dict[str, Posterior] = {}
    merges: dict[str, Callable[[tuple[Ballot, ...]], Verdict]] = {
        "vote": vote,
        "weighted": by_log_odds,
        "reliability": lambda ballots: by_reliability(ballots, found, known),
    }
    times = {name: timed(lambda m=m: [m(b) for b in records])[0] for name, m in merges.items()}
    return {name: 1e6 * seconds / num_records for name, seconds in times.items()}


def candidates(num_candidates: int, rng: random.Random) -> list[str]:
    """Return variants, about 185 characters long, of one text: a fifth of the words replaced."""
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(200)]
    text = rng.choices(words, k=29)
    changed = (
        [w if rng.random() < 0.8 else rng.choice(words) for w in text]
        for _ in range(num_candidates)
    )
    return [" ".join(variant) for variant in changed]


def mbr(num_candidates: int) -> tuple[float, float, float]:
    """Return (ms per record, sacrebleu's, largest difference of a score)."""
    rng = random.Random(0)
    sets = [candidates(num_candidates, rng) for _ in range(MBR_RECORDS)]
    metric = CHRF()
    ours, matrices = timed(lambda: [chrf_matrix(texts) for texts in sets])
    theirs, scores = timed(
        lambda: [[[metric.sentence_score(h, [r]).score for r in t] for h in t] for t in sets]
    )
    gap = float(np.abs(np.array(matrices) - np.array(scores) / 100).max())
    return 1e3 * ours / MBR_RECORDS, 1e3 * theirs / MBR_RECORDS, gap


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--beside", type=int, default=100_000, help="records beside crowd-kit")
    parser.add_argument("--candidates", type=int, default=16)
    options = parser.parse_args()
    pa.set_cpu_count(1)

    large, ours = methods(options.records), methods(options.beside)
    theirs, merging = crowd_kit(options.beside), per_record(options.beside // 10)
    sizes = f"s for {options.records:,} | s for {options.beside:,}"
    print(f"| method | {sizes} | crowd-kit | ratio | µs per record |\n|---|---|---|---|---|---|")
    for method, seconds in large.items():
        other, each = theirs.get(method), merging.get(method)
        beside = f"{other:.2f} | {other / ours[method]:.1f}" if other else "– | –"
        merged = f"{each:.0f}" if each else "–"
        print(f"| {method} | {seconds:.2f} | {ours[method]:.2f} | {beside} | {merged} |")
    mine, reference, gap = mbr(options.candidates)
    print(f"\nchrF of {options.candidates} candidates in pairs, ms per record: {mine:.2f}, ")
    print(f"sacrebleu {reference:.0f}, ratio {reference / mine:.0f}; scores differ by {gap:.1e}")


if __name__ == "__main__":
    main()
