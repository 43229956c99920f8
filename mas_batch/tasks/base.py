"""What a task is: a prompt in, a parsed answer out, and how the answers of parts become one."""

# ruff: noqa: RUF001 - quotation marks of other scripts are meant

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mas_batch import job, registries
from mas_batch.engines.base import Message
from mas_batch.errors import JobError, Reason, RecordError
from mas_batch.records import Parsed
from mas_batch.tasks.longdoc import Extractive, Hierarchical
from mas_batch.tasks.splitting import Part, split

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


@dataclass(frozen=True, slots=True)
class Task(ABC):
    """One kind of question. Stateless: safe to share and to make again on every worker."""

    spec: job.Task
    """The task as the job states it."""

    answer_kind: ClassVar[str]
    """What its answers are: a name of `ANSWER_KINDS`."""
    default_merge: ClassVar[str]
    """The merge method of jobs that name none."""
    default_utility: ClassVar[str] = "chrf"
    """The utility with which `mbr` compares texts if the job does not say."""
    goal: ClassVar[str] = "ROUGE-L"
    """The metric of texts that decides which agent is best."""
    is_translation: ClassVar[bool] = False
    """Whether a model that can do nothing but translate can do it."""
    covers_text: ClassVar[bool] = False
    """Whether an answer says what the text says, in the text's words as far as it can."""
    takes_labels: ClassVar[bool] = False
    """Whether the answer is one of `task.labels`, which then are required."""
    reads_labels: ClassVar[bool] = False
    """Whether the labels' probabilities can be read instead of a reply, where a model has them."""
    system_template: ClassVar[str]
    user_template: ClassVar[str]
    long_documents: ClassVar[tuple[str, ...]] = ()
    """Allowed values of `task.long_documents`; empty: the key is not allowed."""
    options: ClassVar[Mapping[str, bool | int | float | str]] = MappingProxyType({})
    """What `task.options` may hold, with the defaults; a value is of its default's type."""

    @classmethod
    def check(cls, spec: job.Task) -> None:
        """Refuse keys of the job's task that this kind cannot follow.

        Raises:
            JobError: a key is refused; the message names it.
        """
        if cls.takes_labels != (spec.labels is not None):
            takers = (name for name, kind in registries.TASKS.items() if kind.takes_labels)
            raise JobError(
                f"a list of at least two, for `kind: {', '.join(takers)}` and no other",
                key="task.labels",
            )
        if spec.labels is not None and len(set(spec.labels)) < max(2, len(spec.labels)):
            raise JobError("at least two, all different", key="task.labels")
        if spec.long_documents is not None and spec.long_documents not in cls.long_documents:
            allowed = ", ".join(cls.long_documents) or "nothing, leave it out"
            raise JobError(
                f"{spec.long_documents!r} is not allowed for `kind: {spec.kind}`; "
                f"allowed: {allowed}",
                key="task.long_documents",
            )
        for name, value in spec.options.items():
            cls._check_option(name, value)
        cls.check_own(spec)

    @classmethod  # noqa: B027 - most kinds have nothing of their own to refuse
    def check_own(cls, spec: job.Task) -> None:
        """Refuse what only this kind can tell; by default nothing. Raises as `check` does."""

    @abstractmethod
    def parse(self, reply: str) -> Parsed:
        """Read one reply.

        Raises:
            RecordError: `empty_answer` or `unparsable_answer`, saying what was expected.
        """

    @abstractmethod
    def join(self, answers: Sequence[Parsed], parts: Sequence[Part]) -> Parsed:
        """Join the answers to the parts, which are in the parts' order, to one answer."""

    def messages(
        self, text: str, context: str | None, *, prompt: str | None, system: str | None
    ) -> tuple[Message, ...]:
        """Fill the prompt: the agent's (`prompt`, `system`), else the job's, else the default.

        Fields in braces are replaced in one pass, so braces in the record stay as they are,
        and so does everything in braces that is not a field. An empty system prompt means no
        system turn, which some models' templates demand.
        """
        fields = self._fields(text, context)
        system = _first(system, self.spec.system, self.system_template)
        user = _first(prompt, self.spec.prompt, self._default_prompt(context))
        turn = Message("user", _fill(user, fields))
        return (Message("system", _fill(system, fields)), turn) if system else (turn,)

    def fit(
        self, text: str, context: str | None, fits: Callable[[str, str | None], bool]
    ) -> Fitted:
        """Make a record fit of which `fits(text, context)` is false.

        Here the text is cut; the context, if any, is shown with every part.

        Raises:
            RecordError: `too_long`, when it cannot be.
        """
        # Whitespace around a text matters to no task, but could become a part of its own.
        parts = split(text.strip(), lambda part: fits(part, context))
        return Fitted(tuple(parts), context, len(parts))

    def merging(self, prompt: str | None) -> Hierarchical | Extractive | None:
        """Say how the answers to the parts of a text become one; None: by `join`.

        Args:
            prompt: the agent's own template of the user turn, if it has one.
        """
        return None

    def option(self, name: str) -> Any:
        """Return the job's value of one of the kind's `options`, else the default."""
        return self.spec.options.get(name, self.options[name])

    @classmethod
    def _check_option(cls, name: str, value: object) -> None:
        if name not in cls.options:
            allowed = ", ".join(cls.options) or "none"
            raise JobError(f"unknown key; allowed: {allowed}", key=f"task.options.{name}")
        wanted = type(cls.options[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise JobError(
                f"{value!r} is not allowed: must be of type {wanted.__name__}",
                key=f"task.options.{name}",
            )

    def _default_prompt(self, context: str | None) -> str:
        return self.user_template

    def _fields(self, text: str, context: str | None) -> dict[str, str]:
        fields = {name: str(self.option(name)) for name in self.options} | {
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
    # Anything else in braces stays as it is: prompts may hold JSON.
    ours = re.compile(rf"\{{({'|'.join(fields)})\}}")
    return ours.sub(lambda match: fields[match[1]], template)
