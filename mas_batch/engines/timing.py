"""How a batch's time is shared by its completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchTime:
    """What one batch took, and of how many tokens it was."""

    total_s: float
    prefill_s: float | None
    """Of that, reading the prompts; None: not known."""
    num_read: int
    """Prompt tokens, as often as their completions share them."""
    num_written: int

    def share(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float | None]:
        """Return a completion's share (compute_s, prefill_s), by its part of the tokens.

        Where the prefill is not known, a token that is read counts as one that is written.
        """
        if self.prefill_s is None:
            num_tokens = max(1, self.num_read + self.num_written)
            return self.total_s * (prompt_tokens + new_tokens) / num_tokens, None
        prefill_s = self.prefill_s * prompt_tokens / max(1, self.num_read)
        decode_s = (self.total_s - self.prefill_s) * new_tokens / max(1, self.num_written)
        return prefill_s + decode_s, prefill_s


def batch_time(
    total_s: float,
    prefill_s: float | None,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[Sequence[int]],
) -> BatchTime:
    """Count a batch's tokens: those of each prompt, and of each of its completions."""
    num_read = sum(n * len(row) for n, row in zip(prompt_tokens, new_tokens, strict=True))
    return BatchTime(total_s, prefill_s, num_read, sum(map(sum, new_tokens)))
