"""The account of an answer: what it took, and how it ends: with a text, or with a reason.

An answer under way is an `Answer` without a text and without a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mas_batch.engines.base import Completion
from mas_batch.engines.claims import valid_count
from mas_batch.errors import RecordError
from mas_batch.records import Answer, Parsed


def add(answer: Answer, completions: Sequence[Completion]) -> Answer:
    """Add what completions took to an answer: tokens, seconds and log-probabilities are sums.

    A single unknown count, log-probability or prefill makes its sum unknown, as does a count
    that no table can hold. `finish_reason` is `error` if any completion failed, else `length`
    if any was cut, else `stop`.
    """
    reasons = {answer.finish_reason, *(c.finish_reason for c in completions)}
    return replace(
        answer,
        prompt_tokens=_sum_of_counts(
            [answer.prompt_tokens, *(c.prompt_tokens for c in completions)]
        ),
        cached_tokens=_sum_of_counts(
            [answer.cached_tokens, *(c.cached_tokens for c in completions)]
        ),
        completion_tokens=_sum_of_counts(
            [answer.completion_tokens, *(c.num_tokens for c in completions)]
        ),
        sum_logprob=_sum_if_all_known([answer.sum_logprob, *(c.sum_logprob for c in completions)]),
        t_compute_s=answer.t_compute_s + sum(c.compute_s for c in completions),
        t_prefill_s=_sum_if_all_known([answer.t_prefill_s, *(c.prefill_s for c in completions)]),
        finish_reason=next(r for r in ("error", "length", "stop") if r in reasons),
    )


def _sum_if_all_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _sum_of_counts(values: Sequence[int | None]) -> int | None:
    return valid_count(_sum_if_all_known(values))


def succeeded(answer: Answer, parsed: Parsed) -> Answer:
    """End the answer with a parsed reply."""
    return replace(
        answer, text=parsed.text, label=parsed.label, value=parsed.value, probs=parsed.probs
    )


def failed(answer: Answer, error: RecordError) -> Answer:
    """End the answer with an error; its times and tokens are kept, its log-probability is not."""
    return replace(answer, sum_logprob=None, reason=error.reason, message=error.message)


def given_up(answer: Answer, error: RecordError) -> Answer:
    """End the answer with an error for which no (further) completion can be asked."""
    return failed(replace(answer, finish_reason="error"), error)
