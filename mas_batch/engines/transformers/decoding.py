"""One decode loop for PyTorch language models, decoder-only and encoder-decoder.

Why not `model.generate`: it runs finished rows until the longest ends, pads every prompt to the
longest before it reads them, reads a prompt once per sample, copies the whole past at every
step, draws samples from the global seed and keeps [steps, rows, vocabulary] scores where a sum
per row is wanted. Beam search is left to it.

Rounding differs with a batch's shape, by about 1e-5 in float32 logits: only between tokens that
are nearer to each other can the batch decide.

Names: as in `engines.decoding`; `logits` are float32 [rows, vocabulary] of the next token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mas_batch.engines.base import Sampling
from mas_batch.engines.decoding import Choose, Decoded, ScoredChoose, extend, greedy
from mas_batch.engines.sampling import Sampler
from mas_batch.engines.torch_device import wait_for
from mas_batch.engines.transformers.streams import SpecialTokens, open_stream, pad_rows
from mas_batch.engines.transformers.transformers_compat import accepted


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
    choose = greedy if sampling.temperature == 0 else Sampler(sampling, _streams(seeds, copies))
    stream = open_stream(model, special, sampling.max_new_tokens)
    start = time.perf_counter()
    logits = stream.start(prompts)
    wait_for(logits.device)
    prefill_s = time.perf_counter() - start
    if copies > 1:  # only now: every prompt has been read once, whatever the number of samples
        rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(copies)
        stream.keep(rows)
        logits = logits[rows]
    scored = _with_logprobs(choose, special)
    flat = extend(stream, logits, scored, special.end, sampling.max_new_tokens)
    return [flat[i : i + copies] for i in range(0, len(flat), copies)], prefill_s


def _with_logprobs(choose: Choose, special: SpecialTokens) -> ScoredChoose:
    """Choose among what is not banned; the log-probability is as if nothing was."""

    def scored(logits: Tensor, active: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        if step == 0 and special.forced_first is not None:
            forced = torch.full((len(logits),), special.forced_first, device=logits.device)
            return forced, logits.new_zeros(len(logits))
        total = logits.logsumexp(-1)
        if special.banned:
            logits = logits.clone()
            logits[:, list(special.banned)] = -torch.inf
        tokens = choose(logits, active, step)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - total

    return scored


def _streams(seeds: Sequence[int], num_samples: int) -> list[np.random.SeedSequence]:
    """Return a random stream per row; a request's samples are the spawned streams 0, 1, …"""
    return [
        np.random.SeedSequence(seed, spawn_key=(sample,))
        for seed in seeds
        for sample in range(num_samples)
    ]


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
