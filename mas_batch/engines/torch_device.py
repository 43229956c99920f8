"""What the engines in PyTorch share: the device, its memory and its clock."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.devices import pick_device
from mas_batch.errors import OutOfMemoryError

T = TypeVar("T")

ONE_LOADS = threading.Lock()
"""Held around `from_pretrained` of a model: while it runs, the whole process makes weights without
data, and of two that overlap the first to end takes the state of the other for the usual one."""


def torch_device(config: EngineConfig, kinds: Sequence[str]) -> torch.device:
    """Set the CPU threads of PyTorch and resolve `agents.device`.

    Under dask-cuda `cuda` is the one GPU that the worker sees first.

    Args:
        kinds: of `cpu`, `cuda` and `mps` those that the engine can use, the one that `auto`
            prefers first.

    Raises:
        JobError: there is no such device here.
    """
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    numbers = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    kind, number = pick_device(config.device, {kind: numbers[kind] for kind in kinds})
    return torch.device(kind) if number is None else torch.device(kind, number)


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told: a time taken before means nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def run_freeing(call: Callable[[], T]) -> T:
    """Turn what the devices raise when memory is out into `OutOfMemoryError`, memory freed."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = f"{type(error).__name__}: {error}"
    # Only here: as long as the exception lives, its frames hold the batch's tensors.
    free_caches()
    raise OutOfMemoryError(message)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def free_caches() -> None:
    """Give memory that nothing uses back to the devices, and to the system."""
    gc.collect()
    # What glibc keeps of a model that has been freed is hundreds of megabytes.
    with suppress(AttributeError, OSError, TypeError):  # other systems have another allocator
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
