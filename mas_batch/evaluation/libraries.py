"""The field's own implementations of metrics and statistics, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mas_batch.errors import RunError

_PACKAGES = {"rouge_score": "rouge-score", "sklearn": "scikit-learn"}
"""Where a package is not called as its modules are."""


def library(module: str) -> Any:
    """Import a module of a package that the extra `evaluate` installs.

    Raises:
        RunError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise RunError(
            f"an evaluation needs {_PACKAGES.get(name, name)}, which is not installed: "
            "pip install 'mas_batch[evaluate]'"
        ) from error
