"""How good a run's answers are against its references: each agent, the lead sentence, the merge.

    python benchmarks/quality.py RUN [RUN …]

chrF is sacrebleu's corpus chrF; ROUGE-L is rouge-score's mean F1 (no stemmer); both times 100.
An agent with several samples is judged by each of its samples, averaged.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from statistics import mean

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

import mas_batch

_SCORER = RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(answers: Mapping[str, str], references: Mapping[str, str]) -> float:
    scores = (_SCORER.score(ref, answers.get(key, "")) for key, ref in references.items())
    return 100 * mean(score["rougeL"].fmeasure for score in scores)


def chrf(answers: Mapping[str, str], references: Mapping[str, str]) -> float:
    hypotheses = [answers.get(key, "") for key in references]
    return float(sacrebleu.corpus_chrf(hypotheses, [list(references.values())]).score)


def lead_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


def print_quality(path: str) -> None:
    run = mas_batch.open_run(path)
    results = run.arrow().select(["record_id", "text", "reference", "answer"]).to_pylist()
    references = {row["record_id"]: row["reference"] for row in results}
    samples: dict[str, list[dict[str, str]]] = {}
    for row in run.arrow("answers").to_pylist():
        rows = samples.setdefault(row["agent_id"], [])
        rows.extend({} for _ in range(row["sample_id"] + 1 - len(rows)))
        if row["reason"] is None:
            rows[row["sample_id"]][row["record_id"]] = row["text"]
    print(f"{run.manifest['run']}: {len(results)} records, merged by {run.manifest['merge']}")
    print(f"{'':24}{'chrF':>8}{'ROUGE-L':>9}")
    lead = {row["record_id"]: lead_sentence(row["text"]) for row in results}
    merged = {row["record_id"]: row["answer"] for row in results}
    judged = {"lead sentence": [lead], **samples, "merge": [merged]}
    for name, candidates in judged.items():
        figures = [mean(f(c, references) for c in candidates) for f in (chrf, rouge_l)]
        print(f"{name:24}{figures[0]:8.1f}{figures[1]:9.1f}")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        print_quality(path)


if __name__ == "__main__":
    main()
