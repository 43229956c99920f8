"""`agents.options` of the engine `transformers`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from mas_batch.engines.options import EngineOptions, read_options


class Options(EngineOptions):
    """What `agents.options` may hold for this engine; from `reads` on, encoder-decoders'."""

    max_context_tokens: Annotated[int, Field(ge=2)] | None = None
    """At most the model's own limit, which is also the default."""
    pack_weights: bool = True
    """Where a CPU multiplies packed weights faster, hold them so. They are each process's own;
    what is not packed is shared by the processes of a machine, as the file is mapped."""
    share_prefixes: bool = True
    """With packed weights, read once what several prompts begin with."""
    reads: Literal["text", "messages"] = "text"
    """`text`: the record alone, as translation models do. `messages`: the prompt's turns joined
    by blank lines, for encoder-decoders that follow instructions or summarize."""
    prefix: str = ""
    """Put before what is read: T5's `translate English to German: `."""
    source_lang: str | None = None
    """Language code for the tokenizer (NLLB, mBART): `eng_Latn`."""
    target_lang: str | None = None
    """Language token that the output has to begin with: `por_Latn`."""


read = partial(read_options, Options, engine="transformers")
