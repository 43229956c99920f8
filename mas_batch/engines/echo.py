"""A deterministic engine without a model: for dry runs, examples and tests of failures.

A token is a whitespace-separated word. A reply depends only on the model's name, the text, the
request's seed and the sample number. It claims no log-probability: it has none.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.options import EngineOptions, read_options
from mas_batch.errors import EngineError, EngineRefusedError, ModelError, OutOfMemoryError
from mas_batch.models import ModelFiles

Fault = Literal["error", "out_of_memory", "unparsable", "kill", "hang", "allocate"]

_STEP_BYTES = 64 * 2**20
_PAUSE_S = 0.05
"""Between two steps of `allocate`, so that a memory limit sees it grow."""
_HOLD_S = 30.0
"""How long `allocate` holds all of it."""


class Options(EngineOptions):
    """What `agents.options` may hold for this engine."""

    reply: Annotated[str, Field(min_length=1)] = "{text}"
    """What it says; `{text}` is the record."""
    labels: Annotated[list[str], Field(min_length=1)] | None = None
    """Reply with one of these. Which, the text alone decides: agents agree where none errs."""
    words: Annotated[int, Field(ge=1)] | None = None
    """End the reply after so many words, as a model that has said enough."""
    error_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Fraction of replies that are wrong: another of `labels`, or each word spelled backwards."""
    concurrent: Annotated[int, Field(ge=1, le=32)] = 1
    """How many partitions it is asked about at once. The loop makes them one batch, so faults that
    count batches (`fail_after`) depend on who is fast if it is above 1."""
    max_context_tokens: Annotated[int, Field(ge=1)] = 8192
    seconds_per_token: Annotated[float, Field(ge=0.0)] = 0.0
    """Time of one decoding step: a batch takes as many as its longest reply has tokens."""
    seconds_per_batch: Annotated[float, Field(ge=0.0)] = 0.0
    """Time of a batch whatever is in it."""
    faults: dict[Annotated[str, Field(min_length=1)], Fault] = Field(default_factory=dict)
    """What happens when a text contains the key. `error`, `out_of_memory`: the batch fails.
    `unparsable`: the reply is `???`, neither a label nor a number. `kill`: the process gets
    SIGKILL. `hang`: it never returns. `allocate`: memory grows to `allocate_bytes` and is held
    for half a minute, for a memory limit to act; if none did, the batch fails."""
    allocate_bytes: Annotated[int, Field(ge=1, le=64 * 2**30)] = 4 * 2**30
    fail_to_load: bool = False
    fail_after: Annotated[int, Field(ge=0)] | None = None
    """After so many batches it refuses every batch, as a backend that breaks."""
    fail_for_s: Annotated[float, Field(ge=0.0)] | None = None
    """So long after it first refused a batch it works again, for good; None: never."""

    @property
    def partitions_at_once(self) -> int:
        """See `concurrent`."""
        return self.concurrent

    @field_validator("fail_for_s")
    @classmethod
    def _needs_fail_after(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("fail_after") is None:
            raise PydanticCustomError("needs_fail_after", "It needs fail_after")
        return value


read = partial(read_options, Options, engine="echo")


class EchoEngine:
    """Says what it was asked, or what its options say.

    Raises:
        JobError: an option is unknown or has a value that is not allowed.
        ModelError: the option `fail_to_load` is set.
    """

    takes_messages = True
    only_translates = False
    samples = True

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        options = read(config.options)
        if options.fail_to_load:
            raise ModelError(
                f"{model.source}: it fails to load because options.fail_to_load is set"
            )
        self._source = model.source
        self.concurrent = options.concurrent
        self._options = options
        self.max_context_tokens = options.max_context_tokens
        self.max_batch_tokens = config.max_batch_tokens
        self._num_batches = 0
        """Batches so far that were not refused."""
        self._broken_since_s: float | None = None
        """When it first refused a batch, by `time.monotonic`."""

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Count the words of all turns."""
        return TokenizedPrompt(sum(len(message.content.split()) for message in request.messages))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Reply to every request, or fail as `faults` and `fail_after` say.

        Raises:
            EngineError, OutOfMemoryError: a text holds the key of such a fault.
            EngineRefusedError: the engine is broken, see `fail_after`.
        """
        start = time.perf_counter()
        self._check_works()
        for request in requests:
            self._suffer(self._fault(request), request.request_id)
        samples = range(sampling.num_samples)
        replies = [[self._reply(r, sampling, s) for s in samples] for r in requests]
        lengths = [len(text.split()) for row in replies for text, _ in row]
        steps = max(lengths, default=0)
        time.sleep(self._options.seconds_per_batch + self._options.seconds_per_token * steps)
        per_token_s = (time.perf_counter() - start) / max(1, sum(lengths))
        return [
            [self._completion(request, *reply, per_token_s) for reply in row]
            for request, row in zip(requests, replies, strict=True)
        ]

    def describe(self) -> Mapping[str, Any]:
        """Name the engine and the options that are not the defaults."""
        return {
            "engine": "echo",
            "model": self._source,
            "options": self._options.model_dump(mode="json", exclude_defaults=True),
        }

    def close(self) -> None:
        """Nothing to free."""

    def _check_works(self) -> None:
        after, for_s = self._options.fail_after, self._options.fail_for_s
        if after is None or self._num_batches < after:
            self._num_batches += 1
            return
        now = time.monotonic()
        if self._broken_since_s is None:
            self._broken_since_s = now
        if for_s is None or now - self._broken_since_s < for_s:
            raise EngineRefusedError(f"{self._source}: broken by options.fail_after = {after}")

    def _fault(self, request: Request) -> Fault | None:
        faults = self._options.faults.items()
        return next((fault for key, fault in faults if key in request.text), None)

    def _suffer(self, fault: Fault | None, request_id: str) -> None:
        """Let a fault happen; `unparsable` is one of the reply."""
        message = f"fault `{fault}` of the echo engine on {request_id}"
        match fault:
            case "error":
                raise EngineError(message)
            case "out_of_memory":
                raise OutOfMemoryError(message)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                while True:
                    time.sleep(60)
            case "allocate":
                size = self._options.allocate_bytes
                _hold_memory(size)
                unlimited = f"nothing limited the process to less than {size} bytes"
                raise EngineError(f"{message}: {unlimited}")

    def _reply(self, request: Request, sampling: Sampling, sample: int) -> tuple[str, str]:
        """Return the text and the finish reason."""
        if self._fault(request) == "unparsable":
            text = "???"
        elif self._options.labels is not None:
            text = self._label(request, sample)
        else:
            text = self._echo(request, sampling, sample)
        words = text.split()
        limit = min(self._options.words or len(words), sampling.max_new_tokens)
        # Whole replies keep their whitespace: paragraphs matter to what is done with them.
        cut = text if len(words) <= limit else " ".join(words[:limit])
        ended = min(len(words), self._options.words or len(words)) <= sampling.max_new_tokens
        return cut, "stop" if ended else "length"

    def _label(self, request: Request, sample: int) -> str:
        labels = self._options.labels or []
        right = _hash(request.text) % len(labels)
        step = 0
        if self._errs(request, sample) and len(labels) > 1:
            step = 1 + self._draw("label", request, sample) % (len(labels) - 1)
        return labels[(right + step) % len(labels)]

    def _echo(self, request: Request, sampling: Sampling, sample: int) -> str:
        text = request.text
        words = text.split()
        if sampling.temperature > 0 and words:
            turn = self._draw("turn", request, sample) % len(words)
            text = " ".join(words[turn:] + words[:turn])
        text = self._options.reply.replace("{text}", text)
        if self._errs(request, sample):
            return " ".join(word[::-1] for word in text.split())
        return text

    def _errs(self, request: Request, sample: int) -> bool:
        return self._draw("error", request, sample) < self._options.error_rate * 2**64

    def _draw(self, purpose: str, request: Request, sample: int) -> int:
        return _hash(f"{purpose}\0{self._source}\0{request.seed}\0{sample}\0{request.text}")

    def _completion(
        self, request: Request, text: str, finish_reason: str, per_token_s: float
    ) -> Completion:
        words = text.split()
        return Completion(
            text=text,
            token_ids=tuple(zlib.crc32(word.encode()) for word in words),
            sum_logprob=None,
            num_tokens=len(words),
            finish_reason=finish_reason,
            prompt_tokens=tokenized_prompt(self, request).num_tokens,
            compute_s=per_token_s * len(words),
        )


load = EchoEngine


def _hold_memory(num_bytes: int) -> None:
    held: list[bytes] = []
    for start in range(0, num_bytes, _STEP_BYTES):
        size = min(_STEP_BYTES, num_bytes - start)
        held.append(b"\1" * size)  # not zeros: those the system hands out without any memory
        time.sleep(_PAUSE_S)
    time.sleep(_HOLD_S)


def _hash(text: str) -> int:
    """64 bits that do not change with the process, as `hash` does."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
