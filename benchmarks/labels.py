"""Labels read from a model's probabilities, beside replies parsed: quality, seconds, unparsable.

    python benchmarks/labels.py TEXTS.jsonl [MORE.jsonl …] [--limit 100] [--model SOURCE]

Every row needs `text` and `label`; a `title` is put before the text, of which 400 characters are
read. The labels are those of the rows taken. The prompt is the task's own, and an unparsable reply
is a wrong answer. Then, of the same probabilities, other ways to make a label of them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from documents import MODEL
from numpy.typing import NDArray

from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.engines import load_engine
from mas_batch.engines.base import Completion, EngineConfig, Request, Sampling
from mas_batch.engines.client import LoopClient
from mas_batch.engines.loop import EngineLoop
from mas_batch.job import Task as TaskSection
from mas_batch.models import fetch
from mas_batch.records import Record
from mas_batch.tasks import make_task

Floats = NDArray[np.float64]

WAYS: Mapping[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "log p": lambda own, empty, length: own,
    "log p / tokens": lambda own, empty, length: own / length,
    "log p - log p(empty)": lambda own, empty, length: own - empty,
    "(log p - log p(empty)) / tokens": lambda own, empty, length: (own - empty) / length,
}
"""Scores of [texts, labels], by log-probabilities, those after the empty text, and tokens."""


class Keeping(LoopClient):
    """Keeps the last completions: where labels are read, the empty text's is the first."""

    last: Sequence[Completion] = ()

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        found = super().complete(requests, sampling)
        self.last = [completion for (completion,) in found]
        return found


def read_rows(path: Path, limit: int) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    titled = ((f"{r['title']}\n" if "title" in r else "") + r["text"][:400] for r in rows)
    return list(zip(titled, (row["label"] for row in rows), strict=True))[:limit]


def figures(found: Sequence[str | None], gold: Sequence[str]) -> str:
    """Return accuracy and macro-F1."""
    pairs = list(zip(found, gold, strict=True))
    scores = []
    for label in sorted(set(gold)):
        hits = sum(a == b == label for a, b in pairs)
        scores.append(2 * hits / sum((a == label) + (b == label) for a, b in pairs))
    accuracy = sum(a == b for a, b in pairs) / len(pairs)
    return f"accuracy {accuracy:.3f}  macro-F1 {sum(scores) / len(scores):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--model", default=MODEL)
    args = parser.parse_args()
    config = EngineConfig(threads=2)
    loop = EngineLoop(lambda: load_engine("transformers", fetch(args.model), config))
    for path in args.texts:
        client = Keeping(loop, loop.engine)  # a new one asks about the empty text again
        rows = read_rows(path, args.limit)
        gold = [label for _, label in rows]
        labels = tuple(sorted(set(gold)))
        task = make_task(TaskSection(kind="classify", labels=labels, max_new_tokens=16))
        records = [Record(str(i), text) for i, (text, _) in enumerate(rows)]
        most = max(gold.count(label) for label in labels) / len(gold)
        print(f"{path.stem}: {len(rows)} texts, {len(labels)} labels, the commonest {most:.3f}")
        profile = AgentProfile("a", "f", None, None, Sampling(16))
        read = replace(profile, sampling=Sampling(16, choices=labels))
        answer_records(records[:2], task, client, profile)  # warm
        for name, each in (("replies parsed", profile), ("labels read", read)):
            start = time.perf_counter()
            answers = answer_records(records, task, client, each)
            took_s = time.perf_counter() - start
            failed = sum(answer.reason is not None for answer in answers)
            said = figures([answer.label for answer in answers], gold)
            print(f"  {name:32} {said}  unparsable {failed}  {took_s:.1f} s")
        found = client.last
        own = np.array([c.choice_logprobs for c in found])
        length = np.array(found[0].choice_tokens, dtype=np.float64)
        for name, score in WAYS.items():
            best = score(own[1:], own[0], length).argmax(-1)
            print(f"  {name:32} {figures([labels[i] for i in best], gold)}")


if __name__ == "__main__":
    main()
