"""Pickles of slotted dataclasses that hold their fields by name.

A slotted dataclass pickles its values in the order of its fields, so a process whose class has
one more field reads every later value into the wrong place, and says nothing.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


def pickled_by_name(cls: type[T]) -> type[T]:
    """Let a slotted dataclass be pickled by its fields' names; put it above `@dataclass`.

    Of a value that another version has pickled, fields that this one does not know are left
    out, and fields that the other did not know have their default; without one they are not set.
    """
    cls.__getstate__ = _state  # type: ignore[method-assign]
    cls.__setstate__ = _restore  # type: ignore[attr-defined]
    return cls


def _state(self: Any) -> dict[str, Any]:
    return {field.name: getattr(self, field.name) for field in fields(self)}


def _restore(self: Any, state: dict[str, Any]) -> None:
    for field in fields(self):
        if field.name in state:
            value = state[field.name]
        elif field.default is not MISSING:
            value = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        else:
            continue
        object.__setattr__(self, field.name, value)
