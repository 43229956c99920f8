"""From a YAML file to a checked `Job`.

Everything is checked at the door. A wrong job never starts a cluster: `load_job` raises one
`JobError` that names the file, the key path, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import dask.config
from pydantic import BaseModel, ValidationError

from mas_batch.errors import JobError
from mas_batch.job import Job
from mas_batch.job_yaml import parse_yaml


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply site defaults and ``key.path=value`` overrides, and check it.

    Relative paths in the file are relative to the file's folder, so that a job means the same
    from any working directory; relative paths in overrides and site defaults are relative to the
    working directory.
    Site defaults come from Dask's configuration under `mas-batch`, below the file's values.

    Raises:
        JobError: the job is wrong; the message names file and key path.
    """
    file = Path(path)
    raw = _read_yaml(file)
    _anchor_paths(raw, file.resolve().parent)
    raw = dask.config.merge(_site_defaults(), raw)
    for override in overrides:
        _apply_override(raw, override)
    _anchor_paths(raw, Path.cwd())  # the file's own paths are absolute by now
    return check_job(raw, file=str(path))


def check_job(raw: Mapping[str, Any], *, file: str | None = None) -> Job:
    """Build a `Job` from plain data (a notebook's dict, say).

    Raises:
        JobError: the job is wrong; the message names the first wrong key and the number of others.
    """
    try:
        _check_text(raw, (), file)
        return Job.model_validate(raw)
    except RecursionError:
        raise JobError("is nested too deeply, or contains itself", file=file) from None
    except ValidationError as error:
        raise _first_error(error, file) from None


def _check_text(value: Any, location: tuple[str, ...], file: str | None) -> None:
    """Raise JobError for text that UTF-8 cannot hold: it could be neither hashed nor written.

    The message does not show it: it may be a secret.
    """
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise JobError(
                f"character {error.start + 1} is half a surrogate pair, which UTF-8 cannot hold",
                key=".".join(location) or None,
                file=file,
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key, (*location, "(a key)"), file)
            _check_text(item, (*location, str(key)), file)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_text(item, (*location, str(index)), file)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JobError("no such job file", file=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot be read: {error}", file=str(file)) from error
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise JobError(f"not valid YAML: {error}", file=str(file)) from error
    if not isinstance(raw, dict):
        raise JobError(
            "must be a mapping with the keys " + ", ".join(Job.model_fields), file=str(file)
        )
    return raw


def _site_defaults() -> dict[str, Any]:
    defaults = dask.config.get("mas-batch", default=None) or {}
    if not isinstance(defaults, Mapping):
        raise JobError(f"{defaults!r} in Dask's configuration must be a mapping", key="mas-batch")
    found: dict[str, Any] = _with_underscores(defaults)
    return found


def _with_underscores(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k).replace("-", "_"): _with_underscores(v) for k, v in value.items()}
    return value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `key.path=value` overrides into the mapping that they describe.

    Raises:
        JobError: an override is not of that form.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise JobError(f"{override!r} is not key.path=value", key="--set")
    try:
        value = parse_yaml(text) if text else None
    except ValueError as error:
        # The message leaves the value out: it may be a secret.
        raise JobError(f"value of {key!r} is not valid YAML: {error}", key="--set") from error
    *parents, last = key.split(".")
    node: Any = raw
    for depth, name in enumerate(parents):
        node = _child(node, name, key=".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise JobError(f"{'.'.join(parents)} is not a mapping", key=key)


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, key)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise JobError("is not a mapping or a list", key=key)


def _index(node: list[Any], name: str, key: str) -> int:
    """Return the index of an item of a list, given by number or, for agents, by name."""
    if name.isdecimal() and int(name) < len(node):
        return int(name)
    for i, item in enumerate(node):
        if isinstance(item, dict) and item.get("name") == name:
            return i
    known = [
        str(item.get("name", i)) if isinstance(item, dict) else str(i)
        for i, item in enumerate(node)
    ]
    raise JobError(f"no item {name!r}; allowed: {', '.join(known)}", key=key)


_PATH_KEYS = (
    *("corpus.path", "output.path", "merge.history"),
    *(f"cluster.{name}" for name in ("scheduler_file", "tls_ca_file", "tls_cert", "tls_key")),
)


def _anchor_paths(raw: dict[str, Any], base: Path) -> None:
    """Make the job's relative local paths absolute; URLs and hub ids stay as they are."""
    for key in _PATH_KEYS:
        section, name = key.split(".")
        holder = raw.get(section)
        if isinstance(holder, dict) and name in holder:
            value = holder[name]
            holder[name] = (
                [_anchor(v, base, key) for v in value]
                if isinstance(value, list)
                else _anchor(value, base, key)
            )
    merge = raw.get("merge")
    calibrate = merge.get("calibrate") if isinstance(merge, dict) else None
    if isinstance(calibrate, dict) and "labels" in calibrate:
        key = "merge.calibrate.labels"
        calibrate["labels"] = _anchor(calibrate["labels"], base, key)
    agents = raw.get("agents")
    for i, agent in enumerate(agents if isinstance(agents, list) else ()):
        for name in ("model", "adapter"):
            source = agent.get(name) if isinstance(agent, dict) else None
            if isinstance(source, str) and source.startswith(("./", "../", "~")):
                agent[name] = _anchor(source, base, f"agents.{i}.{name}")
        options = agent.get("options") if isinstance(agent, dict) else None
        if isinstance(options, dict) and "examples" in options:
            key = f"agents.{i}.options.examples"
            options["examples"] = _anchor(options["examples"], base, key)


def _anchor(value: Any, base: Path, key: str) -> Any:
    if not isinstance(value, str) or "://" in value:
        return value
    if "::" in value and not value.startswith(("/", "./", "../", "~")):
        return value  # a chain of fsspec's filesystems
    if not value.strip():  # an empty path would mean the whole folder
        raise JobError("is empty; '.' is the folder itself", key=key)
    try:
        return os.path.normpath(base / Path(value).expanduser())
    except RuntimeError as error:
        raise JobError(f"{value!r}: {error}", key=key) from error


def _first_error(error: ValidationError, file: str | None) -> JobError:
    errors = error.errors(include_url=False)
    # An unknown key is usually a typo that causes the others: show it first.
    errors.sort(key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    location = [part for part in first["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location)
    message = _explain(first, location)
    if first["type"] == "value_error":
        # Our own checks of a whole section name the key below it: `labels: at least two`.
        head, colon, rest = message.partition(": ")
        if colon and re.fullmatch(r"[\w.-]+", head):
            key, message = ".".join(filter(None, (key, head))), rest
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more problem{'s' if len(errors) > 2 else ''})"
    return JobError(message, key=key or None, file=file)


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("str", "float", "int") or "[" in part)


def _explain(error: Any, location: Sequence[str | int]) -> str:
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        if gone := _REMOVED_KEYS.get(".".join(map(str, location))):
            return gone
        allowed = _keys_at(Job, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key; {hint}allowed: {', '.join(allowed)}"
    if kind == "missing":
        return "is required and missing"
    if kind == "literal_error":
        allowed = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{_quoted(value, location)} is not allowed; allowed: {allowed}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    text = _PLAIN_WORDS.get(kind) or error["msg"][0].lower() + error["msg"][1:]
    if kind == "string_type" and isinstance(value, (bool, int, float, date)):
        text += ", so put it in quotes"  # YAML reads yes, 7 and 2024-01-02 as something else
    return f"{_quoted(value, location)} is not allowed: {text}"


def _quoted(value: Any, location: Sequence[str | int]) -> str:
    """Quote a wrong value, unless it may be a secret."""
    if {"options", "storage_options"}.intersection(location):
        return "what is given (not shown: it may be a secret)"
    return repr(value)


_REMOVED_KEYS = {
    "routing.mode": "unknown key: there is one way of routing now, the former `window`; take the "
    "key out, and for very short partitions raise partition.max_tokens and partition.max_records",
}

_PLAIN_WORDS = {
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _keys_at(model: Any, location: Sequence[str | int]) -> list[str]:
    """List the keys that the model at `location` allows."""
    for part in location:
        if isinstance(part, int):
            continue
        model = _submodel(model.model_fields[part].annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType, Annotated):
        for argument in typing.get_args(annotation):
            found = _submodel(argument)
            if found is not None:
                return found
    return None
