"""The job: what to do, as strict frozen models. Unknown keys and wrong values are errors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

from mas_batch.cards import card
from mas_batch.code_version import code_version
from mas_batch.engine_info import EngineInfo
from mas_batch.errors import JobError
from mas_batch.models import engine_of_folder, parse_source
from mas_batch.registries import ENGINES, METHODS, POLICIES, TASKS
from mas_batch.registry import Registry
from mas_batch.safe_text import names_a_secret


def _names_of(registry: Registry[Any]) -> AfterValidator:
    """Return the check that a name is registered: what it stands for is not imported."""

    def check(name: str) -> str:
        with _as_value_error():
            return registry.check(name)

    return AfterValidator(check)


@contextmanager
def _as_value_error(section: str = "") -> Iterator[None]:
    """Raise a `JobError` as pydantic's validators have to, its key below that section first."""
    try:
        yield
    except JobError as error:
        key = (error.key or "").removeprefix(f"{section}.") if section else ""
        raise ValueError(": ".join(filter(None, (key, error.message)))) from error


TaskKind = Annotated[str, _names_of(TASKS)]
PolicyName = Annotated[str, _names_of(POLICIES)]
MergeMethod = Annotated[str, _names_of(METHODS)]


def _engine_name(name: str) -> str:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{name!r} is not allowed; allowed: auto, {', '.join(ENGINES)}")
    return name


EngineName = Annotated[str, AfterValidator(_engine_name)]
"""A name in `registries.ENGINES`, or `auto`: by the model's name, or its files."""

GPU = "GPU"
"""The resource that stands for accelerators: embedded workers get so many each."""

# YAML gives lists; frozen models hold tuples.
Names = Annotated[tuple[str, ...], Strict(False)]


_MAX_NAME_BYTES = 128


def slug(name: str) -> str:
    """Return the name if it may name a folder.

    Raises:
        ValueError: it may not.
    """
    allowed = "letters, digits, '-', '_' and '.', not first"
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ValueError(f"{name!r} is not allowed: it names a folder; allowed: {allowed}")
    if len(name.encode()) > _MAX_NAME_BYTES:  # a run's name is longer by its fingerprint
        raise ValueError(
            f"{name!r} is too long: it names a folder; at most {_MAX_NAME_BYTES} bytes are allowed"
        )
    return name


Slug = Annotated[str, AfterValidator(slug)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore a pickled model; fields that another version did not know have their default."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            if name not in self.__dict__ and not field.is_required():
                self.__dict__[name] = field.get_default(call_default_factory=True)

    def with_changes(self, **changes: Any) -> Self:
        """Return a copy with other values, checked as those of a job file are.

        Raises:
            ValidationError: it is wrong; `model_copy` would not say so.
        """
        own = {name: getattr(self, name) for name in self.model_fields_set}
        return self.model_validate({**own, **changes})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Corpus(_Model):
    """Where the records are and which columns mean what."""

    path: Annotated[Names, BeforeValidator(_as_list), Field(min_length=1)]
    """File, folder, glob or any fsspec URL; or a list of them."""
    format: Literal["auto", "parquet", "jsonl", "csv", "text"] = "auto"
    text: str = "text"
    id: str | None = None
    """Column that holds a unique id; None: a stable hash of file and position."""
    reference: str | None = None
    """Column with a human answer, for evaluation only."""
    context: str | None = None
    """Column with background for `reply` tasks."""
    keep: Names | None = None
    """Columns to carry into the results; None keeps all."""
    limit: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    """Read only the first so many records."""
    record: Literal["line", "file"] = "line"
    """Plain text: a record is a line or a whole file."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    compression: str | None = "infer"
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)


class Task(_Model):
    """What is asked of every record."""

    kind: TaskKind
    """One of `registries.TASKS`; its class checks what the job says of the task."""
    prompt: str | None = None
    """Template of the user turn; `{text}` is the record. None: the task's own."""
    system: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 64
    language: str = "English"
    """Language of the answer."""
    source_language: str = "English"
    """Translation only."""
    labels: Names | None = None
    """Classification only: the allowed answers."""
    minimum: float = 0.0
    maximum: float = 10.0
    """Scoring only: the range of the number."""
    long_documents: Literal["hierarchical", "extractive", "join"] | None = None
    """How the answers to the parts of a text over the context become one. None: the task's own
    way; hierarchical for `summarize`."""
    evidence: Annotated[int, Field(ge=0, le=16)] = 2
    """Sentences of the source that are carried along with every part's summary."""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Settings of one kind; the class of the kind says which there are."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        with _as_value_error("task"):
            TASKS[self.kind].check(self)
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum {self.minimum} must be below maximum {self.maximum}")
        if self.prompt is not None and "{text}" not in self.prompt:
            raise ValueError("prompt: must contain {text}, where the record goes")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_options(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `options` that are not given: they came later than runs' identities."""
        fields: dict[str, Any] = dump(self)
        if not self.options:
            fields.pop("options", None)
        return fields


class AgentSampling(_Model):
    """How an agent decodes; the defaults are greedy."""

    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.temperature > 0 and self.num_beams > 1:
            raise ValueError("num_beams above 1 needs temperature 0")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("top_p and top_k need a temperature above 0")
        return self


class Parallel(_Model):
    """What holds one model together. Room for gangs; this version runs one worker per host."""

    tensor: Annotated[int, Field(ge=1, le=64)] = 1
    """Accelerators of one worker, each with a part of every layer."""
    pipeline: Literal[1] = 1


def _model_source(source: str) -> str:
    with _as_value_error():
        parse_source(source)
    return source


def _source_of_files(source: str) -> str:
    with _as_value_error():
        if not parse_source(source).has_files:
            raise ValueError(f"{source!r} has no files; an adapter is a folder of them")
    return source


LATER_KEYS = frozenset({"adapter", "quantize", "reads"})
"""Of agents: None is what it was before there was such a key."""


class Agent(_Model):
    """A voter: one model with one way of asking it. `count` hosts share its work."""

    name: Slug
    model: Annotated[str, AfterValidator(_model_source)]
    adapter: Annotated[str, AfterValidator(_source_of_files)] | None = None
    """LoRA adapter of the model, named as models are: a folder in the layout of peft."""
    engine: EngineName = "auto"
    capabilities: Names | None = None
    """Dask resources a worker must declare to host it; None: the task's kind."""
    resources: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    """Further Dask resources. `GPU`: devices per host, or a fraction below 1 of a shared one."""
    count: Annotated[int, Field(ge=1, le=4096)] = 1
    max_count: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Hosts it may grow to while work waits; None: `count`, no more."""
    share: bool = True
    """Agents whose engine is held in the same way are served by the same hosts."""
    samples: Annotated[int, Field(ge=1, le=64)] = 1
    """Answers it gives per record; above 1 only with a temperature."""
    prompt: str | None = None
    system: str | None = None
    """Override the task's prompt for this agent."""
    sampling: AgentSampling = AgentSampling()
    reads: Literal["labels", "reply"] | None = None
    """Classification only: the labels' probabilities after the prompt, or what the model replies.
    None: the labels, where its engine gives them and it decodes greedily, one sample."""
    parallel: Parallel = Parallel()
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per host; 0 shares the machine's cores among the embedded workers."""
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    quantize: Literal["int8"] | None = None
    """Hold the weights in fewer bits, where the engine can (`EngineInfo.quantizes`)."""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Settings of one engine, e.g. `base_url` for openai."""

    @property
    def most(self) -> int:
        """Hosts it may have at most."""
        return self.max_count or self.count

    @property
    def engine_info(self) -> EngineInfo | None:
        """Its engine, as far as the job tells; None where that takes a look at the model's files.

        Raises:
            JobError: another package's engine cannot be imported.
        """
        source = parse_source(self.model)
        if self.engine == "auto":
            return None if source.has_files else ENGINES[source.scheme]
        return ENGINES[self.engine]

    def reads_labels(self, task: Task) -> bool:
        """Whether it reads the labels' probabilities, as far as the job tells and, of
        `engine: auto`, the model's folder, if it is on this machine.

        What `engine: auto` finds may turn out to give none; then it replies.
        """
        if self.reads is not None or not TASKS[task.kind].reads_labels:
            return self.reads == "labels"
        engine = self.engine_info or engine_of_folder(self.model)
        return self._is_greedy and (engine is None or engine.scores_choices)

    @property
    def _is_greedy(self) -> bool:
        sampling = self.sampling
        return self.samples == 1 and sampling.temperature == 0 and sampling.num_beams == 1

    @property
    def loaded_as(self) -> list[Any]:
        """All that decides which model is resident, and how it is held, but for the options."""
        more = self.parallel.model_dump(mode="json", exclude_defaults=True)
        if self.quantize is not None:
            more["quantize"] = self.quantize
        held = [self.model, self.engine, self.dtype, self.device]
        return [*held, more] if more else held

    @property
    def agent_options(self) -> dict[str, Any]:
        """The options that say how it asks, not what is held: see `EngineInfo.agent_options`.

        Where `engine: auto` takes a look at the model's files, all are the engine's.
        """
        engine = self.engine_info
        return engine.of_agent(self.options) if engine is not None else {}

    @property
    def engine_options(self) -> dict[str, Any]:
        """The other options: those of the engine."""
        own = self.agent_options
        return {key: value for key, value in self.options.items() if key not in own}

    @property
    def engine_settings(self) -> list[Any]:
        """All that the job says of how its engine is held: where it is equal, hosts are shared."""
        return [*self.loaded_as, self.batch_tokens, self.threads, self.engine_options]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        engine = self.engine_info
        samples_differ = engine is not None and engine.greedy_samples_differ
        if self.samples > 1 and self.sampling.temperature == 0 and not samples_differ:
            raise ValueError(
                f"samples: {self.samples} greedy answers would be the same answer "
                f"{self.samples} times; set sampling.temperature above 0, or samples: 1"
            )
        if self.reads == "labels" and not self._is_greedy:
            raise ValueError(
                "reads: `labels` is not allowed with samples, sampling.temperature or "
                "sampling.num_beams: nothing is drawn; allowed: reply"
            )
        if self.max_count is not None and self.max_count < self.count:
            raise ValueError(f"max_count {self.max_count} must not be below count {self.count}")
        num_devices = self.resources.get(GPU, 0.0)
        if num_devices > 1 and num_devices % 1:
            raise ValueError(
                f"resources.{GPU}: {num_devices:g} is not allowed; allowed: whole numbers, or "
                "fractions below 1, which share a device"
            )
        self._check_parallel(engine, num_devices)
        if self.prompt is not None and "{text}" not in self.prompt:
            raise ValueError("prompt: must contain {text}, where the record goes")
        for name, value in self.options.items():
            if not names_a_secret(name) or isinstance(value, (int, float)):
                continue  # `seconds_per_token: 0.1` is no token
            raise ValueError(
                f"options.{name}: a secret has no place in a job, which is kept in the run; put "
                "it in an environment variable of the worker, and that variable's name in "
                "options.api_key_env"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys that came later than runs' identities, where they are not given."""
        fields: dict[str, Any] = dump(self)
        return {k: v for k, v in fields.items() if k not in LATER_KEYS or v is not None}

    def _check_parallel(self, engine: EngineInfo | None, num_devices: float) -> None:
        tensor = self.parallel.tensor
        if tensor == 1:
            return
        if engine is None or not engine.tensor_parallel:
            able = ", ".join(name for name, each in ENGINES.items() if each.tensor_parallel)
            raise ValueError(
                f"parallel.tensor: {tensor} is not allowed: engine {self.engine} holds a model on "
                f"one device; allowed: 1, or engine: {able}"
            )
        if self.device != "cpu" and num_devices != tensor:
            raise ValueError(
                f"parallel.tensor: {tensor} needs as many devices: resources.{GPU} has to be "
                f"{tensor}, not {num_devices:g}; or set device: cpu"
            )


class Adaptive(_Model):
    """Ask fewer agents where the first agree: one more only about records still undecided."""

    first: PositiveInt = 2
    """Answers per record before the first look."""
    confidence: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """A record is decided when its merged answer is so sure. None, for `vote` only: when the
    answers that could still come cannot change the winner."""


class Escalate(_Model):
    """Ask one more agent, about the least confident records only, when all others have answered.

    With `fraction` and `below` its answer is one more vote, with `target` the last word.
    """

    agent: str
    """Name of the agent that is kept for this."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The share of all records that it is asked about at most."""
    below: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Or: every record whose confidence is lower. Records that no agent answered always count."""
    target: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Or: as few as leave merged answers that agree with this agent's on that share of the
    records; which those are, a sample of its answers shows."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Of `target`: the probability, over the draw of the sample, that it is missed, at most.
    None: 0.05."""
    labels: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Of `target`: size of the sample, in records; a larger one escalates fewer of the others.
    None: 400."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [self.fraction, self.below, self.target]
        if sum(limit is not None for limit in given) != 1:
            raise ValueError("give either fraction or below or target")
        if self.target is None:
            if self.delta is not None or self.labels is not None:
                raise ValueError("delta and labels go with target only")
            return self
        needed = math.ceil(math.log(self.miss_rate) / math.log(self.target) - 1e-9)
        if self.sample_size < needed:
            raise ValueError(
                f"labels: {self.sample_size} cannot show target {self.target:g} with delta "
                f"{self.miss_rate:g}; allowed: {needed} or more"
            )
        return self

    @property
    def miss_rate(self) -> float:
        """`delta`, its default filled in."""
        return 0.05 if self.delta is None else self.delta

    @property
    def sample_size(self) -> int:
        """`labels`, its default filled in."""
        return 400 if self.labels is None else self.labels


class Routing(_Model):
    """Who is asked, and how much is in flight."""

    policy: PolicyName = "least-loaded"
    weights: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    """Agent → share of `weighted-round-robin`; an agent without one goes by its measured rate."""
    answers_per_record: PositiveInt | None = None
    """At least so many (an agent that is asked gives all its samples). None: ask every agent."""
    adaptive: Adaptive | None = None
    """Then `answers_per_record` is the most that are asked for."""
    escalate: Escalate | None = None
    """A cascade: which records one more agent is asked about in the end."""
    speculate: bool = True
    """At the end, ask a free host too where it should finish earlier; the first commit wins."""
    timeout_s: Annotated[float, Field(gt=0.0)] | None = None
    """A worker that is silent about a partition for longer is restarted. None: twenty times
    what its measured rate leads to expect, at least ten minutes."""
    load_timeout_s: Annotated[float, Field(gt=0.0)] = 3600.0
    """A worker that has not loaded its model for longer, downloading it included, is given up and
    restarted."""
    window: Annotated[int, Field(ge=1, le=64)] | None = None
    """Partitions in flight per host, those of all its agents. What waits there hides the latency of
    asking, but cannot go to the host that is free first. None: as many as its engine works on at
    once, and one more where one takes less than a second. A worker's task slots limit it, too."""
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Tries of one agent on one partition before its answers are given up."""


class Calibrate(_Model):
    """Records whose right answer is known: they tell which agents to believe, and how far."""

    labels: Annotated[str, Field(min_length=1)]
    """File, folder, glob or any fsspec URL, in any format of a corpus, with the columns `record_id`
    and `label`; a row without a label is passed over. `mas-batch label` writes such a file."""


class Merge(_Model):
    """How several answers become one."""

    method: MergeMethod | None = None
    """None: the task's default."""
    utility: Literal["chrf", "rouge-l", "bleu", "embedding"] | None = None
    """For `mbr`. None: rouge-l for summaries, chrf otherwise."""
    encoder: Annotated[str, AfterValidator(_model_source)] | None = None
    """Sentence-embedding model of `utility: embedding`."""
    accuracies: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default_factory=dict)
    """Agent → how often it is right; `weighted` uses log-odds of it, `mbr` and `mean` itself."""
    weights: Literal["log-odds", "linear", "learned"] | None = None
    """For `weighted`: `log-odds` (the default, optimal for independent voters) or the literal
    accuracies (`linear`). For `mbr`: `learned` from the whole corpus, by how well the others'
    answers support an agent's; None: the accuracies, or all equal."""
    history: str | None = None
    """For `reliability`: folder or URL where what was learned is kept between runs and read as a
    prior by the next."""
    calibrate: Calibrate | None = None
    """For `vote`, `weighted`, `reliability`, `mean` of labels: 50 labels and more make a
    confidence a probability of being right."""
    abstain_below: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Records whose confidence is lower are marked `abstain` and copied to `review/`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.utility == "embedding") != (self.encoder is not None):
            raise ValueError("encoder: the model of `utility: embedding`, and of no other")
        with _as_value_error("merge"):
            keeps = self.method is not None and METHODS[self.method].keeps_history
        if self.history is not None and not keeps:
            names = ", ".join(name for name, each in METHODS.items() if each.keeps_history)
            raise ValueError(f"history: only `method: {names}` keeps what it has learned")
        return self

    @model_serializer(mode="wrap")
    def _without_no_calibration(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `calibrate` where there is none: it came later than runs' identities."""
        fields: dict[str, Any] = dump(self)
        if self.calibrate is None:
            fields.pop("calibrate", None)
        return fields


class Partitioning(_Model):
    """How the corpus is cut. A partition is the unit of routing, retry and resume."""

    max_tokens: Annotated[int, Field(ge=1)] = 16_384
    """Estimated prompt plus new tokens per partition."""
    max_records: Annotated[int, Field(ge=1, le=1_000_000)] = 256


class Output(_Model):
    """Where runs go and what they keep."""

    path: Annotated[str, Field(min_length=1)]
    format: Literal["parquet"] = "parquet"
    keep_text: bool = True
    max_failed_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Above it the exit code is 3."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)


class Cluster(_Model):
    """Null scheduler: an embedded cluster on this machine. Else the user's own."""

    scheduler: str | None = None
    scheduler_file: str | None = None
    tls_ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    dashboard_address: str | None = "127.0.0.1:8787"
    """Of the embedded cluster; a busy port is replaced by a free one. null: no dashboard."""
    memory_limit: str = "auto"
    wait_s: Annotated[float, Field(ge=0.0)] = 120.0
    """How long a run waits while an agent has no worker, or a merge none at all: at the start, on
    a user's cluster, and whenever the last one has left. A spot instance may take minutes to
    be replaced, a restarted process takes seconds."""

    mixed_versions: Literal["refuse", "allow"] = "refuse"
    """Whether a worker may answer whose mas_batch is of another version, or has other code."""

    @property
    def code(self) -> str:
        """The code that every worker must have; empty: any."""
        return code_version() if self.mixed_versions == "refuse" else ""

    @model_validator(mode="after")
    def _one_scheduler(self) -> Self:
        if self.scheduler and self.scheduler_file:
            raise ValueError("give scheduler or scheduler_file, not both")
        return self


class Job(_Model):
    """A whole job file."""

    name: Slug
    corpus: Corpus
    task: Task
    agents: Annotated[tuple[Agent, ...], Strict(False), Field(min_length=1)]
    output: Output
    since: Literal["last"] | None = None
    """`last`: answers of the last published run of this name are reused where the record and the
    agent are unchanged, and only one process at a time may run the job."""
    routing: Routing = Routing()
    merge: Merge = Merge()
    partition: Partitioning = Partitioning()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [agent.name for agent in self.agents]
        if len({name.casefold() for name in names}) < len(names):  # they name folders
            raise ValueError(f"agents: names must differ, got {', '.join(names)}")
        unknown = sorted(set(self.merge.accuracies) - set(names))
        if unknown:
            raise ValueError(
                f"merge.accuracies: no agent is called {unknown[0]!r}; allowed: {', '.join(names)}"
            )
        method, missing = self.merge.method, sorted(set(names) - set(self.merge.accuracies))
        if missing and method is not None and METHODS[method].needs_accuracies:
            raise ValueError(
                f"merge.accuracies: `{method}` needs one for every agent; "
                f"missing: {', '.join(missing)}"
            )
        for agent in self.agents:
            if agent.capabilities is not None and self.task.kind not in agent.capabilities:
                raise ValueError(
                    f"agents.{agent.name}.capabilities: {', '.join(agent.capabilities) or 'none'} "
                    f"does not include {self.task.kind!r}, which task.kind asks for"
                )
            if agent.reads is not None and not TASKS[self.task.kind].reads_labels:
                takers = ", ".join(name for name, kind in TASKS.items() if kind.reads_labels)
                raise ValueError(f"agents.{agent.name}.reads: only for task.kind {takers}")
        for name in self.routing.weights:
            if name not in names:
                raise ValueError(
                    f"routing.weights: no agent is called {name!r}; allowed: {', '.join(names)}"
                )
        self._check_escalation()
        self._check_answers()
        return self

    def _check_escalation(self) -> None:
        escalate = self.routing.escalate
        if escalate is None:
            return
        if escalate.agent not in (names := [agent.name for agent in self.agents]):
            raise ValueError(
                f"routing.escalate.agent: no agent is called {escalate.agent!r}; "
                f"allowed: {', '.join(names)}"
            )
        if len(names) < 2:
            raise ValueError("routing.escalate: needs another agent, which is asked first")

    def _check_answers(self) -> None:
        possible = sum(agent.samples for agent in self.first_agents)
        wanted = self.routing.answers_per_record
        if wanted is not None and wanted > possible:
            each = ", ".join(f"{a.name}: {a.samples}" for a in self.first_agents)
            raise ValueError(
                f"routing.answers_per_record: {wanted} answers are more than the {possible} that "
                f"the agents can give ({each}); raise agents.N.samples or add an agent"
            )
        adaptive = self.routing.adaptive
        if adaptive is not None and adaptive.first > self.answers_per_record:
            raise ValueError(
                f"routing.adaptive.first: {adaptive.first} is more than the "
                f"{self.answers_per_record} answers that are asked for at most"
            )

    def _repr_html_(self) -> str:
        agents = (f"{a.name} ({a.model.partition('#')[0]})" for a in self.agents)
        facts = {
            "task": self.task.kind,
            "corpus": ", ".join(self.corpus.path),
            "agents": ", ".join(agents),
            "answers per record": self.answers_per_record,
            "routed by": self.routing.policy,
            "merged by": self.merge.method or "the task's default",
            "output": self.output.path,
        }
        return card("job", self.name, facts)

    @property
    def answers_per_record(self) -> int:
        """Answers asked for each record, before any is escalated."""
        return self.routing.answers_per_record or sum(a.samples for a in self.first_agents)

    @property
    def first_agents(self) -> tuple[Agent, ...]:
        """All agents but the one that only escalated records go to."""
        escalate = self.routing.escalate
        return tuple(a for a in self.agents if escalate is None or a.name != escalate.agent)

    def with_agents(self, names: Collection[str]) -> Job:
        """Return the job with these agents only, and without what it says of others.

        It asks for no more answers than they can give, and escalates nothing if the agent for
        that, or every other, is not among them.

        Raises:
            ValidationError: no agent is among them.
        """
        agents = tuple(agent for agent in self.agents if agent.name in names)
        escalate = self.routing.escalate
        if escalate is not None and (escalate.agent not in names or len(agents) == 1):
            escalate = None
        first = (a for a in agents if escalate is None or a.name != escalate.agent)
        possible = sum(agent.samples for agent in first)
        most = min(self.routing.answers_per_record or possible, possible)
        adaptive = self.routing.adaptive
        routing = self.routing.with_changes(
            escalate=escalate,
            answers_per_record=self.routing.answers_per_record and most,
            adaptive=adaptive and adaptive.with_changes(first=min(adaptive.first, most)),
            weights={name: w for name, w in self.routing.weights.items() if name in names},
        )
        accuracies = {name: a for name, a in self.merge.accuracies.items() if name in names}
        merge = self.merge.with_changes(accuracies=accuracies)
        return self.with_changes(agents=agents, routing=routing, merge=merge)

    def capabilities(self, agent: Agent) -> dict[str, float]:
        """The Dask resources that a worker must declare to host `agent`."""
        names = agent.capabilities if agent.capabilities is not None else (self.task.kind,)
        return {**dict.fromkeys(names, 1.0), **agent.resources}

    def identity(self) -> dict[str, Any]:
        """All that determines the results: a changed value means another run.

        Left out is what only changes how fast or where: hosts, threads, batches, the
        cluster and the output's place, and what need not be asked again.
        """
        whole = self.model_dump(mode="json")
        whole.pop("cluster")
        whole.pop("since")
        whole["output"] = {"keep_text": self.output.keep_text}
        # Not the path: what matters is which files it names, and the corpus's own fingerprint says.
        for key in ("path", "storage_options"):
            whole["corpus"].pop(key)
        whole["routing"] = {"answers_per_record": self.answers_per_record}
        adaptive = self.routing.adaptive
        if adaptive is not None:
            whole["routing"]["adaptive"] = adaptive.model_dump(mode="json")
        if self.routing.escalate is not None:
            escalate = self.routing.escalate.model_dump(mode="json")
            if self.routing.escalate.target is None:  # the names of earlier runs had none of these
                escalate = {key: escalate[key] for key in ("agent", "fraction", "below")}
            whole["routing"]["escalate"] = escalate
        if adaptive or self.answers_per_record < sum(a.samples for a in self.first_agents):
            whole["routing"]["policy"] = self.routing.policy  # it decides who is asked
            whole["routing"]["weights"] = self.routing.weights
        for agent, own in zip(whole["agents"], self.agents, strict=True):
            # Runs of earlier versions read replies, and have no such key in their names.
            agent.pop("reads", None)
            if own.reads_labels(self.task):
                agent["reads"] = "labels"
            for key in (
                "count",
                "max_count",
                "share",
                "threads",
                "batch_tokens",
                "resources",
                "capabilities",
            ):
                agent.pop(key)
            if agent["parallel"] == Parallel().model_dump(mode="json"):
                agent.pop("parallel")  # it was not there in the names of earlier runs
            # Nor these paths: the run's name has the fingerprint of what they name.
            agent["options"].pop("examples", None)
        whole["merge"].pop("calibrate", None)
        return whole


def fingerprint(value: Any) -> str:
    """Hash a JSON-able value; equal values in any key order give equal hashes."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()
