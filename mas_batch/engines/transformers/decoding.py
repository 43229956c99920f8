"""One decode loop for PyTorch language models, decoder-only and encoder-decoder.

Why not `model.generate`: it runs finished rows until the longest ends, pads every prompt to the
longest before it reads them, reads a prompt once per sample, copies the whole past at every
step, draws samples from the global seed and keeps [steps, rows, vocabulary] scores where a sum
per row is wanted. Beam search is left to it.

Rounding differs with a batch's shape, by about 1e-5 in float32 logits: only between tokens that
are nearer to each other can the batch decide.

Names: a row is one sequence being decoded; `logits` are float32 [rows, vocabulary] of the next
token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mas_batch.engines.base import Sampling
from mas_batch.engines.transformers.streams import (
    SpecialTokens,
    Stream,
    accepted,
    open_stream,
    pad_rows,
)
from mas_batch.errors import EngineError

Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits, the rows' numbers, step) → token per row."""


@dataclass(slots=True)
class Decoded:
    """One row's tokens so far."""

    tokens: list[int] = field(default_factory=list)
    """As generated, the end token included."""
    sum_logprob: float = 0.0
    """Natural logarithm of their probability at temperature 1, nothing banned."""
    ended: bool = False


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    special: SpecialTokens,
    sampling: Sampling,
    seeds: Sequence[int],
) -> tuple[list[list[Decoded]], float | None]:
    """Decode one batch of token prompts: per prompt, `sampling.num_samples` results.

    Returns:
        The results, and the seconds of reading the prompts; None of a beam search.

    Raises:
        EngineError: the model's logits are not finite.
    """
    copies = sampling.num_samples
    if sampling.num_beams > 1:
        return [[best] for best in _beam_search(model, prompts, special, sampling)], None
    choose = _greedy if sampling.temperature == 0 else Sampler(sampling, seeds)
    stream = open_stream(model, special, sampling.max_new_tokens)
    start = time.perf_counter()
    logits = stream.start(prompts)
    _wait_for(logits.device)
    prefill_s = time.perf_counter() - start
    if copies > 1:  # only now: every prompt has been read once, whatever the number of samples
        rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(copies)
        stream.keep(rows)
        logits = logits[rows]
    flat = _run(stream, logits, choose, special, sampling.max_new_tokens)
    return [flat[i : i + copies] for i in range(0, len(flat), copies)], prefill_s


def _wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told: a time taken before means nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _run(
    stream: Stream, logits: Tensor, choose: Choose, special: SpecialTokens, max_new_tokens: int
) -> list[Decoded]:
    """Choose and feed back tokens; a row leaves the batch as it ends."""
    done = [Decoded() for _ in range(len(logits))]
    active = list(range(len(logits)))
    for step in range(max_new_tokens):
        forced = special.forced_first if step == 0 else None
        tokens, logprobs = _choose(logits, choose, special, forced, active, step)
        for i, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise EngineError(
                    f"the model's logits at step {step} are not finite; float16 overflows in some "
                    "models, where bfloat16 or float32 does not"
                )
            done[i].tokens.append(token)
            done[i].sum_logprob += logprob
            done[i].ended = token in special.end
        left = [k for k, i in enumerate(active) if not done[i].ended]
        if not left or step + 1 == max_new_tokens:
            break
        if len(left) < len(active):
            rows = torch.tensor(left, device=tokens.device)
            stream.keep(rows)
            tokens = tokens[rows]
            active = [active[k] for k in left]
        logits = stream.step(tokens)
    return done


def _choose(
    logits: Tensor,
    choose: Choose,
    special: SpecialTokens,
    forced: int | None,
    active: Sequence[int],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Return the rows' next tokens and the tokens' log-probabilities."""
    if forced is not None:
        tokens = torch.full((len(logits),), forced, device=logits.device)
        return tokens, logits.new_zeros(len(logits))
    total = logits.logsumexp(-1)
    if special.banned:
        logits = logits.clone()
        logits[:, list(special.banned)] = -torch.inf
    tokens = choose(logits, active, step)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - total


def _greedy(logits: Tensor, active: Sequence[int], step: int) -> Tensor:
    return logits.argmax(-1)


class Sampler:
    """Draws by inverse distribution function from a random stream of each row's own.

    One number per row and step, so that a sample depends on its request's seed and its own
    number alone. Two batches can differ only by rounding in the model's logits, which moves a
    draw with a probability of about that rounding error.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        """Take one seed per request; its samples are the spawned streams 0, 1, …"""
        self._sampling = sampling
        streams = [
            np.random.SeedSequence(seed, spawn_key=(sample,))
            for seed in seeds
            for sample in range(sampling.num_samples)
        ]
        steps = sampling.max_new_tokens
        self._uniform = np.stack(
            [np.random.Generator(np.random.PCG64(s)).random(steps) for s in streams]
        )

    def __call__(self, logits: Tensor, active: Sequence[int], step: int) -> Tensor:
        """Return one token per row of `logits`; `active` are the rows' numbers from the start."""
        device = logits.device
        if device.type == "mps":  # it has no float64, and float32 sums are off by a draw's grain
            logits = logits.cpu()
        probs = (logits.double() / self._sampling.temperature).softmax(-1)
        # In the order of token ids: a near-tie may swap places in an order by probability.
        below = _restrict(probs, self._sampling.top_k, self._sampling.top_p).cumsum(-1)
        # Divided by its last value it ends with exactly 1, above any draw.
        below /= below[:, -1:].clone()
        draw = torch.from_numpy(self._uniform[active, step]).to(below.device)
        return torch.searchsorted(below, draw[:, None], right=True)[:, 0].to(device)


def _restrict(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to 0 what is not among the `top_k` likeliest, then what is beyond `top_p` of the rest."""
    if 0 < top_k < probs.shape[-1]:
        probs = probs.where(probs >= probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        kept = ordered.where(likelier < top_p * ordered.sum(-1, keepdim=True), 0)
        probs = torch.zeros_like(probs).scatter(1, order, kept)
    return probs


# --- Beam search


def _beam_search(
    model: Any, prompts: Sequence[Sequence[int]], special: SpecialTokens, sampling: Sampling
) -> list[Decoded]:
    """Return the best hypothesis per prompt by mean log-probability per token."""
    decoder_only = special.decoder_start is None
    side = "left" if decoder_only else "right"
    ids, mask = pad_rows(prompts, special.pad, side, model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=sampling.num_beams,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=sorted(special.end) or None,
        pad_token_id=special.pad,
        decoder_start_token_id=special.decoder_start,
        forced_bos_token_id=special.forced_first,
        suppress_tokens=list(special.banned) or None,
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    found = output[:, ids.shape[1] if decoder_only else 1 :].tolist()
    results = []
    for prompt, row in zip(prompts, found, strict=True):
        end = next((i for i, token in enumerate(row) if token in special.end), None)
        tokens = row if end is None else row[: end + 1]
        # Asking `generate` for scores would keep [steps, rows × beams, vocabulary] of them;
        # reading one hypothesis again costs what one of its many beams has cost at the prompt.
        results.append(Decoded(tokens, _score(model, prompt, tokens, special), end is not None))
    return results


def _score(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], special: SpecialTokens
) -> float:
    """Sum the tokens' log-probabilities in one pass over them."""

    def tensor(row: Sequence[int]) -> Tensor:
        return torch.tensor([row], device=model.device)

    if special.decoder_start is None:
        ids = tensor([*prompt, *tokens[:-1]])
        output = model(input_ids=ids, **accepted(model, logits_to_keep=len(tokens)))
    else:
        shifted = tensor([special.decoder_start, *tokens[:-1]])
        output = model(input_ids=tensor(prompt), decoder_input_ids=shifted)
    logprobs = output.logits[0, -len(tokens) :].float().log_softmax(-1)
    chosen = logprobs.gather(1, tensor(tokens).T)[:, 0]
    first = 0 if special.forced_first is None else 1
    return float(chosen[first:].double().sum())
