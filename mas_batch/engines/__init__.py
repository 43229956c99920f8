"""Engines by name, each in one file or folder, imported only when a worker needs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from mas_batch.engine_info import EngineInfo
from mas_batch.engines.base import Engine, EngineConfig
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles, engine_of_files
from mas_batch.registries import ENGINES


def detect_engine(model: ModelFiles) -> str:
    """Choose the engine for `engine: auto` from what the model's files are."""
    return model.scheme if model.path is None else engine_of_files(model.path)


def check_quantize(quantize: str | None, engines: Sequence[EngineInfo]) -> None:
    """Find that none of the engines, of which one is an agent's, can hold so few bits.

    Raises:
        JobError: they cannot; the message says which engines can.
    """
    if quantize is None or any(quantize in engine.quantizes for engine in engines):
        return
    able = [name for name, engine in ENGINES.items() if quantize in engine.quantizes]
    raise JobError(
        f"{quantize!r} is not known to this engine; engines that can: {', '.join(able)}",
        key="agents.quantize",
    )


def load_engine(name: str, model: ModelFiles, config: EngineConfig) -> Engine:
    """Load `model` with the engine called `name` (or `auto`).

    Raises:
        JobError: the engine's extra is not installed, or it does not know an option.
        ModelError: the files are not what the engine can hold.
    """
    name = detect_engine(model) if name == "auto" else name
    info = ENGINES[name]
    check_quantize(config.quantize, [info])
    try:
        module = import_module(info.module)
    except ModuleNotFoundError as error:
        if info.extra is None or (error.name or "").startswith("mas_batch"):
            raise
        raise JobError(
            f"engine {name!r} needs the package {error.name!r}: pip install '{info.extra}'",
            key=ENGINES.key,
        ) from error
    try:
        engine: Engine = module.load(model, config)
    except (JobError, ModelError, MemoryError):
        raise
    except Exception as error:
        message = f"{model.source}: {name} cannot load it: {type(error).__name__}: {error}"
        raise ModelError(message) from error
    return engine
