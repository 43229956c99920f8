"""The package that `docs/extending.md` shows, as if it were installed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mas_batch import registries
from mas_batch.registry import Registry

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@contextmanager
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the page's modules and its entry points into a folder that Python looks in."""
    info = site / "titles-1.0.dist-info"
    info.mkdir(parents=True)
    modules = {block.split()[1]: block for block in blocks("python")}
    for name, block in modules.items():
        (site / name).write_text(block)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: titles\nVersion: 1.0\n")
    (section,) = blocks("toml")
    groups = tomllib.loads(section)["project"]["entry-points"]
    lines = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    )
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    _forget()
    yield
    _forget()
    for name in modules:
        sys.modules.pop(name.removesuffix(".py"), None)


def _forget() -> None:
    """Let the registries look for packages again, which they do once in a process."""
    for registry in vars(registries).values():
        if isinstance(registry, Registry):
            vars(registry).pop("_added", None)
            for name in set(registry._loaded) - set(registry._built_in):
                del registry._loaded[name]
