"""Score: the reply must hold a number inside the job's range."""

# ruff: noqa: RUF001 - the typographic minus sign is meant

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mas_batch.records import Parsed
from mas_batch.tasks.base import Task, content, number, unparsable
from mas_batch.tasks.splitting import Part

# 1,000 is a thousand; 7,5 is seven and a half. The hyphen in `rating-7` is no minus.
_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:[.,]\d+)?)"
_SCORE = re.compile(rf"(?<![\w.,])({_NUMBER})(?:\s*(?:/|out of)\s*({_NUMBER}))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Score(Task):
    """A number from `minimum` to `maximum`."""

    answer_kind: ClassVar[str] = "value"
    default_merge: ClassVar[str] = "mean"
    system_template: ClassVar[str] = "You rate texts. You answer with one number only."
    user_template: ClassVar[str] = (
        "{text}\n\nHow good is the text above, from {minimum} (worst) to {maximum} (best)? "
        "Answer with one number only."
    )

    def parse(self, reply: str) -> Parsed:
        """Take the first number: `7`, `7.5`, `7,5`, `7/10`, `7 out of 10`.

        A mention of the range itself (`from 0 to 10`, `0-10`) is ignored. A number on another
        scale (`4/5` where 10 is the maximum) is refused rather than rescaled.
        """
        low, high = number(self.spec.minimum), number(self.spec.maximum)
        expected = f"a number from {low} to {high}"
        scale = rf"(?<![\d.,]){re.escape(low)}\s*(?:-|–|—|to)\s*{re.escape(high)}(?![\d.,]*\d)"
        match = _SCORE.search(re.sub(scale, " ", content(reply, expected)))
        if match is None:
            raise unparsable(reply, expected)
        value, maximum = _value(match[1]), match[2]
        other_scale = maximum is not None and _value(maximum) != self.spec.maximum
        if other_scale or not self.spec.minimum <= value <= self.spec.maximum:
            raise unparsable(reply, expected)
        return Parsed(number(value), value=value)

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Take the mean of the parts' scores."""
        values = [answer.value for answer in answers if answer.value is not None]
        mean = math.fsum(values) / len(values)
        return Parsed(number(mean), value=mean)


def _value(written: str) -> float:
    written = written.replace("−", "-")
    if re.search(r",\d{3}(?!\d)", written):
        return float(written.replace(",", ""))
    return float(written.replace(",", "."))
