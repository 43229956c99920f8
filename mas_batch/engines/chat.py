"""A request's turns as the text that a language model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from mas_batch.engines.base import Message
from mas_batch.errors import JobError


def chat_text(tokenizer: Any, turns: Sequence[Message], source: str) -> tuple[str, bool]:
    """Return the text, and whether the tokenizer is to add its special tokens to it.

    They are written by the chat template; turns of a model without one are joined by blank lines.

    Raises:
        JobError: the template of the model called `source` refuses the turns.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message.content for message in turns), True
    messages = [{"role": m.role, "content": m.content} for m in turns]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise JobError(
            f"the chat template of {source} refuses the prompt: {error}; "
            "where it takes no system turn, set an empty one: system: ''",
            key="agents.system",
        ) from error
    return text, False
