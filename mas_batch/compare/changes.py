"""Which keys differ between two nested mappings, such as two jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose values differ; one that only one side has is kept whole."""

    key: str
    """Path in the mapping, joined by dots; an agent goes by its name."""
    a: str | None
    """Value as JSON, strings without quotes; None: there is no such key."""
    b: str | None


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    """Compare key by key, in `a`'s order and then what only `b` has."""
    return tuple(_changes("", a, b))


def _changes(path: str, a: Any, b: Any) -> Iterator[Change]:
    a, b = _by_name(a), _by_name(b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            below = f"{path}.{key}" if path else str(key)
            yield from _changes(below, a.get(key, _ABSENT), b.get(key, _ABSENT))
    elif a != b:
        yield Change(path, _as_text(a), _as_text(b))


def _by_name(value: Any) -> Any:
    """Return a list of things with names as a mapping: their order is not what differs."""
    if not isinstance(value, list) or not value or not all(map(_has_name, value)):
        return value
    return {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in value}


def _has_name(item: Any) -> bool:
    return isinstance(item, Mapping) and "name" in item


def _as_text(value: Any) -> str | None:
    if value is _ABSENT:
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
