"""LoRA adapters, as vLLM is given them."""

from __future__ import annotations

from vllm.lora.request import LoRARequest

from mas_batch.engines.transformers.adapter_files import (
    WEIGHTS,
    existing,
    largest_rank,
    read_config,
)
from mas_batch.engines.vllm.options import Options
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles


def adapter_request(name: str, number: int, files: ModelFiles, options: Options) -> LoRARequest:
    """Return what names an adapter in vLLM; `number` is from 1 on.

    Raises:
        JobError: its rank is over `max_lora_rank`.
        ModelError: it is no folder of a LoRA adapter, or its configuration is damaged.
    """
    try:
        existing(files.path, WEIGHTS)
        rank = largest_rank(read_config(files.path))
    except ModelError as error:
        raise ModelError(f"{files.source}: {error}") from error
    if rank > options.max_lora_rank:
        raise JobError(
            f"{options.max_lora_rank} is below the rank {rank} of {files.source}",
            key="agents.options.max_lora_rank",
        )
    return LoRARequest(name, number, str(files.path))
