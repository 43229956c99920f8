"""What other modules ask of an engine before, or without, loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NOT_PROMISED = "not promised"
"""What a loaded engine says of its `equal_output` where answers depend on the batch."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine as its registry knows it. What only a loaded model tells is in `engines.base`."""

    module: str
    """Has `load(model, config) -> Engine`; imported on the worker, when a model is loaded."""
    extra: str | None = None
    """What `pip install` needs where the module's libraries are missing: `mas_batch[cpu]`."""
    options: str | None = None
    """`module:function` that reads `agents.options`: given the mapping, it returns an
    `engines.options.EngineOptions` or raises a JobError. The submitting process calls it before a
    cluster starts, so it imports no model library. None: options are read by `load` alone."""
    holds: Literal["files", "nothing", "endpoint"] = "files"
    """What `agents.model` names: files, which are verified and handed to `load`; nothing, written
    `NAME[:LABEL]`, the label telling the families of several agents apart; or a model somewhere
    else, written `NAME:MODEL`."""
    detected_by: tuple[str, ...] = ()
    """Patterns of file names: `engine: auto` takes it for a model whose folder has one of them."""
    agent_options: tuple[str, ...] = ()
    """Options that say how one agent asks, not what is held: agents that differ in these alone
    share hosts (`("*",)`: all options). The loaded engine has `for_agent(options)`."""
    concurrent: int = 2
    """How many partitions keep one engine busy; a loaded engine may know better (`concurrent`)."""
    computes_elsewhere: bool = False
    """It waits for something else than the cores of the worker's machine."""
    uses_threads: bool = True
    """It computes with as many threads as it is given."""
    adapters: bool = False
    """Agents with different adapters of one base share it: the engine has
    `add_adapter(name, files)` and heeds `Request.adapter`."""
    tensor_parallel: bool = False
    """It can hold one model on several accelerators of a worker (`agents.parallel.tensor`)."""
    quantizes: tuple[str, ...] = ()
    """Values of `agents.quantize` that it knows."""
    scores_choices: bool = False
    """It gives the probabilities of given words (`Sampling.choices`), so that labels can be read.
    A loaded engine says the same, by `scores_choices`."""
    operational: tuple[str, ...] = ()
    """Options that change no answer, only how fast it comes or who pays for it."""
    limits: tuple[str, ...] = ()
    """Options that say only which texts it can be asked about whole."""
    random_options: tuple[str, ...] = ()
    """Options that make it draw its answers by lot, whatever the temperature."""
    greedy_samples_differ: bool = False
    """Several samples at temperature 0 are not the same answer several times."""

    def of_agent(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the options that say how one agent asks: see `agent_options`."""
        own = self.agent_options
        return {key: value for key, value in options.items() if key in own or "*" in own}
