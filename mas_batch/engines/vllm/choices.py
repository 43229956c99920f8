"""The probability of given continuations, from the probabilities of single next tokens. Pure.

Continuations that begin with the same tokens share what is asked: a request per distinct
beginning, for the tokens that may follow it. Those that differ in their first tokens, and are
single tokens, are one request. The prompt's cache serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_TOKENS = 128
"""Next tokens that vLLM tells the probabilities of, per request (`MAX_LOGPROB_TOKEN_IDS`)."""

Tokens = tuple[int, ...]


def questions(choices: Sequence[Tokens]) -> list[tuple[Tokens, Tokens]]:
    """Return (what follows the prompt, next tokens to ask about) of each request."""
    following: dict[Tokens, dict[int, None]] = {}
    for choice in choices:
        for i, token in enumerate(choice):
            following.setdefault(choice[:i], {})[token] = None
    asked: list[tuple[Tokens, Tokens]] = []
    for beginning in sorted(following, key=len):
        tokens = tuple(following[beginning])
        asked += [
            (beginning, tokens[i : i + MOST_TOKENS]) for i in range(0, len(tokens), MOST_TOKENS)
        ]
    return asked


def scores(
    choices: Sequence[Tokens], found: Mapping[Tokens, Mapping[int, float]]
) -> tuple[float, ...]:
    """Return the natural log-probability of each choice.

    Args:
        found: what follows the prompt → next token → its log-probability.
    """
    return tuple(sum(found[c[:i]][token] for i, token in enumerate(c)) for c in choices)
