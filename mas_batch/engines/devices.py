"""`agents.device`, resolved for the machine that the worker is on."""

from __future__ import annotations

from collections.abc import Mapping

from mas_batch.errors import JobError


def pick_device(name: str, here: Mapping[str, int]) -> tuple[str, int | None]:
    """Return the kind of device and, where the name has one, its number.

    Args:
        name: `auto`, a kind, or a kind and a number: `cuda:1`.
        here: kind → how many such devices the engine can use here; `auto` is the first of them.

    Raises:
        JobError: there is no such device here, or not for this engine.
    """
    present = [kind for kind, number in here.items() if number]
    if name == "auto":
        return present[0], None
    kind, colon, number = name.partition(":")
    is_named = number.isdecimal() if colon else True
    if not is_named or int(number or 0) >= here.get(kind, 0):
        allowed = ", ".join(["auto", *present])
        raise JobError(f"{name!r} is not here; allowed: {allowed}", key="agents.device")
    return kind, int(number) if colon else None
