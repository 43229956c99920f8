"""Length-sorted batches under a token budget, and what to do when one fails.

Sorting by length keeps padding small; the budget bounds memory: a batch costs
rows × (longest prompt + max_new_tokens) tokens. Measured 1.5 times the throughput of fixed
batches in file order on a 2-core CPU, with the same greedy output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mas_batch.engines.base import Completion, Engine, Request, Sampling, tokenized_prompt
from mas_batch.engines.claims import checked
from mas_batch.errors import (
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
            row_tokens = (prompt_tokens[i] + max_new_tokens) * num_samples
            limit = max(1, max_batch_tokens // max(1, row_tokens))
        batches[-1].append(i)
    return batches


def complete(
    engine: Engine, requests: Sequence[Request], sampling: Sampling
) -> list[list[Completion]]:
    """Answer every request, in the order given, whatever batching does in between.

    A prompt that leaves no room for `max_new_tokens` in the context fails alone with
    `too_long`. A batch that fails is halved until the culprit stands alone; it becomes a
    completion with a reason, and its batch-mates are answered.
    """
    prompts = [tokenized_prompt(engine, request) for request in requests]
    requests = [replace(r, tokenized=p) for r, p in zip(requests, prompts, strict=True)]
    lengths = [prompt.num_tokens for prompt in prompts]
    done: dict[int, list[Completion]] = {}
    fitting: list[int] = []
    for i, length in enumerate(lengths):
        if length + sampling.max_new_tokens <= engine.max_context_tokens:
            fitting.append(i)
            continue
        message = (
            f"{length} prompt tokens + {sampling.max_new_tokens} new are over the model's "
            f"context of {engine.max_context_tokens}"
        )
        done[i] = _failed(sampling, length, Reason.TOO_LONG, message)
    for batch in plan_batches(
        [lengths[i] for i in fitting],
        sampling.max_new_tokens,
        engine.max_batch_tokens,
        num_samples=max(sampling.num_samples, sampling.num_beams),
    ):
        positions = [fitting[i] for i in batch]
        answers = _answers(engine, [requests[i] for i in positions], sampling)
        done.update(zip(positions, answers, strict=True))
    return [done[i] for i in range(len(requests))]


def _answers(
    engine: Engine, batch: Sequence[Request], sampling: Sampling
) -> list[list[Completion]]:
    """Ask about a batch, halving it where it fails, until the culprit stands alone."""
    try:
        replies = engine.generate(batch, sampling)
        return [[checked(reply, sampling) for reply in row] for row in replies]
    except (EngineRefusedError, EngineUnavailableError):
        raise
    except Exception as error:
        if middle := len(batch) // 2:
            halves = batch[:middle], batch[middle:]
            return [row for half in halves for row in _answers(engine, half, sampling)]
        out_of_memory = isinstance(error, (OutOfMemoryError, MemoryError))
        reason = Reason.OUT_OF_MEMORY if out_of_memory else Reason.ENGINE_ERROR
        length = tokenized_prompt(engine, batch[0]).num_tokens
        return [_failed(sampling, length, reason, f"{type(error).__name__}: {error}")]


def _failed(
    sampling: Sampling, prompt_tokens: int, reason: Reason, message: str
) -> list[Completion]:
    failure = Completion(
        "", (), None, 0, "error", prompt_tokens, prefill_s=0.0, reason=reason, message=message
    )
    return [failure] * sampling.num_samples
