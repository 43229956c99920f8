"""What an answer took, and how it ends: with something said, or with a reason for nothing.

An answer under way is an `Answer` without a text and without a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mas_batch.engines.base import Completion
from mas_batch.errors import RecordError
from mas_batch.records import Answer, Parsed


def add(answer: Answer, completions: Sequence[Completion]) -> Answer:
    """Add what completions took: tokens, seconds and log-probabilities are sums.

    One log-probability or prefill that is unknown makes its sum unknown. `finish_reason` is
    `error` if any failed, else `length` if any was cut, else `stop`.
    """
    reasons = {answer.finish_reason, *(c.finish_reason for c in completions)}
    return replace(
        answer,
        prompt_tokens=answer.prompt_tokens + sum(c.prompt_tokens for c in completions),
        completion_tokens=answer.completion_tokens + sum(c.num_tokens for c in completions),
        sum_logprob=_sum([answer.sum_logprob, *(c.sum_logprob for c in completions)]),
        t_compute_s=answer.t_compute_s + sum(c.compute_s for c in completions),
        t_prefill_s=_sum([answer.t_prefill_s, *(c.prefill_s for c in completions)]),
        finish_reason=next(r for r in ("error", "length", "stop") if r in reasons),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def said(answer: Answer, parsed: Parsed) -> Answer:
    """End it with what was said."""
    return replace(answer, text=parsed.text, label=parsed.label, value=parsed.value)


def failed(answer: Answer, error: RecordError) -> Answer:
    """End it with what went wrong; what it took is kept, a likelihood of no answer is not."""
    return replace(answer, sum_logprob=None, reason=error.reason, message=error.message)


def given_up(answer: Answer, error: RecordError) -> Answer:
    """End it with why it cannot be asked (further), which is no completion's fault."""
    return failed(replace(answer, finish_reason="error"), error)
