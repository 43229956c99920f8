"""Length-sorted batches under a token budget, and what to do when one fails.

Sorting by length keeps padding small; the budget bounds memory: a batch costs
rows × (longest prompt + max_new_tokens) tokens. Measured 1.5 times the throughput of fixed
batches in file order on a 2-core CPU, with the same greedy output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from mas_batch.engines.base import (
    Completion,
    Engine,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.claims import checked
from mas_batch.errors import (
    EngineError,
    EngineLostError,
    EngineRefusedError,
    EngineUnavailableError,
    OutOfMemoryError,
    Reason,
)


def plan_batches(
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    max_batch_tokens: int | None,
    *,
    num_samples: int = 1,
) -> list[list[int]]:
    """Cut requests into batches of like length; returns positions, longest batch first.

    The longest go first so that an out-of-memory error shows at the start, not at the end.
    A request over the budget gets a batch of its own.
    """
    order = sorted(range(len(prompt_tokens)), key=lambda i: (-prompt_tokens[i], i))
    if max_batch_tokens is None:
        return [order] if order else []
    batches: list[list[int]] = []
    limit = 0
    for i in order:
        if not batches or len(batches[-1]) >= limit:
            batches.append([])
            # Sorted: the first of a batch is its longest, so it alone sets the batch's size.
            limit = _max_rows(prompt_tokens[i] + max_new_tokens, max_batch_tokens, num_samples)
        batches[-1].append(i)
    return batches


def next_batch(
    prompt_tokens: Sequence[int],
    oldest: Collection[int],
    max_new_tokens: int,
    max_batch_tokens: int | None,
    *,
    num_samples: int = 1,
) -> list[int]:
    """Return the batch to run next of what waits: the first one that holds one of the oldest.

    So whoever came first is served by every batch until it has all, and the others fill it up.
    The last batch of a plan may have room left: longer requests fill it as the budget allows.

    Args:
        oldest: positions of the requests of whoever came first, at least one.
    """
    plan = plan_batches(prompt_tokens, max_new_tokens, max_batch_tokens, num_samples=num_samples)
    chosen = next(k for k, batch in enumerate(plan) if not set(oldest).isdisjoint(batch))
    batch = plan[chosen]
    if max_batch_tokens is None or chosen == 0 or chosen + 1 < len(plan):
        return batch
    longer = [i for earlier in plan[:chosen] for i in earlier]
    for i in reversed(longer):
        row_tokens = prompt_tokens[i] + max_new_tokens
        if len(batch) >= _max_rows(row_tokens, max_batch_tokens, num_samples):
            break
        batch = [i, *batch]
    return batch


def _max_rows(row_tokens: int, max_batch_tokens: int, num_samples: int) -> int:
    return max(1, max_batch_tokens // max(1, row_tokens * num_samples))


def rows_per_request(sampling: Sampling) -> int:
    """Return how many sequences a request is while it is decoded."""
    return max(sampling.num_samples, sampling.num_beams)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Requests with their prompts, and those of them that need not be asked."""

    requests: list[Request]
    """All of them, tokenised."""
    refused: dict[int, list[Completion]]
    """Position → what stands for the completions of a request over the context."""

    @property
    def fitting(self) -> list[int]:
        """Positions of the requests to ask."""
        return [i for i in range(len(self.requests)) if i not in self.refused]

    def with_answers(self, answers: dict[int, list[Completion]]) -> list[list[Completion]]:
        """Return the completions of all requests, given those of the fitting ones."""
        done = self.refused | answers
        return [done[i] for i in range(len(self.requests))]


def tokenized(
    requests: Sequence[Request], tokenize: Callable[[Request], TokenizedPrompt]
) -> list[Request]:
    """Return the requests, each with its prompt, prepared now if it has not been before."""
    return [
        request if request.tokenized is not None else replace(request, tokenized=tokenize(request))
        for request in requests
    ]


def prepare(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> Prepared:
    """Tokenise the requests that are not yet, and refuse those that leave no room to answer."""
    ready = tokenized(requests, engine.tokenize)
    refused: dict[int, list[Completion]] = {}
    for i, request in enumerate(ready):
        length = _length(request)
        if length + sampling.max_new_tokens > engine.max_context_tokens:
            message = (
                f"{length} prompt tokens + {sampling.max_new_tokens} new are over the model's "
                f"context of {engine.max_context_tokens}"
            )
            refused[i] = _failed(sampling, length, Reason.TOO_LONG, message)
    return Prepared(ready, refused)


def complete(
    engine: Engine, requests: Sequence[Request], sampling: Sampling
) -> list[list[Completion]]:
    """Ask an engine in the caller's thread; see `EngineClient.complete`.

    For engines that any thread may call, and where nobody else asks the engine.
    """
    prepared = prepare(engine, requests, sampling)
    fitting = [prepared.requests[i] for i in prepared.fitting]
    answers: dict[int, list[Completion]] = {}
    for batch in plan_batches(
        [_length(request) for request in fitting],
        sampling.max_new_tokens,
        engine.max_batch_tokens,
        num_samples=rows_per_request(sampling),
    ):
        rows = answer_batch(engine, [fitting[i] for i in batch], sampling)
        answers.update(zip((prepared.fitting[i] for i in batch), rows, strict=True))
    return prepared.with_answers(answers)


def answer_batch(
    engine: Engine, batch: Sequence[Request], sampling: Sampling
) -> list[list[Completion]]:
    """Ask about a batch, halving it where it fails, until the culprit stands alone.

    Raises:
        EngineRefusedError, EngineUnavailableError: as `Engine.generate` does.
    """
    try:
        replies = engine.generate(batch, sampling)
        if len(replies) != len(batch):
            raise EngineError(f"{len(replies)} replies to {len(batch)} requests")
        return [[checked(reply, sampling) for reply in row] for row in replies]
    except (EngineLostError, EngineRefusedError, EngineUnavailableError):
        raise
    except Exception as error:
        if middle := len(batch) // 2:
            halves = batch[:middle], batch[middle:]
            return [row for half in halves for row in answer_batch(engine, half, sampling)]
        out_of_memory = isinstance(error, (OutOfMemoryError, MemoryError))
        reason = Reason.OUT_OF_MEMORY if out_of_memory else Reason.ENGINE_ERROR
        length = tokenized_prompt(engine, batch[0]).num_tokens
        return [_failed(sampling, length, reason, f"{type(error).__name__}: {error}")]


def _length(request: Request) -> int:
    assert request.tokenized is not None
    return request.tokenized.num_tokens


def _failed(
    sampling: Sampling, prompt_tokens: int, reason: Reason, message: str
) -> list[Completion]:
    failure = Completion(
        "", (), None, 0, "error", prompt_tokens, prefill_s=0.0, cached_tokens=0, reason=reason,
        message=message,
    )  # fmt: skip
    return [failure] * sampling.num_samples
