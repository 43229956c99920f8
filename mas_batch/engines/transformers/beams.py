"""Beam search: that of `model.generate`, with scores that do not cost its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mas_batch.engines.base import Sampling
from mas_batch.engines.decoding import Decoded
from mas_batch.engines.transformers.streams import SpecialTokens, pad_rows
from mas_batch.engines.transformers.transformers_compat import accepted


def beam_search(
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
