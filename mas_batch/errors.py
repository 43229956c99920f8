"""What can go wrong, in words a person can act on.

Two families: exceptions that stop a run (`MasBatchError`), and reason codes for one record
that could not be answered while its neighbours could (`Reason`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from mas_batch.safe_text import without_credentials


class ExitCode:
    """Exit status of every command line entry point."""

    ANSWERED = 0
    RUN_FAILED = 1
    BAD_JOB = 2
    TOO_MANY_FAILED_RECORDS = 3
    LOCKED = 4


class MasBatchError(Exception):
    """Base of every error that mas_batch raises on purpose.

    Its words go to terminals, logs and tables: a URL's credentials are taken out of them here.
    """

    exit_code = ExitCode.RUN_FAILED

    def __init__(self, *args: Any) -> None:
        super().__init__(*(without_credentials(a) if isinstance(a, str) else a for a in args))


class JobError(MasBatchError):
    """The job cannot run as written.

    The message names the file, the key path, the value and what is allowed, as far as each
    is known: ``jobs/x.yaml: routing.policy: 'fast' is not allowed; allowed: capability, …``.
    """

    exit_code = ExitCode.BAD_JOB

    def __init__(self, message: str, *, key: str | None = None, file: str | None = None) -> None:
        self.key = key
        self.file = file
        self.message = without_credentials(message)
        super().__init__(": ".join(part for part in (file, key, message) if part))

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive pickling
        return (_job_error, (self.message, self.key, self.file))


def _job_error(message: str, key: str | None, file: str | None) -> JobError:
    return JobError(message, key=key, file=file)


class ModelError(MasBatchError):
    """A model's files could not be fetched, verified or loaded."""


class EngineError(MasBatchError):
    """An engine failed on a batch."""


class OutOfMemoryError(EngineError):
    """An engine ran out of memory on a batch; a smaller batch may fit."""


class EngineRefusedError(EngineError):
    """No request can succeed, whatever the batch: a wrong key, an unknown model name.

    Never isolated to a record: the agent's whole task fails, is tried again, and given up.
    """


class EngineLostError(EngineError):
    """An engine, or the accelerator under it, is dead for as long as its process lives.

    No request is to blame, and none can be answered here: a worker's process is ended, so that
    another one takes its place. What it had not committed is asked again.
    """


class EngineUnavailableError(EngineError):
    """The server behind an engine is away: starting, overloaded, gone. It may answer later.

    No record is to blame. A run commits nothing of the partition, leaves the host alone for a
    while and asks again; a pool lets the question wait.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.0, wait_s: float = 600.0) -> None:
        self.message = without_credentials(message)
        self.retry_after_s = retry_after_s
        """Seconds for which the server wants to be left alone; 0: it has not said."""
        self.wait_s = wait_s
        """Seconds after which the run ends if the server has answered nothing."""
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive pickling
        return (_unavailable, (self.message, self.retry_after_s, self.wait_s))


def _unavailable(message: str, retry_after_s: float, wait_s: float) -> EngineUnavailableError:
    return EngineUnavailableError(message, retry_after_s=retry_after_s, wait_s=wait_s)


class RunError(MasBatchError):
    """The run cannot go on: a broken invariant, a lost cluster, an unwritable output."""


class CorpusChangedError(RunError):
    """A file of the corpus was rewritten or removed while it was read."""


class OutputError(RunError):
    """The output cannot be written: full, read-only, forbidden. No agent is to blame for it."""


class VersionError(RunError):
    """A worker has other code than the submitting process: it is asked nothing."""

    def __init__(self, address: str, name: str, has: str, wanted: str) -> None:
        self.address = address
        self._facts = (address, name, has, wanted)
        super().__init__(
            f"worker {name} ({address}) has mas_batch {has}, and this run is of {wanted}: it is "
            "asked nothing; give it the same code and start it again, or allow other code by "
            "cluster.mixed_versions: allow"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (VersionError, self._facts)


class RunLockedError(RunError):
    """Another process is working on this run, or on a run of the same job."""

    exit_code = ExitCode.LOCKED


class PoolBusyError(MasBatchError):
    """A pool has as many questions pending as it may have; ask again later."""


class PoolClosedError(MasBatchError):
    """A pool is closed or closing, or its cluster was lost."""


class NoAnswerError(MasBatchError):
    """No agent of a pool gave an answer to a text; the message says what each did."""


class AnswerTimeoutError(NoAnswerError, TimeoutError):
    """No agent of a pool gave an answer in time."""


class RecordError(MasBatchError):
    """One record (or one answer to it) is unusable; the code says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        self.message = without_credentials(message)
        super().__init__(f"{reason}: {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return (RecordError, (self.reason, self.message))


class Reason(StrEnum):
    """Why a record has no answer. Codes are stable: people's alerts depend on them."""

    # Found while reading the corpus (stage "corpus")
    MALFORMED_ROW = "malformed_row"
    MISSING_TEXT = "missing_text"
    NOT_TEXT = "not_text"
    EMPTY = "empty"
    WHITESPACE = "whitespace"
    INVALID_UTF8 = "invalid_utf8"
    NUL_CHARACTER = "nul_character"
    # Found while asking an agent (stage "answer")
    TOO_LONG = "too_long"
    ENGINE_ERROR = "engine_error"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_DIED = "worker_died"
    AGENT_FAILED = "agent_failed"
    # Found while reading an agent's reply (stage "parse")
    EMPTY_ANSWER = "empty_answer"
    UNPARSABLE_ANSWER = "unparsable_answer"

    @property
    def stage(self) -> str:
        """The stage of the pipeline at which this reason arises."""
        if self in _CORPUS_REASONS:
            return "corpus"
        if self in (Reason.EMPTY_ANSWER, Reason.UNPARSABLE_ANSWER):
            return "parse"
        return "answer"

    @property
    def worth_retrying(self) -> bool:
        """Whether another try may succeed: `mas-batch submit --retry-failed` makes one.

        A reply that cannot be parsed would be the same again, and so would an unusable record. A
        text that was too long may fit another version of the engine or server.
        """
        return self.stage == "answer"


_CORPUS_REASONS = frozenset(
    {
        Reason.MALFORMED_ROW,
        Reason.MISSING_TEXT,
        Reason.NOT_TEXT,
        Reason.EMPTY,
        Reason.WHITESPACE,
        Reason.INVALID_UTF8,
        Reason.NUL_CHARACTER,
    }
)
