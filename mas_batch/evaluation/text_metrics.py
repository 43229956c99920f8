"""chrF and BLEU by sacrebleu, ROUGE by rouge-score: the field's own implementations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mas_batch.evaluation.libraries import library
from mas_batch.evaluation.systems import Matrix, Vector

_TEXTS_AT_ONCE = 1000
_TOKENIZERS = {"chinese": "zh", "japanese": "char", "korean": "char"}  # no space between words
_ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
_ROUGE_TOKEN = re.compile("[a-z0-9]", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class CorpusMetric:
    """A sacrebleu metric, as sentence statistics that add up, and the score of their sum.

    These two steps are what sacrebleu's own bootstrap is made of; the score of all sentences'
    sum is its `corpus_score`, to the last bit.
    """

    name: str
    implementation: Any

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Matrix:
        """Compare pairs of texts; shape [pairs, K]."""
        blocks = []
        for first in range(0, len(hypotheses), _TEXTS_AT_ONCE):
            block = slice(first, first + _TEXTS_AT_ONCE)
            rows = self.implementation._extract_corpus_statistics(
                hypotheses[block], [references[block]]
            )
            blocks.append(np.array(rows, dtype=np.float64))
        return np.concatenate(blocks)

    def score(self, sums: Matrix) -> Vector:
        """Return the scores, 0 to 100, of summed statistics [R, K]; shape [R]."""
        compute = self.implementation._compute_score_from_stats
        return np.array([compute(row).score for row in sums.tolist()])

    @property
    def signature(self) -> str:
        """Version and settings, as sacrebleu says that they should be quoted."""
        return str(self.implementation.get_signature())


def chrf() -> CorpusMetric:
    """Return chrF2 with sacrebleu's defaults.

    Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.

    Raises:
        RunError: sacrebleu is not installed.
    """
    return CorpusMetric("chrF", library("sacrebleu.metrics").CHRF())


def bleu(language: str) -> CorpusMetric:
    """Return BLEU with sacrebleu's defaults and a tokenizer that suits the language.

    Source: Post, "A call for clarity in reporting BLEU scores", WMT 2018.

    Raises:
        RunError: sacrebleu is not installed.
    """
    tokenizer = _TOKENIZERS.get(language.casefold(), "13a")
    return CorpusMetric("BLEU", library("sacrebleu.metrics").BLEU(tokenize=tokenizer))


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[dict[str, Vector], int]:
    """Return the F1 of ROUGE-1, -2 and -L of every pair, in [0, 1], without a stemmer.

    The tokens are runs of a–z and digits; the second value is how many pairs have a reference
    without any, which scores 0.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004.

    Raises:
        RunError: rouge-score is not installed.
    """
    scorer = library("rouge_score.rouge_scorer").RougeScorer(list(_ROUGE.values()))
    columns: dict[str, list[float]] = {name: [] for name in _ROUGE}
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        scores = scorer.score(reference, hypothesis)
        for name, column in columns.items():
            column.append(scores[_ROUGE[name]].fmeasure)
    num_blind = sum(not _ROUGE_TOKEN.search(reference) for reference in references)
    return {name: np.array(column, np.float64) for name, column in columns.items()}, num_blind
