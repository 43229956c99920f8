"""`agents.options` of the engine `marian`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from mas_batch.engines.options import EngineOptions, read_options

MAX_CONTEXT_TOKENS = 1024
"""Source plus translation. Sinusoidal positions have no end, but these models are trained on
sentences: callers split long texts before they ask."""


class Options(EngineOptions):
    """What `agents.options` may hold for this engine."""

    max_context_tokens: Annotated[int, Field(ge=2)] = MAX_CONTEXT_TOKENS


read = partial(read_options, Options, engine="marian")
