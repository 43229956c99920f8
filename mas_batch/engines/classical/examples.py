"""Labelled examples: texts with the answers that are right for them, read like a corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from mas_batch import job
from mas_batch.corpus import CorpusReader
from mas_batch.engines.options import EngineOptions, read_options
from mas_batch.errors import JobError
from mas_batch.records import Record


class ExampleOptions(EngineOptions):
    """The options of an engine that learns from examples."""

    examples: Annotated[str, Field(min_length=1)]
    """File, folder, glob or any fsspec URL, in any format of a corpus; the workers read it."""
    text: Annotated[str, Field(min_length=1)] = "text"
    """Column with the text, or the known question."""
    also: Annotated[str, Field(min_length=1)] | None = None
    """Column that is read after the text, on a new line: the answer, beside its question."""
    label: Annotated[str, Field(min_length=1)] = "label"
    """Column with the answer: a label, or the reply to the question. May be `text` itself."""
    context: bool = False
    """Read the record's context too, before its text: what was said earlier in a dialogue."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts and their answers, in the order of the files."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the content, whatever the format that it was read from."""
        content = json.dumps([self.texts, self.labels], ensure_ascii=False).encode()
        return hashlib.sha256(content).hexdigest()


def read_examples(options: ExampleOptions) -> Examples:
    """Read all of them.

    Raises:
        JobError: no such file or column, no examples, or one without a text or an answer.
        RunError: the disk or the network fails.
    """
    try:
        records = list(_reader(options))  # to the end: only then are missing columns known
    except JobError as error:
        raise _as_option(error) from error
    texts, labels = zip(*(_example(i, r, options) for i, r in enumerate(records, 1)), strict=True)
    return Examples(texts, labels)


def _example(number: int, record: Record, options: ExampleOptions) -> tuple[str, str]:
    """Return text and answer of the record that is the `number`-th, from 1."""
    label = (record.reference or "").strip()
    if record.text is None:
        raise JobError(f"every example needs a text: {record.message}", key=f"{_KEY}.text")
    if not label:
        raise JobError(
            f"example {number} of {options.examples} has no answer in the column {options.label!r}",
            key=f"{_KEY}.label",
        )
    text = f"{record.text}\n{record.context}" if record.context else record.text
    return text, label


def fingerprint(options: Mapping[str, Any]) -> str | None:
    """Return what changes when the examples of an agent do, from its `options`; else None.

    As with a corpus, files are compared by name, size and version: nothing is read.

    Raises:
        JobError: no such file, or a value that names none.
    """
    if "examples" not in options:
        return None
    only = read_options(ExampleOptions, {"examples": options["examples"]}, "of the agent")
    try:
        return _reader(only).fingerprint
    except JobError as error:
        raise _as_option(error) from error


def _reader(options: ExampleOptions) -> CorpusReader:
    return CorpusReader(
        job.Corpus(
            path=(options.examples,),
            text=options.text,
            context=options.also,
            reference=options.label,
            keep=(),
        )
    )


_KEY = "agents.options"
_OPTIONS = {
    "corpus.path": "examples",
    "corpus.text": "text",
    "corpus.context": "also",
    "corpus.reference": "label",
}


def _as_option(error: JobError) -> JobError:
    """Name the agent's key in place of the corpus' key."""
    option = _OPTIONS.get(error.key or "", "examples")
    return JobError(error.message, key=f"{_KEY}.{option}")
