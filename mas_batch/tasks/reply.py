"""Reply: the text is a question or a message, the context what is known about it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mas_batch.errors import Reason, RecordError
from mas_batch.records import Parsed
from mas_batch.tasks.base import Fitted, Task, plain_answer
from mas_batch.tasks.splitting import Part, largest, split

PASSAGE_CHARS = 400
"""The most characters of a passage; of a context that is too long some passages are kept."""


@dataclass(frozen=True, slots=True)
class Reply(Task):
    """An answer to the record, in the job's language."""

    answer_kind: ClassVar[str] = "text"
    default_merge: ClassVar[str] = "auto"
    system_template: ClassVar[str] = "You answer briefly and to the point, in {language}."
    user_template: ClassVar[str] = "{text}"
    context_template: ClassVar[str] = "{context}\n\nUse the information above to answer:\n{text}"

    def parse(self, reply: str) -> Parsed:
        """Take the whole reply, without an `Answer:` before it or quotes around it."""
        return plain_answer(reply, "answer|reply|response", "an answer")

    def fit(
        self, text: str, context: str | None, fits: Callable[[str, str | None], bool]
    ) -> Fitted:
        """Keep the passages of the context that say most about the question.

        A question is never cut: half a question has no answer. A passage scores the distinct
        words that it shares with the question, each divided by the number of passages in which
        it occurs; of equal scores the earlier passage is kept. The kept passages keep their order.
        """
        if context is None or not fits(text, ""):
            raise RecordError(Reason.TOO_LONG, "the question alone is over the model's context")
        passages = split(
            context.strip(), lambda part: len(part) <= PASSAGE_CHARS and fits(text, part)
        )
        ranked = _rank(text, [passage.text for passage in passages])
        num_kept = largest(len(ranked), lambda n: fits(text, _excerpts(passages, ranked[:n])))
        kept = _excerpts(passages, ranked[:num_kept])
        return Fitted((Part(text),), kept, len(passages))

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Return the only answer: a question is never cut into parts."""
        (answer,) = answers
        return answer

    def _default_prompt(self, context: str | None) -> str:
        return self.context_template if context else self.user_template


def _rank(question: str, passages: Sequence[str]) -> list[int]:
    """Order the passages' positions by how much they share with the question, best first."""
    asked = _words(question)
    shared = [asked & _words(passage) for passage in passages]
    occurs_in = Counter(word for words in shared for word in words)
    # fsum: the result must not depend on the order of a set's words.
    scores = [math.fsum(1 / occurs_in[word] for word in words) for words in shared]
    return sorted(range(len(passages)), key=lambda i: (-scores[i], i))


def _excerpts(passages: Sequence[Part], chosen: Sequence[int]) -> str:
    """Write the chosen passages in their own order, a blank line where some were left out."""
    positions = sorted(chosen)
    follows = set(positions)
    return "".join(
        passages[i].text + (passages[i].separator_after if i + 1 in follows else "\n\n")
        for i in positions
    ).rstrip()


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
