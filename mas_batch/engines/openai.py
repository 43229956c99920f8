"""Any chat endpoint that speaks OpenAI's protocol: a hosted API, or a server of one's own.

The key is read from the worker's environment and goes nowhere but into the requests.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.metadata import version
from typing import Annotated, Any

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice
from pydantic import Field

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.claims import MAX_COUNT
from mas_batch.engines.options import EngineOptions, read_options
from mas_batch.errors import EngineError, EngineRefusedError, JobError, Reason, RecordError
from mas_batch.models import ModelFiles, parse_source

OFFICIAL_URL = "https://api.openai.com/v1"
BYTES_PER_TOKEN = 4
"""For estimates: an endpoint does not tell how it tokenises. About right for English."""
TOKENS_PER_MESSAGE = 4
"""What chat templates put around a turn, about."""
REFUSED = (401, 403, 404)
"""No key, no right, no such model: what fails one request fails all."""
MAX_MESSAGE_CHARS = 300

_TOO_LONG = re.compile(r"context[ _](?:length|size|window)|maximum (?:number of )?tokens", re.I)


class Options(EngineOptions):
    """What `agents.options` may hold for this engine."""

    base_url: Annotated[str, Field(pattern=r"^https?://[^/@?#]+(/[^@?#]*)?$")] = OFFICIAL_URL
    """No user, password or query in it: the HTTP library logs the URLs that it asks."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = "OPENAI_API_KEY"
    """Name of the environment variable on the worker that holds the key. An endpoint of one's
    own that wants no key needs none, unless this is set."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests under way at a time."""
    timeout_s: Annotated[float, Field(gt=0.0)] = 120.0
    """For one try of one request."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 4
    """Further tries after 408, 409, 429, 5xx and lost connections, with growing pauses."""
    max_context_tokens: Annotated[int, Field(ge=1)] = 8192
    """Prompt plus completion, by estimate. What the server finds too long is reported so."""
    logprobs: bool = False
    """Ask for log-probabilities. Not every endpoint has them; most leave the end token out."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Merged over the body of every request."""


class OpenAIEngine:
    """One model behind an endpoint, asked by several threads.

    Raises:
        JobError: an option is unknown or not allowed, or the key's variable is not set.
    """

    takes_messages = True
    only_translates = False
    samples = True
    max_batch_tokens: int | None = None  # the server makes its own batches: it gets all there is

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        options = read_options(Options, config.options, "openai", show_values=False)
        key = os.environ.get(options.api_key_env)
        wanted = options.base_url == OFFICIAL_URL or "api_key_env" in options.model_fields_set
        if not key and wanted:
            raise JobError(
                f"the environment variable {options.api_key_env} is not set where the agent runs",
                key="agents.options.api_key_env",
            )
        self._model = parse_source(model.source).name
        self._options = options
        self._has_key = bool(key)
        self._refusal: str | None = None
        self.max_context_tokens = options.max_context_tokens
        self._client = openai.OpenAI(
            api_key=key or "none",  # the library insists on one
            base_url=options.base_url,
            timeout=options.timeout_s,
            max_retries=options.max_retries,
        )
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="openai")

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Estimate the number of tokens from that of UTF-8 bytes."""
        turns = request.messages
        return TokenizedPrompt(sum(_estimate(m.content) + TOKENS_PER_MESSAGE for m in turns))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Ask about all requests; one that fails becomes completions with a reason.

        Raises:
            EngineRefusedError: the endpoint refuses the key or the model.
            EngineError: it cannot decode this way.
        """
        if sampling.num_beams > 1:
            raise EngineError("openai endpoints have no beam search; set sampling.num_beams to 1")
        self._refusal = None  # the last batch's; a passing one deserves another try
        start = time.perf_counter()
        asked = [self._threads.submit(self._answer, r, sampling) for r in requests]
        done, waiting = wait(asked, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            future.result()  # raises the refusal
        answers = [future.result() for future in asked]
        return _share_time(answers, time.perf_counter() - start)

    def describe(self) -> Mapping[str, Any]:
        """Name the endpoint and the model."""
        return {
            "engine": "openai",
            "openai": version("openai"),
            "model": self._model,
            "base_url": self._options.base_url,
            "concurrency": self._options.concurrency,
            "max_context_tokens": self.max_context_tokens,
            "token_counts": "the server's; before asking, bytes / 4",
        }

    def close(self) -> None:
        """Close the connections; requests that wait are not asked."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _answer(self, request: Request, sampling: Sampling) -> list[Completion]:
        """Return `num_samples` completions; each one's seconds are its share of the request's."""
        start = time.perf_counter()
        done: list[Completion] = []
        missing = sampling.num_samples
        try:
            while missing:
                # Greedy requests, and servers that ignore `n`, give one: ask again for the rest.
                body = self._body(request, sampling, missing, sample=len(done))
                done += self._read(self._post(body), request)[:missing]
                missing = sampling.num_samples - len(done)
        except RecordError as error:
            estimate = tokenized_prompt(self, request).num_tokens
            failure = _failure(error.reason, error.message, estimate, num_tokens=0)
            done += [failure] * missing
        share_s = (time.perf_counter() - start) / len(done)
        return [dataclasses.replace(completion, compute_s=share_s) for completion in done]

    def _body(self, request: Request, sampling: Sampling, n: int, sample: int) -> dict[str, Any]:
        # The official endpoint has renamed it; the servers that imitate it know the old name.
        official = self._options.base_url == OFFICIAL_URL
        limit = "max_completion_tokens" if official else "max_tokens"
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": sampling.temperature,
            limit: sampling.max_new_tokens,
        }
        if sampling.temperature > 0:
            seed = (request.seed + sample) & 0x7FFFFFFF  # some servers take 32 bits only
            body |= {"top_p": sampling.top_p, "seed": seed, "n": n}
        if sampling.top_k > 0:
            body["top_k"] = sampling.top_k
        if self._options.logprobs:
            body["logprobs"] = True
        return body | self._options.extra_body

    def _post(self, body: dict[str, Any]) -> ChatCompletion:
        """Send one request.

        Raises:
            EngineRefusedError: no request to this endpoint can succeed.
            RecordError: this one did not.
        """
        # The batch's other requests would be refused as well, and hundreds of calls with a
        # wrong key are what gets accounts locked.
        if self._refusal is not None:
            raise EngineRefusedError(self._refusal)
        try:
            return self._client.post("/chat/completions", body=body, cast_to=ChatCompletion)
        except openai.APIStatusError as error:
            status, message = error.status_code, self._tell(error)
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not JSON
            status, message = 0, self._tell(error)
        # Not inside the clauses above: a chained exception would carry the response along.
        if status in REFUSED:
            self._refusal = message
            raise EngineRefusedError(message)
        too_long = status in (400, 413) and _TOO_LONG.search(message)
        raise RecordError(Reason.TOO_LONG if too_long else Reason.ENGINE_ERROR, message)

    def _tell(self, error: Exception) -> str:
        """Put an error in words."""
        return self._clean(f"{self._options.base_url}: {type(error).__name__}: {error}")

    def _clean(self, message: str) -> str:
        """Take the key out of what a server says, and bound it."""
        if self._has_key:
            message = message.replace(self._client.api_key, "[key]")
        return message[:MAX_MESSAGE_CHARS]

    def _read(self, response: ChatCompletion, request: Request) -> list[Completion]:
        """Make completions of a response's choices.

        Raises:
            RecordError: it is not a chat completion. The library builds its objects from any
                JSON without a check, and hands other text through as it is.
        """
        try:
            usage = response.usage
            estimate = tokenized_prompt(self, request).num_tokens
            prompt_tokens = _count(usage.prompt_tokens) if usage else estimate
            counted = zip(response.choices, _num_tokens(response), strict=True)
            done = [self._completion(choice, prompt_tokens, n) for choice, n in counted]
        except (AttributeError, TypeError, ValueError, OverflowError):
            done = []
        if not done:
            message = f"{self._options.base_url}: the reply is no chat completion"
            raise RecordError(Reason.ENGINE_ERROR, message)
        return done

    def _completion(
        self, choice: Choice, prompt_tokens: int | None, num_tokens: int | None
    ) -> Completion:
        refusal = choice.message.refusal
        if refusal or choice.finish_reason == "content_filter":
            why = f"the model refused: {refusal}" if refusal else "held back by a content filter"
            message = self._clean(why)
            return _failure(Reason.ENGINE_ERROR, message, prompt_tokens, num_tokens)
        logprobs = choice.logprobs.content if choice.logprobs else None
        return Completion(
            text=(choice.message.content or "").strip(),
            token_ids=(),  # the protocol has no ids
            sum_logprob=math.fsum(token.logprob for token in logprobs) if logprobs else None,
            num_tokens=num_tokens,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            prompt_tokens=prompt_tokens,
        )


load = OpenAIEngine


def _failure(
    reason: Reason, message: str, prompt_tokens: int | None, num_tokens: int | None
) -> Completion:
    facts = ("", (), None, num_tokens, "error", prompt_tokens)
    return Completion(*facts, reason=reason, message=message)


def _count(claimed: object) -> int | None:
    """Return a count that a server claims; None: it is no number. The library checks no types."""
    return claimed if isinstance(claimed, int) else None


def _num_tokens(response: ChatCompletion) -> list[int] | list[None]:
    """Count each choice's tokens; None: the server's total makes no sense.

    The usage is a total over the choices: it is shared by their lengths, and adds up.
    """
    sizes = [_estimate(choice.message.content or "") for choice in response.choices]
    if response.usage is None:
        return sizes
    total, whole = _count(response.usage.completion_tokens), sum(sizes) or 1
    if total is None or not 0 <= total <= MAX_COUNT:
        return [None] * len(sizes)
    bounds = [total * part // whole for part in itertools.accumulate(sizes, initial=0)]
    bounds[-1] = total
    return [after - before for before, after in itertools.pairwise(bounds)]


def _share_time(answers: list[list[Completion]], wall_s: float) -> list[list[Completion]]:
    """Scale the requests' own seconds, which overlap, to those that passed."""
    scale = wall_s / (sum(c.compute_s for row in answers for c in row) or 1.0)
    return [[dataclasses.replace(c, compute_s=c.compute_s * scale) for c in row] for row in answers]


def _estimate(text: str) -> int:
    return -(-len(text.encode(errors="surrogatepass")) // BYTES_PER_TOKEN)
