"""An engine that nobody else asks, in the caller's thread: for tests that need no loop."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from mas_batch.engines.base import Completion, Engine, Request, Sampling, TokenizedPrompt
from mas_batch.engines.batching import complete


class DirectClient:
    """Asks an engine that nobody else asks, in the caller's thread; an `EngineClient`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.known: MutableMapping[tuple[Request, Sampling], Completion] = {}

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus completion, in the model's own tokens."""
        return self._engine.max_context_tokens

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Render and tokenise a request."""
        return self._engine.tokenize(request)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Answer every request; see `EngineClient.complete`."""
        return complete(self._engine, requests, sampling)
