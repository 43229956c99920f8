"""`agents.options` of the engine `ctranslate2`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from mas_batch.engines.options import EngineOptions, read_options

MAX_CONTEXT_TOKENS = 512
"""Source plus output. The converted files do not tell the model's limit; 512 positions is what
opus-mt, T5 and most BART-like models have."""


class Options(EngineOptions):
    """What `agents.options` may hold for this engine."""

    compute_type: str | None = None
    """The arithmetic, such as `int8`; None: by the agent's dtype."""
    max_context_tokens: Annotated[int, Field(ge=2)] = MAX_CONTEXT_TOKENS


read = partial(read_options, Options, engine="ctranslate2")
