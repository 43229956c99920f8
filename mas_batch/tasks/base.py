"""What a task is: a prompt in, a parsed answer out, and how the answers of parts become one."""

# ruff: noqa: RUF001 - quotation marks of other scripts are meant

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from mas_batch import job
from mas_batch.engines.base import Message
from mas_batch.errors import Reason, RecordError
from mas_batch.records import Parsed
from mas_batch.tasks.longdoc import Extractive, Hierarchical
from mas_batch.tasks.splitting import Part, split

# Anything else in braces stays as it is: prompts may hold JSON.
_FIELD = re.compile(r"\{(text|context|language|source_language|labels|minimum|maximum)\}")
_THINKING = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_QUOTES = ('""', "''", "“”", "„“", "„”", "‘’", "«»", "»«", "「」", "『』")
_EXCERPT_CHARS = 80


@dataclass(frozen=True, slots=True)
class Fitted:
    """A record that was over the model's context, made to fit."""

    parts: tuple[Part, ...]
    """The parts of the text, one request each."""
    context: str | None
    """The background that is shown with every part."""
    num_parts: int
    """Number of parts into which the text, or its context, was cut."""


class Task(Protocol):
    """One kind of question. Stateless: safe to share and to make again on every worker."""

    @property
    def kind(self) -> str:
        """Its name in job files."""
        ...

    @property
    def answer_kind(self) -> str:
        """The column of the answers that is merged: `text`, `label` or `value`."""
        ...

    @property
    def covers_text(self) -> bool:
        """Whether an answer says what the text says, in the text's words as far as it can."""
        ...

    @property
    def default_merge(self) -> str:
        """The merge method of jobs that name none."""
        ...

    @property
    def default_utility(self) -> str:
        """The utility with which `mbr` compares texts if the job does not say."""
        ...

    def messages(
        self, text: str, context: str | None, *, prompt: str | None, system: str | None
    ) -> tuple[Message, ...]:
        """Fill the prompt: the agent's (`prompt`, `system`), else the job's, else the default.

        Fields in braces are replaced in one pass, so braces in the record stay as they are,
        and so does everything in braces that is not a field. An empty system prompt means no
        system turn, which some models' templates demand.
        """
        ...

    def parse(self, reply: str) -> Parsed:
        """Read one reply.

        Raises:
            RecordError: `empty_answer` or `unparsable_answer`, saying what was expected.
        """
        ...

    def fit(
        self, text: str, context: str | None, fits: Callable[[str, str | None], bool]
    ) -> Fitted:
        """Make a record fit for which `fits(text, context)` is false.

        Raises:
            RecordError: `too_long`, if the record cannot be made to fit.
        """
        ...

    def merging(self, prompt: str | None) -> Hierarchical | Extractive | None:
        """Say how the answers to the parts of a text become one; None: by `join`.

        Args:
            prompt: the agent's own template of the user turn, if it has one.
        """
        ...

    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Join the answers to the parts, which are in the parts' order, to one answer."""
        ...


@dataclass(frozen=True, slots=True)
class PromptedTask:
    """What all kinds of task share: filling prompts and cutting texts."""

    spec: job.Task
    """The task as the job states it."""

    covers_text: ClassVar[bool] = False
    system_template: ClassVar[str]
    user_template: ClassVar[str]
    long_documents: ClassVar[tuple[str, ...]] = ()
    """Allowed values of `task.long_documents`; empty: the key is not allowed."""

    def messages(
        self, text: str, context: str | None, *, prompt: str | None, system: str | None
    ) -> tuple[Message, ...]:
        """Fill the agent's prompt, else the job's, else the kind's own (see `Task`)."""
        fields = self._fields(text, context)
        system = _first(system, self.spec.system, self.system_template)
        user = _first(prompt, self.spec.prompt, self._default_prompt(context))
        turn = Message("user", _fill(user, fields))
        return (Message("system", _fill(system, fields)), turn) if system else (turn,)

    def fit(
        self, text: str, context: str | None, fits: Callable[[str, str | None], bool]
    ) -> Fitted:
        """Cut the text; the context, if any, is shown with every part (see `Task`)."""
        # Whitespace around a text matters to no task, but could become a part of its own.
        parts = split(text.strip(), lambda part: fits(part, context))
        return Fitted(tuple(parts), context, len(parts))

    def merging(self, prompt: str | None) -> Hierarchical | Extractive | None:
        """Leave it to `join` (see `Task`)."""
        return None

    def _default_prompt(self, context: str | None) -> str:
        return self.user_template

    def _fields(self, text: str, context: str | None) -> dict[str, str]:
        fields = {
            "text": text,
            "context": context or "",
            "language": self.spec.language,
            "source_language": self.spec.source_language,
            "minimum": number(self.spec.minimum),
            "maximum": number(self.spec.maximum),
        }
        if self.spec.labels is not None:
            fields["labels"] = ", ".join(self.spec.labels)
        return fields


def number(value: float) -> str:
    """Write a number as a person would: 7, not 7.0."""
    return str(int(value)) if value.is_integer() else repr(value)


def content(reply: str, expected: str) -> str:
    """Return a reply without the `<think>` block that some models put before their answer.

    Raises:
        RecordError: `empty_answer`, if nothing is left.
    """
    text = _THINKING.sub("", reply, count=1).strip()
    if not text:
        raise RecordError(Reason.EMPTY_ANSWER, f"expected {expected}, got {excerpt(reply)}")
    return text


def plain_answer(reply: str, noun: str, expected: str) -> Parsed:
    """Parse free text: drop a lead-in that announces a `noun`, and quotes around the whole text.

    `Summary: …` and `Here is a short summary of the text: …` are lead-ins; a sentence that
    only mentions a summary is not.

    Raises:
        RecordError: `empty_answer`, if nothing is left.
    """
    lead_in = (
        rf"[*#_\s]*(?:here(?:'s|’s|\s+is)\s+(?:the|an?|my|your)\s+(?:[\w-]+\s+){{0,3}}?"
        rf"(?:{noun})\b[^:\n]{{0,60}}|(?:(?:the|my|short|brief|final)\s+)*(?:{noun})\s*)"
        r"[*_]*:[*_\s]*"
    )
    text = _unquoted(re.sub(rf"\A{lead_in}", "", content(reply, expected), flags=re.IGNORECASE))
    if not text:
        raise RecordError(Reason.EMPTY_ANSWER, f"expected {expected}, got {excerpt(reply)}")
    return Parsed(text)


def unparsable(reply: str, expected: str) -> RecordError:
    """Build the error for a reply that is not what the task asks for."""
    return RecordError(Reason.UNPARSABLE_ANSWER, f"expected {expected}, got {excerpt(reply)}")


def excerpt(reply: str) -> str:
    """Quote the start of a reply."""
    return repr(reply[:_EXCERPT_CHARS]) + ("…" if len(reply) > _EXCERPT_CHARS else "")


def _unquoted(text: str) -> str:
    """Drop quotes around the whole text; with more of them inside it may be two quotations."""
    text = text.strip()
    inner = text[1:-1]
    if len(text) < 2 or text[0] + text[-1] not in _QUOTES:
        return text
    return text if text[0] in inner or text[-1] in inner else inner.strip()


def _first(*templates: str | None) -> str:
    return next((template for template in templates if template is not None), "")


def _fill(template: str, fields: dict[str, str]) -> str:
    return _FIELD.sub(lambda match: fields.get(match[1], match[0]), template)
