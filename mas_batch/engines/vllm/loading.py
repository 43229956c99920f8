"""Loads the engine `vllm`. The process is prepared first: vLLM reads it when it is imported."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.transformers.checkpoints import checkpoint, load_tokenizer
from mas_batch.engines.vllm.arguments import arguments, on_cpu
from mas_batch.engines.vllm.environment import hardware, set_up
from mas_batch.engines.vllm.options import read
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles

if TYPE_CHECKING:
    from mas_batch.engines.vllm.engine import VllmEngine

if find_spec("vllm") is None:  # said now, where the missing extra is looked for
    raise ModuleNotFoundError("No module named 'vllm'", name="vllm")


def load(model: ModelFiles, config: EngineConfig) -> VllmEngine:
    """Load a directory of safetensors, or a .gguf file by way of safetensors made once.

    Raises:
        JobError: an option or device that is unknown or not to be had here.
        ModelError: no safetensors, no tokenizer, or a model without batch-invariant kernels.
    """
    options = read(config.options)
    here = hardware()
    if config.device not in ("auto", here.kind):
        raise JobError(
            f"{config.device!r} is not here; allowed: auto, {here.kind}; one of several cards is "
            "chosen by CUDA_VISIBLE_DEVICES",
            key="agents.device",
        )
    set_up(
        here,
        tensor=config.tensor,
        threads=config.threads,
        batch_invariant=options.batch_invariant,
    )
    from vllm import LLM  # only now, and in this process only

    from mas_batch.engines.vllm.engine import VllmEngine

    path = checkpoint(model, config.dtype if here.kind != "cpu" else on_cpu(config.dtype))
    tokenizer = load_tokenizer(path, model)
    try:
        llm = LLM(model=str(path), **arguments(path, config, options, here))
    except Exception as error:
        if not (options.batch_invariant and here.has_invariant_kernels):
            raise
        raise ModelError(
            f"{model.source} does not load with options.batch_invariant: true; it may without: "
            f"{type(error).__name__}: {error}"
        ) from error
    return VllmEngine(llm, tokenizer, model, config, options, here)
