"""Choices in tokens."""

from __future__ import annotations

from typing import Any

from mas_batch.engines.choice_tokens import ChoiceTokens

END = 0


class Letters:
    """A token is a character."""

    eos_token_id: int | None = END
    all_special_ids = (END,)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: tuple[int, ...], **_: Any) -> str:
        return "".join(map(chr, tokens))


def choices(tokenizer: Letters, *labels: str) -> list[str]:
    found = ChoiceTokens(tokenizer, seq2seq=False).after([ord("\n")], labels)
    return [tokenizer.decode(tokens) for tokens in found]


def test_a_label_that_begins_another_ends() -> None:
    assert choices(Letters(), "1", "10", "2", "100") == ["1\0", "10\0", "2", "100"]
    assert choices(Letters(), "pos", "neg", "pos") == ["pos", "neg", "pos"]
    endless = Letters()
    endless.eos_token_id = None
    assert choices(endless, "1", "10") == ["1", "10"]
