"""How one task of an agent reaches an engine that others ask too."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

from mas_batch.engines.base import Completion, Engine, Request, Sampling, TokenizedPrompt
from mas_batch.engines.batching import tokenized
from mas_batch.engines.loop import EngineLoop


class LoopClient:
    """Asks an engine that others may be asking too, for one task; an `EngineClient`.

    Args:
        engine: the loop's engine, or a view of it.
        tokenize: the engine's, or one that remembers what it has tokenised.
        adapter: of the agent that asks.
        known: see `EngineClient.known`.
    """

    def __init__(
        self,
        loop: EngineLoop,
        engine: Engine,
        tokenize: Callable[[Request], TokenizedPrompt] | None = None,
        adapter: str | None = None,
        known: MutableMapping[tuple[Request, Sampling], Completion] | None = None,
    ) -> None:
        self._loop = loop
        self._adapter = adapter
        self._engine = engine
        self._tokenize = tokenize or engine.tokenize
        self.known = {} if known is None else known
        self.asked_s = 0.0
        """Seconds that requests were with the loop so far: the engine's share, and waiting."""

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus completion, in the model's own tokens."""
        return self._engine.max_context_tokens

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Render and tokenise a request, in the caller's thread."""
        return self._tokenize(request)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Answer every request; see `EngineClient.complete`."""
        ready = tokenized(requests, self._tokenize)
        if self._adapter is not None:
            ready = [replace(request, adapter=self._adapter) for request in ready]
        start = time.perf_counter()
        try:
            return self._loop.complete(ready, sampling, self._engine)
        finally:
            self.asked_s += time.perf_counter() - start
