"""LoRA adapters, as vLLM is given them."""

from __future__ import annotations

import json
from pathlib import Path

from vllm.lora.request import LoRARequest

from mas_batch.engines.vllm.options import Options
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles


def adapter_request(name: str, number: int, files: ModelFiles, options: Options) -> LoRARequest:
    """Return what names an adapter in vLLM; `number` is from 1 on.

    Raises:
        JobError: its rank is over `max_lora_rank`.
        ModelError: it is no folder of a LoRA adapter.
    """
    folder = files.path or Path("none")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ModelError(f"{files.source}: no {file}: it is no LoRA adapter in peft's layout")
    config = json.loads((folder / "adapter_config.json").read_text())
    if (rank := int(config["r"])) > options.max_lora_rank:
        raise JobError(
            f"{options.max_lora_rank} is below the rank {rank} of {files.source}",
            key="agents.options.max_lora_rank",
        )
    return LoRARequest(name, number, str(folder))
