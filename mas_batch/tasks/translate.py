"""Translate: parts are put together again with what stood between them in the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mas_batch.records import Parsed
from mas_batch.tasks.base import Task, plain_answer
from mas_batch.tasks.splitting import Part


@dataclass(frozen=True, slots=True)
class Translate(Task):
    """The record in another language."""

    answer_kind: ClassVar[str] = "text"
    default_merge: ClassVar[str] = "auto"
    is_translation: ClassVar[bool] = True
    goal: ClassVar[str] = "chrF"
    system_template: ClassVar[str] = "You translate from {source_language} to {language}."
    long_documents: ClassVar[tuple[str, ...]] = ("join",)
    user_template: ClassVar[str] = (
        "Translate this {source_language} text to {language}. "
        "Answer with the translation only.\n\n{text}"
    )

    def parse(self, reply: str) -> Parsed:
        """Take the whole reply, without a `Translation:` before it or quotes around it."""
        return plain_answer(reply, "translation", f"a translation to {self.spec.language}")

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Join the parts with the source's separators, so that paragraphs stay paragraphs."""
        pairs = zip(answers, parts, strict=True)
        return Parsed("".join(answer.text + part.separator_after for answer, part in pairs).strip())
