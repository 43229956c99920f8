"""Summarize: a long text is summarised in parts, and neighbouring summaries are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mas_batch.records import Parsed
from mas_batch.tasks.base import Task, plain_answer
from mas_batch.tasks.longdoc import Extractive, Hierarchical, describe
from mas_batch.tasks.splitting import Part


@dataclass(frozen=True, slots=True)
class Summarize(Task):
    """A short text in the job's language that says what the record says."""

    answer_kind: ClassVar[str] = "text"
    covers_text: ClassVar[bool] = True
    default_merge: ClassVar[str] = "auto"
    # chrF drifts to long candidates where their lengths differ as much as summaries' do.
    default_utility: ClassVar[str] = "rouge-l"
    # One sentence and no system turn: small models then end by themselves more often, with a
    # ROUGE-L no lower than other wordings' (SmolLM2-135M on package descriptions).
    system_template: ClassVar[str] = ""
    user_template: ClassVar[str] = "Summarize this text in one sentence, in {language}:\n\n{text}"
    merge_template: ClassVar[str] = (
        "These are {pieces}. Write one summary of the whole document, in one sentence, in "
        "{language}:\n\n{text}"
    )
    long_documents: ClassVar[tuple[str, ...]] = ("hierarchical", "extractive", "join")

    def parse(self, reply: str) -> Parsed:
        """Take the whole reply, without a `Summary:` before it or quotes around it."""
        return plain_answer(reply, "summary", "a summary")

    def merging(self, prompt: str | None) -> Hierarchical | Extractive | None:
        """Merge level by level unless `task.long_documents` says otherwise (see `Task`).

        A prompt of the agent or the job is kept, with its demands on language, length and style;
        in place of the text it holds the summaries and a note that says what they are.
        """
        if self.spec.long_documents == "join":
            return None
        if self.spec.long_documents == "extractive":
            return Extractive(self.spec.evidence)
        pieces = describe(self.spec.evidence)
        own = prompt if prompt is not None else self.spec.prompt
        if own is None:
            template = self.merge_template.replace("{pieces}", pieces)
        else:
            template = own.replace("{text}", f"({pieces})\n\n{{text}}")
        return Hierarchical(template, self.spec.evidence)

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Put the summaries one after the other, a paragraph each."""
        return Parsed("\n\n".join(answer.text for answer in answers))
