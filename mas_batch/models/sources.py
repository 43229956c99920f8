"""What a job may call a model: the grammar, without any I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mas_batch.errors import JobError
from mas_batch.registries import ENGINES

FILE_SCHEMES = ("pypi", "path", "hub")
"""How files are named; any other scheme is the name of an engine that holds none."""
_FILES = (
    "pypi://DISTRIBUTION==VERSION/PATH-IN-WHEEL[#sha256=HEX], "
    "a local path that starts with / ./ ../ or ~, or a hub id ORG/NAME[@REVISION]"
)
_PYPI = re.compile(
    r"pypi://(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[^/#]+)/(?P<member>[^#]+)"
    r"(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?",
    re.ASCII,
)
_HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<version>\w[\w./-]*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's name, parsed; whether the model exists is not known yet."""

    source: str
    """As written in the job."""
    scheme: str
    """One of `FILE_SCHEMES`, or the engine that needs no files."""
    name: str
    """Distribution, path, hub id, the endpoint's model, or the whole `ENGINE[:LABEL]` where an
    engine holds nothing."""
    version: str = ""
    """The distribution's version or the hub's revision; empty where there is none."""
    member: str = ""
    """Path of a file or a folder inside the wheel, without a slash at the end."""
    sha256: str = ""
    """The hash that the job pins, lower case; empty when it pins none."""

    @property
    def has_files(self) -> bool:
        """Whether there is something to fetch and verify."""
        return self.scheme in FILE_SCHEMES


def parse_source(source: str) -> ModelSource:
    """Parse a model's name by its syntax alone.

    Raises:
        JobError: the name is of no known form; the message names what is allowed.
    """
    kind, _, rest = source.partition(":")
    if kind == "pypi":
        return _parse_pypi(source)
    if source.startswith(("/", "./", "../", "~")) or source in (".", ".."):
        return ModelSource(source, "path", source)
    if match := _HUB.fullmatch(source):
        return ModelSource(source, "hub", match["name"], match["version"] or "")
    holds = ENGINES[kind].holds if kind in ENGINES else "files"
    if holds == "nothing" and (rest or source == kind):
        return ModelSource(source, kind, source)
    if holds == "endpoint" and rest:
        return ModelSource(source, kind, rest)
    raise JobError(f"{source!r} is not a model; allowed: {', '.join((*_without_files(), _FILES))}")


def _without_files() -> Iterator[str]:
    """Yield how the models of engines without files are written."""
    for name, engine in ENGINES.items():
        if engine.holds == "nothing":
            yield f"{name}[:LABEL]"
        elif engine.holds == "endpoint":
            yield f"{name}:MODEL"


def _parse_pypi(source: str) -> ModelSource:
    match = _PYPI.fullmatch(source)
    if not match:
        raise JobError(
            f"{source!r} is not pypi://DISTRIBUTION==VERSION/PATH-IN-WHEEL[#sha256=HEX]; "
            "the version is required, HEX has 64 digits"
        )
    try:
        version = str(Version(match["version"]))
    except InvalidVersion as error:
        raise JobError(f"{source!r}: {match['version']!r} is not an exact version") from error
    member = match["member"].removesuffix("/")
    if leads_outside(member):
        raise JobError(f"{source!r}: {member!r} is not a plain path inside a wheel")
    name = canonicalize_name(match["name"])
    return ModelSource(source, "pypi", name, version, member, (match["sha256"] or "").lower())


def leads_outside(name: str) -> bool:
    """Whether a path in an archive may lead out of the folder it is extracted to."""
    parts = name.split("/")
    return any(c in name for c in "\\:\0") or any(part in ("", ".", "..") for part in parts)
