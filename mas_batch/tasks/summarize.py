"""Summarize: a long text is summarised in parts, and the summaries are summarised again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mas_batch.records import Parsed
from mas_batch.tasks.base import PromptedTask, Rewrite, plain_answer
from mas_batch.tasks.splitting import Part


@dataclass(frozen=True, slots=True)
class Summarize(PromptedTask):
    """A short text in the job's language that says what the record says."""

    kind: ClassVar[str] = "summarize"
    answer_kind: ClassVar[str] = "text"
    default_merge: ClassVar[str] = "mbr"
    # chrF drifts to long candidates where their lengths differ as much as summaries' do.
    default_utility: ClassVar[str] = "rouge-l"
    # One sentence and no system turn: small models then end by themselves more often, with a
    # ROUGE-L no lower than other wordings' (SmolLM2-135M on package descriptions).
    system_template: ClassVar[str] = ""
    user_template: ClassVar[str] = "Summarize this text in one sentence, in {language}:\n\n{text}"

    def parse(self, reply: str) -> Parsed:
        """Take the whole reply, without a `Summary:` before it or quotes around it."""
        return plain_answer(reply, "summary", "a summary")

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Rewrite:
        """Put the summaries one after the other, to be summarised in their turn."""
        return Rewrite("\n\n".join(answer.text for answer in answers))
