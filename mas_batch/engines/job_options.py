"""`agents.options` of a whole job, looked at before a cluster starts and a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pkgutil import resolve_name

from mas_batch.engine_info import EngineInfo
from mas_batch.engines import check_quantize
from mas_batch.engines.options import EngineOptions
from mas_batch.errors import JobError
from mas_batch.job import Agent, Job
from mas_batch.models import engine_of_folder
from mas_batch.registries import ENGINES


def check_options(job: Job, *, environment: bool = False) -> None:
    """Find options that an agent's engine does not know, or not with this value; or `quantize`.

    Left to the worker are engines whose libraries the options need and that are not installed here,
    and those that do not say how they read options.

    Args:
        environment: whether the agents run in this process' environment; then what they need there
            is looked for too.

    Raises:
        JobError: an option is wrong, an agent has an adapter for which its engine has no place, or
            reads labels of which it gives no probabilities; the message names the agent's key and
            what is allowed.
    """
    for agent in job.agents:
        try:
            _check_adapter(agent)
            _check_reading(agent)
            check_quantize(agent.quantize, list(_possible_engines(agent)))
            options = _read(agent)
            if options is not None and environment:
                options.check_environment()
        except JobError as error:
            key = (error.key or "agents.options").replace("agents.", f"agents.{agent.name}.", 1)
            raise JobError(error.message, key=key) from None


def engine_of(agent: Agent) -> EngineInfo:
    """Return the agent's engine; where files that are not here will tell, the likeliest."""
    return next(_possible_engines(agent))


def partitions_at_once(agent: Agent, engine: EngineInfo | None = None) -> int:
    """Return how many partitions keep a host of the agent busy, as far as the job tells.

    A loaded engine may know better.

    Args:
        engine: the agent's, where it is known from a run.

    Raises:
        JobError: an option is wrong; see `check_options`.
    """
    options = _read(agent)
    own = options.partitions_at_once if options is not None else None
    return (engine or engine_of(agent)).concurrent if own is None else own


def _check_adapter(agent: Agent) -> None:
    if agent.adapter is not None and not any(e.adapters for e in _possible_engines(agent)):
        able = ", ".join(name for name, engine in ENGINES.items() if engine.adapters)
        message = f"not allowed: its engine has no adapters; allowed with engine {able}"
        raise JobError(message, key="agents.adapter")


def _check_reading(agent: Agent) -> None:
    if agent.reads == "labels" and not any(e.scores_choices for e in _possible_engines(agent)):
        able = ", ".join(name for name, engine in ENGINES.items() if engine.scores_choices)
        message = "`labels` is not allowed: its engine gives no probabilities of given words"
        raise JobError(
            f"{message}; allowed: reply, or one of the engines {able}", key="agents.reads"
        )


def _read(agent: Agent) -> EngineOptions | None:
    """Return the agent's options as its engine reads them; None: that cannot be known here.

    Of several engines that `auto` may stand for where the files are not here, one has to know them.

    Raises:
        JobError: no engine that it may be reads them.
    """
    errors: list[JobError] = []
    for engine in _possible_engines(agent):
        if engine.options is None:
            return None
        try:
            options: EngineOptions = resolve_name(engine.options)(agent.options)
        except ModuleNotFoundError:
            return None
        except JobError as error:
            errors.append(error)
        else:
            return options
    if len(errors) == 1:
        raise errors[0]
    said = (f"{(e.key or '').removeprefix('agents.options.')}: {e.message}" for e in errors)
    raise JobError(f"no engine that {agent.model} may be for takes these: {'; or '.join(said)}")


def _possible_engines(agent: Agent) -> Iterator[EngineInfo]:
    known = agent.engine_info or engine_of_folder(agent.model)
    if known is not None:
        yield known
        return
    yield ENGINES["transformers"]  # what `auto` is where no file tells another
    yield from (engine for engine in ENGINES.values() if engine.detected_by)
