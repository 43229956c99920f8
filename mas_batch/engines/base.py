"""The one contract between a task and whatever runs the model."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mas_batch.errors import EngineError, Reason


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat prompt; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode. `temperature` 0 is greedy (or beam search when `num_beams` > 1)."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    num_beams: int = 1
    num_samples: int = 1
    """Completions per request; above 1 only with temperature > 0."""
    choices: tuple[str, ...] = ()
    """Nothing is generated: the log-probability of each of these continuations is wanted.
    `max_new_tokens` is the room for the longest. Only engines with `scores_choices`."""

    def check(self) -> None:
        """Refuse what no way of decoding can do.

        Raises:
            EngineError: it names the values that do not go together.
        """
        if self.temperature > 0 and self.num_beams > 1:
            raise EngineError(f"num_beams {self.num_beams} needs temperature 0")
        if self.temperature == 0 and self.num_samples > 1:
            raise EngineError(f"num_samples {self.num_samples} needs a temperature above 0")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p {self.top_p} is not allowed: above 0, at most 1")


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """What an engine reads of a request, rendered and tokenised; see `Engine.tokenize`."""

    num_tokens: int
    tokens: Any = None
    """The engine's own; None where it only counts them."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt."""

    request_id: str
    """Unique within a call; names the request in errors and in fault maps."""
    text: str
    """The text alone, for engines that take no prompt (translation models)."""
    messages: tuple[Message, ...]
    """The chat prompt that a language model is shown."""
    seed: int = 0
    """Seed of this request's own random stream; the sample number is mixed in by the engine,
    so sample s of a request is the same whatever else is in the batch."""
    context: str | None = None
    """The background that the prompt holds too, for engines that take no prompt but can use it."""
    adapter: str | None = None
    """Name of the adapter to use; the engine was given it by `add_adapter`. None: the base."""
    tokenized: TokenizedPrompt | None = field(default=None, compare=False, repr=False)
    """What the engine has made of all that it reads; None: it has not been asked yet."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply of the model."""

    text: str
    token_ids: tuple[int, ...]
    sum_logprob: float | None
    """Natural log-probability of `token_ids` under the model at temperature 1, end token
    included where one was generated; None where the engine cannot know it."""
    num_tokens: int | None
    """None where the engine cannot know it, or what it says of it makes no sense."""
    finish_reason: str
    """`stop` (the model ended), `length` (max_new_tokens cut it) or `error`."""
    prompt_tokens: int | None
    compute_s: float = 0.0
    """This completion's share of its batch's model time."""
    prefill_s: float | None = None
    """Of that, its share of reading the prompts; None where the engine cannot tell."""
    cached_tokens: int | None = None
    """Of `prompt_tokens`, those that were read before, for others: other prompts that begin alike,
    or the first sample of this one. None where it cannot be told."""
    choice_logprobs: tuple[float, ...] = ()
    """Natural log-probability of each of `Sampling.choices` after the prompt. The end
    token counts only where a choice is the beginning of another one's tokens;
    `text` is then the likeliest."""
    choice_tokens: tuple[int, ...] = ()
    """Number of tokens of each choice."""
    reason: Reason | None = None
    """Set when there is no completion (finish_reason `error`)."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to hold a model; what the job's agent says, resolved for one worker."""

    dtype: str = "auto"
    """`auto` is float32 on a CPU (greedy answers then do not depend on the batch, but for two
    tokens that tie to within rounding) and the checkpoint's own dtype on an accelerator."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:0`, `mps`; `auto` takes the first accelerator that is visible."""
    threads: int = 0
    """CPU threads for the model; 0 leaves the library's choice."""
    max_batch_tokens: int | None = 8192
    quantize: str | None = None
    """Hold weights in fewer bits; one of `EngineInfo.quantizes`. None: as `dtype` says."""
    tensor: int = 1
    """Accelerators of the worker that hold the model together; see `EngineInfo.tensor_parallel`."""
    adapters: int = 0
    """Adapters that it is going to be given; see `EngineInfo.adapters`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings that only one engine knows; it rejects unknown keys with a `JobError`."""


class Engine(Protocol):
    """Holds one model, resident; turns requests into completions.

    Implementations only run a batch that fits: sorting by length, the token budget, halving
    after an out-of-memory error and isolating a culprit are the work of `engines.batching`.

    An engine is loaded, called and closed in one thread (`engines.loop`), but for `tokenize`. One
    that waits for a server may have `threadsafe = True`: then any number of threads call its
    `generate` at once, and its `close` ends their calls. One with `scores_choices = True` heeds
    `Sampling.choices`. One that knows how many partitions keep
    it busy has `concurrent`, and one whose `EngineInfo` names `agent_options` has
    `for_agent(options) -> Engine`: a light view that shares what is held; closing a view closes
    nothing. One whose `EngineInfo` says `adapters` has `add_adapter(name, files)`, which raises a
    `ModelError` for files that do not fit, and may be called while requests are under way; its
    `describe` has `adapters`, from their names to facts such as `sha256`.
    """

    max_context_tokens: int
    """Prompt plus completion, in the model's own tokens."""
    max_batch_tokens: int | None
    """Budget of rows × (longest prompt + max_new_tokens) per batch; None = take all at once.

    A stepping engine that pads no rows counts the tokens of each instead."""
    takes_messages: bool
    """False for engines that read `Request.text` and ignore the prompt."""
    only_translates: bool
    """True for translation models: there is nothing else that they can be asked."""
    samples: bool
    """False for engines that have one answer to a text, whatever the sampling."""

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Render and tokenise all that is read of a request: the costly part of asking.

        It depends on the request's text, messages and context alone, not on its adapter, so it is
        done once, before batches are made, and passed on as `Request.tokenized`. `num_tokens` is
        of the full prompt, template included. Several threads call it, also while `generate` runs
        in another.
        """
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Run one batch: for each request, in order, `sampling.num_samples` completions.

        Raises:
            OutOfMemoryError: the batch did not fit; the engine is usable again.
            EngineRefusedError: no batch can succeed; the whole task fails.
            EngineUnavailableError: the server is away; the whole task is put off.
            EngineLostError: the engine is dead, and its process with it.
            EngineError: anything else the engine can name; other exceptions count as that too.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest: engine, versions, device, dtype, threads, model hashes.

        `warnings`, if given, are sentences for people: in the terminal, the log and the report.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for a stepping engine to begin with it."""

    key: int
    """Names the request from `begin` to `Finished`; unique among those under way."""
    request: Request
    """With its `tokenized` prompt."""
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Finished:
    """All completions of a request that a stepping engine has ended."""

    key: int
    completions: list[Completion]
    """`sampling.num_samples`, each with its share of the steps that it was in."""


@runtime_checkable
class SteppingEngine(Engine, Protocol):
    """An engine in which a request may begin while others are under way.

    It decodes step by step, and a request that ends makes room for the next one, of whatever
    partition or agent: continuous batching (Yu et al., "Orca", OSDI 2022). One thread calls it.
    """

    def can_step(self, sampling: Sampling) -> bool:
        """Whether requests that are decoded so can be stepped; others go through `generate`."""
        ...

    def begin(self, waiting: Sequence[Waiting]) -> list[int]:
        """Begin with as many of these as there is room for; returns their positions in `waiting`.

        The engine chooses whom, so that prompts of like length are read together, but the first
        does not wait for ever. If nothing is under way it begins at least one. It is called before
        every step until it begins with none, and again when a request has ended or another one
        has come. An exception means that none has begun, and leaves those under way as they are;
        `OutOfMemoryError` too.
        """
        ...

    def step(self) -> list[Finished]:
        """Decode one more token of everything under way; returns what has ended by it.

        After an exception the state of what is under way is undefined: call `drop`.
        """
        ...

    def drop(self) -> None:
        """Forget everything under way; the engine is usable again."""
        ...


class EngineClient(Protocol):
    """How one agent asks an engine that others may be asking at the same time."""

    @property
    def known(self) -> MutableMapping[tuple[Request, Sampling], Completion]:
        """Completions that are asked for again and again: whoever asks keeps them here."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus completion, in the model's own tokens."""
        ...

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Render and tokenise a request; see `Engine.tokenize`."""
        ...

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Answer every request, in the order given, whatever batching does in between.

        A prompt that leaves no room for `max_new_tokens` in the context fails alone with
        `too_long`. A batch that fails is halved until the culprit stands alone; it becomes a
        completion with a reason, and its batch-mates are answered.

        Raises:
            EngineRefusedError, EngineUnavailableError: no request of the batch can be answered.
            RunError: the engine is being closed.
        """
        ...


def tokenized_prompt(engine: Engine, request: Request) -> TokenizedPrompt:
    """Return the request's prompt, prepared now if it has not been before."""
    return request.tokenized if request.tokenized is not None else engine.tokenize(request)
