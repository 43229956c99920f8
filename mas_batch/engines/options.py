"""`agents.options`: settings that only one engine knows, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mas_batch.errors import JobError

OptionsT = TypeVar("OptionsT", bound=BaseModel)


class EngineOptions(BaseModel):
    """What the options of every engine have in common: unknown keys are errors.

    `engine_info.EngineInfo.options` names the function that reads them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def check_environment(self) -> None:
        """Find what is missing in the environment of the process where the agent runs.

        Raises:
            JobError: a variable is not set; the message names it.
        """

    @property
    def partitions_at_once(self) -> int | None:
        """How many partitions keep an engine with these options busy; None: they do not say."""
        return None


def read_options(
    model: type[OptionsT], given: Mapping[str, Any], engine: str, *, show_values: bool = True
) -> OptionsT:
    """Return `agents.options`, checked.

    Args:
        engine: its name, for messages.
        show_values: whether messages may quote a wrong value; it could be a key.

    Raises:
        JobError: the first key that is unknown or missing, or value that is not allowed.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=show_values)[0]
    # Not inside the clause above: the exception that it would carry along holds the values.
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(model.model_fields)
        problem = f"unknown option; the engine {engine} allows: {allowed}"
    elif first["type"] == "missing":
        problem = f"the engine {engine} needs it"
    else:
        value = f"{first['input']!r} " if show_values else ""
        problem = f"{value}is not allowed: {first['msg'][0].lower()}{first['msg'][1:]}"
    raise JobError(problem, key=".".join(["agents.options", *map(str, first["loc"])]))
