"""What vLLM is made with, from the job's words. Pure: vLLM is not imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.vllm.environment import Hardware
from mas_batch.engines.vllm.options import Options

_CPU_CACHE_BYTES = 2**30
"""vLLM's default is most of the machine's memory, which hosts share."""


def arguments(path: Path, config: EngineConfig, options: Options, here: Hardware) -> dict[str, Any]:
    """Return what vLLM is to be made with; what nobody asked for is left to it."""
    asked: dict[str, Any] = {
        "dtype": _dtype(path, config.dtype, here),
        "load_format": "safetensors",
        "trust_remote_code": False,
        "seed": 0,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": options.enforce_eager or here.kind == "cpu",
        "tensor_parallel_size": config.tensor,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "max_model_len": options.max_context_tokens,
        "quantization": options.quantization,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "block_size": options.block_size,
    }
    if here.kind == "cpu":
        # Of a seeded request whose prompt is read in parts vLLM turns the generator back, which
        # PyTorch's on a CPU cannot: the step fails.
        asked["enable_chunked_prefill"] = False
    if config.tensor > 1:
        asked["distributed_executor_backend"] = "mp"
    if config.adapters:
        asked |= {
            "enable_lora": True,
            # On a CPU what has no adapter is multiplied by the last place's weights (index -1):
            # there it has to stay empty, and an empty one is zero.
            "max_loras": config.adapters + (here.kind == "cpu"),
            "max_lora_rank": options.max_lora_rank,
        }
    if here.kind == "cpu" and options.kv_cache_memory_bytes is None:
        says = options.gpu_memory_utilization or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        asked["kv_cache_memory_bytes"] = None if says else _CPU_CACHE_BYTES
    return {name: value for name, value in asked.items() if value is not None}


def on_cpu(dtype: str) -> str:
    """Resolve `auto` for a CPU."""
    return "float32" if dtype == "auto" else dtype


def _dtype(path: Path, asked: str, here: Hardware) -> str:
    """Resolve `auto` as `EngineConfig.dtype` says: vLLM's makes float16 of float32."""
    if asked != "auto" or here.kind == "cpu":
        return on_cpu(asked)
    config = json.loads((path / "config.json").read_text())
    found = (
        each.get(key)
        for each in (config, config.get("text_config") or {})
        for key in ("dtype", "torch_dtype")
    )
    return next((str(name) for name in found if name), "auto")
