"""How much memory rows take, in tokens: what `max_batch_tokens` bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """What rows that are decoded together take room for."""

    padded: bool
    """Whether all rows are as wide as the widest; otherwise each has room of its own."""
    num_rows: int = 0
    width: int = 0
    """Tokens of the longest row by now."""
    most_new: int = 0
    """The most that one of them may still get."""
    total: int = 0
    """Tokens of all rows once they have ended."""

    @property
    def num_tokens(self) -> int:
        """Tokens that there must be room for. A padded row is right-aligned when it joins, and
        grows with all others: the longest may be followed by the most new tokens of another."""
        return self.num_rows * (self.width + self.most_new) if self.padded else self.total

    def plus(self, prompt_tokens: int, max_new: int, copies: int) -> Size:
        """Return the size with the rows of one more prompt."""
        return Size(
            self.padded,
            self.num_rows + copies,
            max(self.width, prompt_tokens),
            max(self.most_new, max_new),
            self.total + copies * (prompt_tokens + max_new),
        )
