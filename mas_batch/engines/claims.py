"""What an engine says of a completion, checked: one odd reply must not cost its neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

from mas_batch.engines.base import Completion, Sampling
from mas_batch.errors import Reason

MAX_COUNT = 2**31 - 1
"""Token counts are 32-bit integers in the tables."""
MAX_CHARS_PER_TOKEN = 128
"""No vocabulary in use has a longer token, but for runs of blanks. A server that ignores
`max_new_tokens` is cut here: what merges cost grows with the square of an answer's length."""


def checked(completion: Completion, sampling: Sampling) -> Completion:
    """Return the completion with claims that no table can hold made null, and its text bounded.

    Counts that are negative or above `MAX_COUNT` are null; so is a log-probability that is not
    finite. Seconds that are negative or not finite are 0, of the prefill null. A text of more
    than `MAX_CHARS_PER_TOKEN` characters for each of `sampling.max_new_tokens` is cut there and
    ends with `length`. A text that is no valid Unicode is an `engine_error`, and so are choices
    that are not all scored.
    """
    done = replace(
        completion,
        num_tokens=valid_count(completion.num_tokens),
        prompt_tokens=valid_count(completion.prompt_tokens),
        cached_tokens=valid_count(completion.cached_tokens),
        sum_logprob=_finite(completion.sum_logprob),
        compute_s=_seconds(completion.compute_s) or 0.0,
        prefill_s=_seconds(completion.prefill_s),
    )
    limit = MAX_CHARS_PER_TOKEN * sampling.max_new_tokens
    if len(done.text) > limit:
        done = replace(done, text=done.text[:limit], finish_reason="length")
    try:
        done.text.encode()
    except UnicodeEncodeError as error:
        lone = f"U+{ord(done.text[error.start]):04X}"
        return _refused(done, f"the reply is no valid Unicode: a lone surrogate, {lone}")
    scored = [lp for lp in done.choice_logprobs if math.isfinite(lp)]
    counted = [n for n in done.choice_tokens if n > 0]
    if done.reason is None and not len(scored) == len(counted) == len(sampling.choices):
        message = f"{len(scored)} of {len(sampling.choices)} choices have a log-probability"
        return _refused(done, message)
    return done


def _refused(completion: Completion, message: str) -> Completion:
    return replace(
        completion,
        text="",
        sum_logprob=None,
        finish_reason="error",
        reason=Reason.ENGINE_ERROR,
        message=message,
    )


def valid_count(claimed: object) -> int | None:
    """Return a count that a table can hold; None: it is none, whatever it is."""
    return claimed if isinstance(claimed, int) and 0 <= claimed <= MAX_COUNT else None


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _seconds(seconds: float | None) -> float | None:
    return seconds if (finite := _finite(seconds)) is not None and finite >= 0 else None
