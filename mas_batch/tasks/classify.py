"""Classify: the reply must name exactly one of the job's labels."""

# ruff: noqa: RUF001 - quotation marks of other scripts are meant

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from mas_batch import job
from mas_batch.errors import JobError
from mas_batch.records import Parsed
from mas_batch.tasks.base import Task, content, unparsable
from mas_batch.tasks.splitting import Part

# What models put around a label. No hyphen and no plus sign: they make labels differ (-1, C++).
_AROUND = " \t\r\n.,;:!?()[]*`\"'“”‘’„«»"


@dataclass(frozen=True, slots=True)
class Classify(Task):
    """One of `labels`."""

    answer_kind: ClassVar[str] = "label"
    default_merge: ClassVar[str] = "vote"
    takes_labels: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    system_template: ClassVar[str] = "You classify texts. You answer with one label only."
    user_template: ClassVar[str] = (
        "{text}\n\nWhich label fits the text above? Answer with exactly one of: {labels}."
    )

    @classmethod
    def check_own(cls, spec: job.Task) -> None:
        """Refuse labels that replies cannot tell apart (see `Task`)."""
        labels = spec.labels or ()
        if len({_normal(label) for label in labels}) < len(labels):
            raise JobError(
                f"{', '.join(labels)}: at least two are needed, different in more than case, "
                "width and punctuation around them",
                key="task.labels",
            )

    def parse(self, reply: str) -> Parsed:
        """Take the reply that is a label, else the only label that stands in it as a word.

        Case, width and surrounding punctuation do not matter. A label inside a longer one
        (`positive` in `very positive`) does not count where the longer one stands.
        """
        labels = {_normal(label): label for label in self.spec.labels or ()}
        expected = f"one of the labels {', '.join(labels.values())}"
        said = _normal(content(reply, expected))
        longest_first = sorted(labels, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first))
        words = rf"(?<![\w-])(?<!\d[.,])(?:{alternatives})(?![\w-]|[.,]\d)"
        found = {said} if said in labels else set(re.findall(words, said))
        if len(found) != 1:
            raise unparsable(reply, expected)
        label = labels[found.pop()]
        return Parsed(label, label=label)

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Take the label of most parts; of equally frequent labels the first in the text.

        Where the probabilities of all parts are known, it is the label of their highest mean.
        """
        known = [answer.probs for answer in answers if answer.probs is not None]
        if len(known) == len(answers):
            probs = tuple(fmean(each) for each in zip(*known, strict=True))
            label = (self.spec.labels or ())[probs.index(max(probs))]
            return Parsed(label, label=label, probs=probs)
        (label, _), *_ = Counter(answer.text for answer in answers).most_common(1)
        return Parsed(label, label=label)


def _normal(text: str) -> str:
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(_AROUND) or folded
