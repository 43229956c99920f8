"""How often a cascade misses its guarantee, and how much it escalates: 200 samples, real answers.

    python benchmarks/cascade.py RUN AGENT [--target 0.95] [--delta 0.05] [--labels 400]

RUN is a published run in which AGENT, the stronger one, and all others have answered every record;
the others' answers are merged as the run merged them. `SUPG`: draws weighted by the root of
1 - confidence, a tenth of them uniform; the bound mean + s/√n · √(2 ln(1/delta)) of Kang et al.,
2020. `least`: what somebody who knew all answers would escalate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

import mas_batch
from mas_batch.aggregate.escalation import Sample
from mas_batch.aggregate.guarantee import Place, last_escalated
from mas_batch.aggregate.merge import merge_answers
from mas_batch.aggregate.verdicts import key_of
from mas_batch.evaluation.specs import run_spec
from mas_batch.run_folder.kept_job import read_job

NUM_DRAWS = 200
Escalated = NDArray[np.bool_]
Choose = Callable[[int], Escalated]
"""Seed of a draw → which records the stronger agent is asked about."""


def read(run: mas_batch.Run, agent: str) -> tuple[list[str], list[Place], NDArray[np.bool_]]:
    """Return ids, places in the order of confidence, and where the merge disagrees."""
    spec, answers = run_spec(run, read_job(run)), run.arrow("answers")
    ids = pc.unique(answers["record_id"])
    records = pa.table(
        {name: ids if name == "record_id" else pa.nulls(len(ids), pa.string())
         for name in ("record_id", "text", "context", "reference", "reason", "message")}
    )  # fmt: skip
    own = pc.equal(answers["agent_id"], agent)
    merged, _ = merge_answers(records, answers.filter(pc.invert(own)), spec)
    theirs, _ = merge_answers(records, answers.filter(own), spec)
    said = dict(zip(*(theirs[n].to_pylist() for n in ("record_id", "answer")), strict=True))
    key, order = key_of(spec), Sample("order", 0)
    rows = merged.select(["record_id", "answer", "confidence"]).to_pylist()
    places = [Place(round(1000 * (r["confidence"] or 0)), order.lot(r["record_id"])) for r in rows]
    wrong = [key(said.get(r["record_id"], "")) != key(r["answer"]) for r in rows]
    return [row["record_id"] for row in rows], places, np.array(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("agent")
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--labels", type=int, default=400)
    options = parser.parse_args()
    ids, places, wrong = read(mas_batch.open_run(options.run), options.agent)
    target, delta, size, total = options.target, options.delta, options.labels, len(ids)
    order = np.argsort(np.argsort([(p.bin + p.lot) for p in places]))

    def guaranteed(seed: int) -> Escalated:
        lots = np.array([Sample(f"draw {seed}", size).lot(record) for record in ids])
        sampled = lots <= np.sort(lots)[min(size, total) - 1]
        disagreeing = [places[i] for i in np.flatnonzero(sampled & wrong)]
        num_labels = int(sampled.sum())
        place = last_escalated(disagreeing, total, num_labels, target=target, delta=delta)
        return sampled | np.array([place is not None and each <= place for each in places])

    def supg(seed: int) -> Escalated:
        rng = np.random.default_rng(seed)
        doubt = np.sqrt(np.clip([1 - p.bin / 1000 for p in places], 0.02, 1))
        shares = 0.1 / total + 0.9 * doubt / doubt.sum()
        drawn = rng.choice(total, size, p=shares)
        errors = wrong[drawn] / (total * shares[drawn])
        limit = -1
        for rank in sorted(set(order[drawn][wrong[drawn]]), reverse=True):
            kept = np.where(order[drawn] >= rank, errors, 0.0)
            if kept.mean() + kept.std() * np.sqrt(2 * np.log(1 / delta) / size) > 1 - target:
                limit = rank
                break
        return (order <= limit) | np.isin(np.arange(total), drawn)

    surest_first = np.argsort(-order)
    least = 1 - np.count_nonzero(np.cumsum(wrong[surest_first]) <= (1 - target) * total) / total
    agree = 1 - wrong.mean()
    print(f"{total} records, {agree:.1%} agree without escalation; least escalated {least:.1%}")
    chosen: dict[str, Choose] = {"guarantee": guaranteed, "SUPG": supg}
    for name, choose in chosen.items():
        found = [choose(seed) for seed in range(NUM_DRAWS)]
        missed = sum(bool((~wrong | each).mean() < target) for each in found)
        shares = [each.mean() for each in found]
        print(
            f"{name}: target {target} missed {missed} times of {NUM_DRAWS}; "
            f"escalated {np.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
        )


if __name__ == "__main__":
    main()
