"""Which label a language model finds likeliest, by the probabilities of all of them.

A label's score is its log-probability after the record's prompt less that after the same prompt
with an empty text, the record's context kept: how much the text speaks for it. What a label's
length and its being common take from its probability is in both, and so in neither. The
probabilities are the scores' softmax.
Measured against other ways, division by the length among them: benchmarks/README.md.

Sources: Holtzman et al., "Surface form competition", EMNLP 2021; the empty text: Zhao et al.,
"Calibrate before use", ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mas_batch.engines.base import Completion


def read_labels(
    labels: Sequence[str], found: Sequence[Completion], priors: Sequence[Completion]
) -> list[Completion]:
    """Return the completions with the labels' probabilities, the likeliest label as their text.

    Their `choice_logprobs` are then the natural logarithms of probabilities that add up to 1; what
    `sum_logprob` and `num_tokens` are of is the label's own tokens, uncorrected.

    Args:
        priors: of each, what the same was after its prompt with an empty text.
    """
    return [_read(labels, one, prior) for one, prior in zip(found, priors, strict=True)]


def _read(labels: Sequence[str], found: Completion, prior: Completion) -> Completion:
    if found.reason is not None:
        return found
    if prior.reason is not None:
        why = f"the prompt of an empty text: {prior.message}"
        return replace(found, finish_reason="error", reason=prior.reason, message=why)
    each = zip(found.choice_logprobs, prior.choice_logprobs, strict=True)
    scores = [own - unasked for own, unasked in each]
    highest = max(scores)
    total = highest + math.log(math.fsum(math.exp(score - highest) for score in scores))
    best = scores.index(highest)
    return replace(
        found,
        text=labels[best],
        token_ids=(),
        sum_logprob=found.choice_logprobs[best],
        num_tokens=found.choice_tokens[best],
        choice_logprobs=tuple(score - total for score in scores),
    )
