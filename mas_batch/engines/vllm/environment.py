"""What vLLM reads of the process before it is imported, and the accelerator that it will find."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mas_batch.errors import JobError

_INVARIANT_SINCE = (8, 0)
"""Compute capability from which vLLM has batch-invariant kernels."""

_READ_ONCE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "agents.parallel.tensor",
    "VLLM_BATCH_INVARIANT": "agents.options.batch_invariant",
}
"""Variables that vLLM's modules keep when they are imported → what an agent sets them by."""

_FAULTS = ("CUDA error", "HIP error", "device-side assert", "Executor failed")
"""Words of errors that have no type of their own."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where vLLM will run."""

    kind: str
    """`cpu`, or what PyTorch calls the accelerator: `cuda`, `xpu`…"""
    number: int = 1
    """How many of it this process sees."""
    capability: tuple[int, int] | None = None
    """Of an NVIDIA card."""

    @property
    def has_invariant_kernels(self) -> bool:
        """Whether results can be had that do not depend on the batch."""
        return self.capability is not None and self.capability >= _INVARIANT_SINCE


def hardware() -> Hardware:
    """Look for what this process sees."""
    if torch.cuda.is_available():
        is_nvidia = torch.version.hip is None
        capability = torch.cuda.get_device_capability() if is_nvidia else None
        return Hardware("cuda", torch.cuda.device_count(), capability)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return Hardware(accelerator.type if accelerator is not None else "cpu")


def variables(
    here: Hardware, *, tensor: int, threads: int, batch_invariant: bool
) -> dict[str, str]:
    """Return the environment variables that vLLM is to find.

    One process where one card holds the model: requests and results are then not pickled, and a
    Dask worker may have no child processes unless it is told so.
    """
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor == 1 else "1",
        "VLLM_BATCH_INVARIANT": str(int(batch_invariant and here.has_invariant_kernels)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if tensor > 1:  # the worker's threads do not survive a fork
        wanted["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if here.kind == "cpu":
        # It would bind threads to cores and leave one free; our hosts share the machine.
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if threads > 0:
            wanted["OMP_NUM_THREADS"] = str(max(1, threads // tensor))
    return wanted


def set_up(here: Hardware, *, tensor: int, threads: int, batch_invariant: bool) -> None:
    """Set them, before vLLM is imported. Of its log, warnings are left unless the user says more.

    Raises:
        JobError: so many cards are not here, this process may not have the children that hold a
            part of the model each, or vLLM was imported with other variables.
    """
    if tensor > 1:
        if here.kind != "cpu" and here.number < tensor:
            raise JobError(
                f"{tensor} is more than the {here.number} accelerators that the worker sees",
                key="agents.parallel.tensor",
            )
        if multiprocessing.current_process().daemon:
            raise JobError(
                f"{tensor} needs a process for each part of the model, and this worker's process "
                "is daemonic, so it may have none; start the cluster's nannies with "
                "DASK_DISTRIBUTED__WORKER__DAEMON=False",
                key="agents.parallel.tensor",
            )
    wanted = variables(here, tensor=tensor, threads=threads, batch_invariant=batch_invariant)
    _check_imported(wanted)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is `--json`'s
    os.environ.update(wanted)
    if threads > 0:
        torch.set_num_threads(threads)


def _check_imported(wanted: Mapping[str, str]) -> None:
    envs = sys.modules.get("vllm.envs")
    for name, key in _READ_ONCE.items() if envs is not None else ():
        found = str(int(getattr(envs, name)))
        if found != wanted[name]:
            raise JobError(
                f"this process has vLLM with {name}={found}, which it reads once, and the agent "
                f"needs {wanted[name]}; agents that differ in this need workers of their own",
                key=key,
            )


def is_fault(error: BaseException) -> bool:
    """Whether after this error the engine, and with a card's fault the process, is of no use.

    The engine's own processes have died, or the accelerator has: every later call of this process
    to it fails as well.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    names = {each.__name__ for each in type(error).__mro__}
    if names & {"EngineDeadError", "AcceleratorError"}:
        return True
    return any(words in str(error) for words in _FAULTS)


def memory(llm: Any, here: Hardware, *, in_process: bool) -> dict[str, Any]:
    """Return what the cache holds and, where it can be seen, what the accelerator's memory does."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks
    facts = {"kv_cache_tokens": blocks * cache.block_size if blocks else None}
    if here.kind == "cuda" and in_process:
        facts["accelerator_memory_bytes"] = torch.cuda.memory_reserved()
    return facts
