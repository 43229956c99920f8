"""Engines without a model that show what a loop does with them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mas_batch.engines.base import (
    Completion,
    Finished,
    Message,
    Request,
    Sampling,
    TokenizedPrompt,
    Waiting,
)
from mas_batch.errors import EngineError, EngineRefusedError, EngineUnavailableError
from tests.waiting import PATIENCE_S


def requests(*texts: str) -> list[Request]:
    """A request per text, which is its id, too."""
    return [Request(text, text, (Message("user", text),)) for text in texts]


def spoken(rows: Sequence[Sequence[Completion]]) -> list[str]:
    """What was answered, or the reason why not."""
    return [row[0].reason or row[0].text for row in rows]


@dataclass(eq=False)
class Capitals:
    """Says every text in capitals; a token is a word. Faults are words in the texts.

    `broken`: the batch fails. `refused`, `away`: no batch can succeed. `held`: it waits until it
    is told to go on.
    """

    max_context_tokens: int = 1000
    max_batch_tokens: int | None = None
    takes_messages: bool = True
    only_translates: bool = False
    samples: bool = True
    batches: list[list[str]] = field(default_factory=list)
    """Texts of every batch, also of one that fails."""
    threads: set[int] = field(default_factory=set)
    """Where it was called, but for `tokenize`."""
    closed: bool = False
    holding: threading.Event = field(default_factory=threading.Event)
    """It has met `held`."""
    go_on: threading.Event = field(default_factory=threading.Event)

    def tokenize(self, request: Request) -> TokenizedPrompt:
        return TokenizedPrompt(len(request.text.split()))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.threads.add(threading.get_ident())
        self.batches.append([request.text for request in requests])
        for request in requests:
            self._suffer(request.text)
        return [[completion(request.text)] * sampling.num_samples for request in requests]

    def _suffer(self, text: str) -> None:
        words = text.split()
        if "held" in words:
            self.holding.set()
            self.go_on.wait(PATIENCE_S)
        if "broken" in words:
            raise EngineError(f"cannot do {text!r}")
        if "refused" in words:
            raise EngineRefusedError("a wrong key")
        if "away" in words:
            raise EngineUnavailableError("gone", retry_after_s=7.0, wait_s=11.0)

    def describe(self) -> Mapping[str, Any]:
        return {"engine": "capitals"}

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed = True


@dataclass(eq=False)
class StepByStep(Capitals):
    """The same, a word a step, at most `max_rows` at once.

    More faults: `unbegun`: it cannot begin. `stuck`: it fails in its second step.
    """

    max_rows: int = 3
    steps: list[list[str]] = field(default_factory=list)
    """Texts under way in every step."""
    running: dict[int, list[str]] = field(default_factory=dict)
    """Key → the text, then the words that are left to say."""

    def can_step(self, sampling: Sampling) -> bool:
        return sampling.num_beams == 1

    @property
    def num_running(self) -> int:
        return len(self.running)

    def begin(self, waiting: Sequence[Waiting]) -> list[int]:
        self.threads.add(threading.get_ident())
        begun = list(range(min(len(waiting), self.max_rows - len(self.running))))
        for i in begun:
            self._suffer(waiting[i].request.text)
        for i in begun:
            text = waiting[i].request.text
            self.running[waiting[i].key] = [text, *(text.split() or [""])]
        return begun

    def step(self) -> list[Finished]:
        self.threads.add(threading.get_ident())
        self.steps.append([left[0] for left in self.running.values()])
        if any("stuck" in left[0] and len(left) < 3 for left in self.running.values()):
            raise EngineError("the state is undefined")
        for left in self.running.values():
            left.pop()
        ended = {key: left[0] for key, left in self.running.items() if len(left) == 1}
        for key in ended:
            del self.running[key]
        return [Finished(key, [completion(text)]) for key, text in ended.items()]

    def drop(self) -> None:
        self.running.clear()

    def _suffer(self, text: str) -> None:
        super()._suffer(text)
        if "unbegun" in text.split():
            raise EngineError(f"cannot begin {text!r}")


@dataclass(eq=False)
class Server(Capitals):
    """The same, for any number of threads at once."""

    threadsafe: bool = True


def completion(text: str) -> Completion:
    num_tokens = len(text.split())
    return Completion(text.upper(), (), None, num_tokens, "stop", num_tokens)
