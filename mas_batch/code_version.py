"""Which code this process runs: the package's version and a hash of its modules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable

_MODULES = (".py", ".pyc", ".so", ".pyd")
"""Source, or what stands in its place where a package is compiled."""


@cache
def code_version() -> str:
    """Return version and hash, `0.1.0+1f3a…`; equal only in processes that run the same code.

    Read once per process (about 20 ms), from a folder or a zip; so call it early: it is to be of
    the code that was imported, not of a later one that an upgrade has put in its place. Compiled
    modules are other code than their source, and than what was compiled another time.
    """
    version = import_module("mas_batch").__version__  # imported here: it imports what imports this
    return f"{version}+{hash_of_modules(files('mas_batch'))}"


def hash_of_modules(package: Traversable) -> str:
    """Hash the names and contents of all modules below a package, caches left out."""
    digest = hashlib.blake2b(digest_size=8)
    for name, module in sorted(_modules(package, ""), key=lambda found: found[0]):
        content = module.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _modules(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            if entry.name != "__pycache__":
                yield from _modules(entry, f"{name}/")
        elif entry.name.endswith(_MODULES):
            yield name, entry
