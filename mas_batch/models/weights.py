"""Which files of a model are safe to load, and their hashes.

Nothing that can run code is accepted: safetensors, GGUF and plain data, no pickles.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from mas_batch.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit on its header."""
WEIGHTS = ("*.safetensors", "*.gguf", "*.intgemm.alphas.bin", "model.bin")
DATA = (
    *("*.safetensors", "*.gguf", "*.intgemm.alphas.bin", "lex.*.bin"),
    *("*.json", "*.txt", "*.md", "*.jinja", "*.yml", "*.yaml", "*.spm", "*.model", "*.vocab"),
)
"""Names of the files of which a model may consist, besides CTranslate2's `model.bin`."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def tree_hash(hashes: Mapping[str, str]) -> str:
    r"""Hash a directory: sha256 over the sorted lines `relative/path\0sha256-of-file\n`."""
    lines = (f"{name}\0{hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def data_files(names: Collection[str]) -> list[str]:
    """Choose the files (relative, with `/`) of which a model may consist.

    Raises:
        ModelError: there are no weights among them.
    """
    kept = sorted(name for name in names if _is_data(PurePosixPath(name), names))
    if any(matches(name, WEIGHTS) for name in kept):
        return kept
    pickles = sorted(name for name in set(names).difference(kept) if matches(name, PICKLES))
    raise ModelError(
        f"no weights that are safe to load{', only ' if pickles else ''}{', '.join(pickles[:3])}; "
        "only safetensors and GGUF are accepted, because loading a pickle runs its code. To "
        "convert a model you trust: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
    )


def _is_data(path: PurePosixPath, names: Iterable[str]) -> bool:
    if any(part.startswith(".") for part in path.parts):
        return False
    if path.name != "model.bin":
        return matches(path.name, DATA)
    # Pickles are called model.bin too; CTranslate2's is recognised by the two files beside it.
    beside = {other.name for other in map(PurePosixPath, names) if other.parent == path.parent}
    return "config.json" in beside and any(fnmatch(name, "*vocabulary.*") for name in beside)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the last part of a path matches one of the patterns, whatever its case."""
    return any(fnmatch(PurePosixPath(name).name.lower(), pattern) for pattern in patterns)


def check_content(path: Path) -> None:
    """Raise ModelError unless the file begins as its name promises."""
    with path.open("rb") as file:
        start = file.read(8)
    problem = None
    if matches(path.name, ("*.safetensors",)):
        problem = _safetensors_problem(path)
    elif matches(path.name, ("*.gguf",)):
        problem = None if start.startswith(b"GGUF") else "not a GGUF file"
    elif re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
        problem = "a zip or a pickle; only safetensors and GGUF weights are accepted"
    if problem:
        raise ModelError(f"{path.name}: {problem}")


def _safetensors_problem(path: Path) -> str | None:
    """Compare the header (8 bytes of length, little endian, then JSON) with the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            return f"corrupt safetensors file: a header of {length} bytes in a file of {size}"
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            return f"corrupt safetensors header: {type(error).__name__}: {error}"
    if end != size - 8 - length:
        return f"corrupt safetensors file: {size - 8 - length} bytes of tensors, not {end}"
    return None


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return an empty mapping for a file that is missing or broken: caches are rebuilt."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write by rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files other users of a shared cache could not read.
    new = path.with_name(f".tmp-{uuid.uuid4().hex}")
    new.write_text(json.dumps(content, indent=1))
    new.replace(path)
