"""Engines by name, each in one file, imported only when a worker needs it."""

from __future__ import annotations

from importlib import import_module

from mas_batch.engines.base import Engine, EngineConfig
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles

ENGINES = {
    # name: (module with `load(model, config) -> Engine`, extra to install)
    "echo": ("mas_batch.engines.echo", None),
    "transformers": ("mas_batch.engines.transformers.engine", "cpu"),
    "marian": ("mas_batch.engines.marian.engine", "cpu"),
    "ctranslate2": ("mas_batch.engines.ctranslate2", "ctranslate2"),
    "openai": ("mas_batch.engines.openai", "openai"),
    "nearest": ("mas_batch.engines.classical.nearest", "cpu"),
    "bayes": ("mas_batch.engines.classical.bayes", None),
    "keywords": ("mas_batch.engines.classical.keywords", None),
    "overlap": ("mas_batch.engines.classical.overlap", None),
}


def detect_engine(model: ModelFiles) -> str:
    """Choose the engine for `engine: auto` from what the model's files are."""
    if model.path is None:
        return model.scheme
    if next(model.path.glob("*.intgemm.alphas.bin"), None):
        return "marian"
    if (model.path / "model.bin").exists():
        return "ctranslate2"
    if (model.path / "modules.json").exists():  # the sentence-transformers layout
        return "nearest"
    return "transformers"


def load_engine(name: str, model: ModelFiles, config: EngineConfig) -> Engine:
    """Load `model` with the engine called `name` (or `auto`).

    Raises:
        JobError: the engine's extra is not installed, or it does not know an option.
        ModelError: the files are not what the engine can hold.
    """
    name = detect_engine(model) if name == "auto" else name
    module_name, extra = ENGINES[name]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("mas_batch"):
            raise
        raise JobError(
            f"engine {name!r} needs the package {error.name!r}: pip install 'mas_batch[{extra}]'",
            key="agents.engine",
        ) from error
    try:
        engine: Engine = module.load(model, config)
    except (JobError, ModelError, MemoryError):
        raise
    except Exception as error:
        message = f"{model.source}: {name} cannot load it: {type(error).__name__}: {error}"
        raise ModelError(message) from error
    return engine
