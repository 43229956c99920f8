"""`agents.options` of the engine `nearest`: those of the method that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mas_batch.engines.classical.examples import ExampleOptions
from mas_batch.engines.classical.halves import HalvesOptions
from mas_batch.engines.options import EngineOptions, read_options
from mas_batch.errors import JobError

Label = Annotated[str, Field(min_length=1)]


class Voting(EngineOptions):
    """Options of every method that chooses among answers."""

    temperature: Annotated[float, Field(gt=0.0)] = 0.07
    """Of the softmax over cosines: lower makes the nearest count more, and confidences higher."""
    prefix: str = ""
    """Put before the text, as some encoders want it: `query: `."""


class FromExamples(Voting, ExampleOptions):
    """Options of the methods that read examples."""

    example_prefix: str = ""
    """Put before every example: `passage: `."""


class Knn(FromExamples):
    """Options of `method: knn`."""

    method: Literal["knn"] = "knn"
    k: Annotated[int, Field(ge=1)] = 10
    """Examples that vote."""


class Centroid(FromExamples):
    """Options of `method: centroid`."""

    method: Literal["centroid"]


class ZeroShot(Voting):
    """Options of `method: zero-shot`."""

    method: Literal["zero-shot"]
    labels: Annotated[dict[Label, str], Field(min_length=1)]
    """Label → a description of what it covers, which is what is compared."""


class Similarity(HalvesOptions):
    """Options of `method: similarity`."""

    method: Literal["similarity"]


Method = Knn | Centroid | ZeroShot | Similarity
METHODS: dict[str, type[Method]] = {
    "knn": Knn, "centroid": Centroid, "zero-shot": ZeroShot, "similarity": Similarity,
}  # fmt: skip


def read(given: Mapping[str, Any]) -> Method:
    """Return the options, checked.

    Raises:
        JobError: the method is unknown, or an option of it is unknown, missing or not allowed.
    """
    method = given.get("method", "knn")
    if not isinstance(method, str) or method not in METHODS:
        raise JobError(
            f"{method!r} is not allowed; allowed: {', '.join(METHODS)}", key="agents.options.method"
        )
    return read_options(METHODS[method], given, f"nearest with method {method}")
