"""`agents.options` of the engine `vllm`; all but the first two are vLLM's own names."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from mas_batch.engines.options import EngineOptions, read_options

_PARTITIONS = 24
"""In flight where `max_num_seqs` is not given: with texts of 500 tokens some 600 requests. Not
more, as all that were begun are asked record by record, one after the other, when a worker dies."""
_LEAST_RECORDS = 16
"""Records of a partition that is not the last, where texts are long."""


class Options(EngineOptions):
    """What `agents.options` may hold for this engine. None leaves vLLM's own default."""

    max_context_tokens: Annotated[int, Field(ge=2)] | None = None
    """At most the model's own limit, which is also the default; less takes less memory."""
    batch_invariant: bool = False
    """Ask for kernels whose results do not depend on the batch, where the hardware has them
    (NVIDIA of compute capability 8.0 and later); not every model loads with them."""
    quantization: str | None = None
    """How the checkpoint's weights are held in fewer bits: `fp8`, `awq`, `gptq`, …"""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Part of the accelerator's memory that weights and cache may take together; hosts that share
    one need less than its half each."""
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """Memory for keys and values, in place of what `gpu_memory_utilization` leaves; on a CPU
    1 GiB where neither says otherwise."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Sequences that are decoded at once; the others wait in vLLM."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a step, read and written."""
    block_size: Literal[1, 8, 16, 32, 64, 128] | None = None
    """Tokens per block of the cache; only whole blocks of a prefix are shared."""
    enable_prefix_caching: bool = True
    """Keep what was read of prompts for those that begin alike."""
    enforce_eager: bool = False
    """Do not compile: it starts sooner and is slower. A CPU never compiles here."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Largest rank of the agents' adapters."""

    @property
    def partitions_at_once(self) -> int:
        """As many as have enough records for all sequences that were asked for, at 16 each."""
        return _PARTITIONS if self.max_num_seqs is None else -(-self.max_num_seqs // _LEAST_RECORDS)


read = partial(read_options, Options, engine="vllm")
