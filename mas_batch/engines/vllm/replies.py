"""What vLLM returns, as completions. Pure: it is given vLLM's objects and imports none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mas_batch.engines.base import Completion, Sampling
from mas_batch.errors import Reason

Decode = Callable[[Sequence[int]], str]


def written(output: Any, decode: Decode, compute_s: float) -> list[Completion]:
    """Return a request's completions, in the samples' order.

    Args:
        output: a finished `RequestOutput`, asked with `logprobs` and in vLLM's default
            `logprobs_mode`: its sums are of the logits as they are, end token included.
        compute_s: the request's share of the model's time; its samples share it by their tokens.
    """
    samples = sorted(output.outputs, key=lambda sample: sample.index)
    num_tokens = sum(len(sample.token_ids) for sample in samples) or 1
    return [
        _completion(output, sample, decode, compute_s * len(sample.token_ids) / num_tokens)
        for sample in samples
    ]


def _completion(output: Any, sample: Any, decode: Decode, compute_s: float) -> Completion:
    tokens = tuple(sample.token_ids)
    num_read, reason = len(output.prompt_token_ids), sample.finish_reason
    if reason not in ("stop", "length"):
        return failed(num_read, Reason.ENGINE_ERROR, f"vLLM ended it with {reason!r}", compute_s)
    if sample.cumulative_logprob is None or not math.isfinite(sample.cumulative_logprob):
        message = (
            "the model's logits are not finite; float16 overflows in some models, where bfloat16 "
            "or float32 does not"
        )
        return failed(num_read, Reason.ENGINE_ERROR, message, compute_s)
    kept = tokens[:-1] if reason == "stop" else tokens
    return Completion(
        text=decode(kept).strip(),
        token_ids=kept,
        sum_logprob=sample.cumulative_logprob,
        num_tokens=len(tokens),
        finish_reason=reason,
        prompt_tokens=num_read,
        compute_s=compute_s,
        cached_tokens=output.num_cached_tokens,
    )


def next_logprobs(output: Any) -> Mapping[int, float]:
    """Return next token → its log-probability, of a request for one token."""
    return {token: found.logprob for token, found in output.outputs[0].logprobs[0].items()}


def chosen(
    sampling: Sampling,
    choices: Sequence[tuple[int, ...]],
    logprobs: tuple[float, ...],
    prompt_tokens: int,
    cached_tokens: int | None,
    compute_s: float,
) -> list[Completion]:
    """Return the completions of a request whose continuations are given."""
    if not all(map(math.isfinite, logprobs)):
        message = "the model's log-probabilities of the choices are not finite"
        return [failed(prompt_tokens, Reason.ENGINE_ERROR, message)] * sampling.num_samples
    best = max(range(len(choices)), key=lambda i: logprobs[i])
    completion = Completion(
        text=sampling.choices[best],
        token_ids=choices[best],
        sum_logprob=logprobs[best],
        num_tokens=len(choices[best]),
        finish_reason="stop",
        prompt_tokens=prompt_tokens,
        compute_s=compute_s / sampling.num_samples,
        prefill_s=compute_s / sampling.num_samples,  # nothing is written
        cached_tokens=cached_tokens,
        choice_logprobs=logprobs,
        choice_tokens=tuple(map(len, choices)),
    )
    return [completion] * sampling.num_samples


def failed(prompt_tokens: int, reason: Reason, message: str, compute_s: float = 0.0) -> Completion:
    """Return what stands for a completion that there is not."""
    facts = ("", (), None, 0, "error", prompt_tokens, compute_s)
    return Completion(*facts, reason=reason, message=message)
