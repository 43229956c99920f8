"""Given continuations of a prompt, in a tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mas_batch.errors import EngineError

Tokens = Sequence[int]

BORDER_TOKENS = 8
"""The last tokens of a prompt: what follows can merge with no more of it."""


class ChoiceTokens:
    """Continuations in tokens.

    A continuation follows the prompt's last tokens as it would in a text: it is tokenised with
    them, so that it gets no mark of a beginning that it is not at. Where its first letters would
    merge with the prompt's last token, which is read as it is, it is tokenised alone. A space
    comes before it unless the prompt ends with a blank or with a special token, as chat templates
    do. For a decoder with an encoder it begins a text of the target language.

    One that another goes on from (`1`, `10`) has the end token after it: without, the longer one
    could never be the likelier.
    """

    def __init__(self, tokenizer: Any, *, seq2seq: bool) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._seq2seq = seq2seq
        self._known = lru_cache(maxsize=1024)(self._find)

    def after(self, prompt: Tokens, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Return each choice's tokens after this prompt.

        Raises:
            EngineError: a choice has none.
        """
        return self._known(() if self._seq2seq else tuple(prompt[-BORDER_TOKENS:]), choices)

    def _find(
        self, border: tuple[int, ...], choices: tuple[str, ...]
    ) -> tuple[tuple[int, ...], ...]:
        found = tuple(tuple(self._one(border, choice)) for choice in choices)
        if () in found:
            raise EngineError(f"{choices[found.index(())]!r} has no tokens")
        return tuple(self._ended(tokens, found) for tokens in found)

    def _ended(self, tokens: tuple[int, ...], every: Sequence[Tokens]) -> tuple[int, ...]:
        end = self._tokenizer.eos_token_id
        longer = (other for other in every if len(other) > len(tokens))
        begins_another = any(tuple(other[: len(tokens)]) == tokens for other in longer)
        return (*tokens, end) if begins_another and end is not None else tokens

    def _one(self, border: tuple[int, ...], choice: str) -> list[int]:
        if self._seq2seq:
            ids: list[int] = self._tokenizer(text_target=choice, add_special_tokens=False)[
                "input_ids"
            ]
            return ids
        text = self._tokenizer.decode(border, clean_up_tokenization_spaces=False)
        if text[-1:].strip() and border[-1] not in self._special:
            choice = f" {choice}"
        before, both = self._ids(text), self._ids(text + choice)
        # A border that begins in a word need not be cut as it was; what matters is its end.
        return both[len(before) :] if both[: len(before)] == before else self._ids(choice)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
