"""Registries: values by name, built in or from another package.

A registry knows names without importing their values, so that a job file is checked and the command
line's help is shown without importing torch. Another package adds values of its own under the
registry's entry point group; see `docs/extending.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Generic, TypeVar, cast

from mas_batch.errors import JobError

Value = TypeVar("Value")


class UnknownNameError(JobError, KeyError):
    """A registry has no such name; a `KeyError` too, as of any mapping."""

    __str__ = Exception.__str__  # a KeyError would quote the message


class Registry(Mapping[str, Value], Generic[Value]):
    """Name → value; a value is imported when it is first used.

    Args:
        key: the key of the job file that holds such a name, for error messages.
        group: the entry point group under which other packages add values.
        built_in: name → the value, or `module:attribute` for a value to import later.
    """

    def __init__(self, key: str, group: str, built_in: Mapping[str, Value | str]) -> None:
        self.key = key
        self.group = group
        self._built_in = built_in
        self._loaded: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        """Return the value of that name.

        Raises:
            UnknownNameError: the name is not registered; the message names what is allowed.
            JobError: another package's value cannot be imported.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(self.check(name))
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._added

    def __len__(self) -> int:
        return len(self._built_in) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._added

    def check(self, name: str) -> str:
        """Return the name if it is registered.

        Raises:
            UnknownNameError: it is not; the message names what is allowed.
        """
        if name not in self:
            allowed = ", ".join(self)
            raise UnknownNameError(f"{name!r} is not allowed; allowed: {allowed}", key=self.key)
        return name

    def _load(self, name: str) -> Value:
        found = self._built_in.get(name)
        if isinstance(found, str):
            return cast(Value, resolve_name(found))
        if found is not None:
            return found
        point = self._added[name]
        try:
            return cast(Value, point.load())
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise JobError(
                f"{name!r} of the package {package!r} cannot be imported: "
                f"{type(error).__name__}: {error}",
                key=self.key,
            ) from error

    @cached_property
    def _added(self) -> Mapping[str, EntryPoint]:
        """Other packages' entries; they cannot replace a built-in value."""
        found = entry_points(group=self.group)
        return {point.name: point for point in found if point.name not in self._built_in}
