"""How a batch's time is shared by its completions."""

from __future__ import annotations

from collections.abc import Sequence


def share_time(
    total_s: float,
    prefill_s: float | None,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[Sequence[int]],
) -> list[list[tuple[float, float | None]]]:
    """Return each completion's (compute_s, prefill_s), by its part of the batch's tokens.

    Where the prefill is not known, a token that is read counts as one that is written.

    Args:
        prefill_s: of `total_s`, reading the prompts.
        prompt_tokens: of each prompt.
        new_tokens: of each prompt's completions.
    """
    rows = list(zip(prompt_tokens, new_tokens, strict=True))
    num_read = sum(read * len(row) for read, row in rows)
    num_written = sum(map(sum, new_tokens))

    def share(read: int, written: int) -> tuple[float, float | None]:
        if prefill_s is None:
            return total_s * (read + written) / max(1, num_read + num_written), None
        own_prefill_s = prefill_s * read / max(1, num_read)
        decode_s = (total_s - prefill_s) * written / max(1, num_written)
        return own_prefill_s + decode_s, own_prefill_s

    return [[share(read, written) for written in row] for read, row in rows]
