"""From a model's files to a tokenizer and a model in memory, for the engine `transformers`.

Weights come from safetensors only, and no code of a checkpoint is run; a .gguf is converted once.
"""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import transformers
from filelock import FileLock

from mas_batch.engines.torch_device import ONE_LOADS
from mas_batch.engines.transformers.options import Options
from mas_batch.engines.transformers.transformers_compat import cache_argument, dequantized
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles, cache_root

DECODER_OPTIONS = frozenset({"max_context_tokens", "pack_weights", "share_prefixes"})
"""Those that mean something for a decoder-only model."""


def checkpoint(model: ModelFiles, dtype: str) -> Path:
    """Return a directory of safetensors with its tokenizer; a .gguf is converted if need be.

    Raises:
        ModelError: the model has no files, or no weights that are safe to load.
    """
    if model.path is None:
        raise ModelError(f"{model.source}: the engine transformers needs a model's files")
    if model.path.is_file():
        return _converted(model, model.path, "float32" if dtype == "auto" else dtype)
    if not next(model.path.glob("*.safetensors"), None):
        raise ModelError(
            f"{model.source}: no .safetensors in {model.path}; pickled weights are not loaded, "
            "because that runs their code, and a .gguf has to be named itself"
        )
    return model.path


def _converted(model: ModelFiles, gguf: Path, dtype: str) -> Path:
    """Dequantize once, in the dtype that will run: workers then share the mapped file's memory."""
    target = cache_root() / "converted" / f"{model.sha256}-{dtype}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):  # one converts, the others wait
        if not target.exists():
            # Renamed when whole: who is killed before leaves half a model only under this name,
            # and it is the lock that makes the name ours.
            scratch = target.with_name(f".tmp-{target.name}")
            rmtree(scratch, ignore_errors=True)
            _convert(gguf, dtype, scratch)
            scratch.replace(target)
    return target


def _convert(gguf: Path, dtype: str, target: Path) -> None:
    folder, name = str(gguf.parent), gguf.name
    with ONE_LOADS:
        dense = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=dequantized(), dtype=getattr(torch, dtype)
        )
    dense.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)


def load_tokenizer(path: Path, model: ModelFiles) -> Any:
    """Load a tokenizer that can pad a batch.

    Raises:
        ModelError: it has neither a padding nor an end token.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path, trust_remote_code=False, local_files_only=True
    )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(f"{model.source}: its tokenizer has neither a padding nor an end token")
    return tokenizer


def load_model(path: Path, model: ModelFiles, options: Options, dtype: str, **how: Any) -> Any:
    """Load the weights, after the options have been checked against their configuration.

    Args:
        how: more that `from_pretrained` is told.

    Raises:
        JobError: an encoder-decoder's option for a decoder-only model.
        ModelError: an architecture that cannot be decoded with a cache.
    """
    settings = {"trust_remote_code": False, "local_files_only": True}
    if transformers.AutoConfig.from_pretrained(path, **settings).is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    else:
        auto = transformers.AutoModelForCausalLM
        if unread := sorted(options.model_fields_set - DECODER_OPTIONS):
            raise JobError(
                f"{model.source} is not an encoder-decoder; allowed: "
                f"{', '.join(sorted(DECODER_OPTIONS))}",
                key=f"agents.options.{unread[0]}",
            )
    with ONE_LOADS:
        loaded = auto.from_pretrained(path, use_safetensors=True, dtype=dtype, **settings, **how)
    if not cache_argument(loaded):
        raise ModelError(f"{model.source}: {type(loaded).__name__} does not decode with a cache")
    return loaded
