"""What a job may call a model: the grammar, without any I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mas_batch.errors import JobError

ALLOWED_SOURCES = (
    "echo[:LABEL], bayes[:LABEL], keywords[:LABEL], overlap[:LABEL], openai:MODEL, "
    "pypi://DISTRIBUTION==VERSION/PATH-IN-WHEEL[#sha256=HEX], "
    "a local path that starts with / ./ ../ or ~, or a hub id ORG/NAME[@REVISION]"
)
WITHOUT_MODEL = ("echo", "bayes", "keywords", "overlap")
"""Engines without model files; agents with different labels are of different families."""
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
    """`pypi`, `path`, `hub`, `openai` or one of `WITHOUT_MODEL`."""
    name: str
    """Distribution, path, hub id, the whole `echo[:LABEL]` (or another of `WITHOUT_MODEL`), or
    the endpoint's model."""
    version: str = ""
    """The distribution's version or the hub's revision; empty where there is none."""
    member: str = ""
    """Path of a file or a folder inside the wheel, without a slash at the end."""
    sha256: str = ""
    """The hash that the job pins, lower case; empty when it pins none."""


def parse_source(source: str) -> ModelSource:
    """Parse a model's name by its syntax alone.

    Raises:
        JobError: the name is none of `ALLOWED_SOURCES`.
    """
    kind, _, rest = source.partition(":")
    if kind in WITHOUT_MODEL and (rest or source == kind):
        return ModelSource(source, kind, source)
    if kind == "openai" and rest:
        return ModelSource(source, "openai", rest)
    if kind == "pypi":
        return _parse_pypi(source)
    if source.startswith(("/", "./", "../", "~")) or source in (".", ".."):
        return ModelSource(source, "path", source)
    if match := _HUB.fullmatch(source):
        return ModelSource(source, "hub", match["name"], match["version"] or "")
    raise JobError(f"{source!r} is not a model; allowed: {ALLOWED_SOURCES}")


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
