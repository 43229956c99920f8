"""Any chat endpoint that speaks OpenAI's protocol: a hosted API, or a server of one's own.

The key is read from the worker's environment and goes nowhere but into the requests.

When the server is away the partition is put off (`endpoint`). What was answered before is kept for
then, and a small request asks first whether the server is back.

Several partitions may be asked about at once, each in a call of its own from a thread of its own:
`concurrency` bounds the requests of all of them together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.metadata import version
from typing import Any

from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.claims import valid_count
from mas_batch.engines.endpoint import (
    Endpoint,
    Halt,
    Options,
    RateLimitedError,
)
from mas_batch.engines.interrupted import Interrupted, Turns, key_of
from mas_batch.engines.options import read_options
from mas_batch.errors import (
    EngineError,
    EngineUnavailableError,
    Reason,
    RecordError,
)
from mas_batch.models import ModelFiles, parse_source

BYTES_PER_TOKEN = 4
"""For estimates: an endpoint does not tell how it tokenises. About right for English."""
TOKENS_PER_MESSAGE = 4
"""What chat templates put around a turn, about."""

read = partial(read_options, Options, engine="openai", show_values=False)


class OpenAIEngine:
    """One model behind an endpoint; any number of threads call `tokenize` and `generate`.

    Raises:
        JobError: an option is unknown or not allowed, or the key's variable is not set.
    """

    takes_messages = True
    only_translates = False
    samples = True
    threadsafe = True
    max_batch_tokens: int | None = None  # the server makes its own batches: it gets all there is

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        options = read(config.options)
        options.check_environment()
        key = os.environ.get(options.api_key_env)
        self._model = parse_source(model.source).name
        self._options = options
        self._endpoint = Endpoint(options, self._model, key)
        self._interrupted = Interrupted()
        self._turns = Turns()
        self.concurrent = options.partitions_at_once
        self.max_context_tokens = options.max_context_tokens
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="openai")

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Estimate the number of tokens from that of UTF-8 bytes."""
        turns = request.messages
        return TokenizedPrompt(sum(_estimate(m.content) + TOKENS_PER_MESSAGE for m in turns))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Ask about all requests; one that fails becomes completions with a reason.

        The completions' seconds add up to those of the call. Of calls that overlap each has its
        own: the server computes elsewhere, and how it shares its time is not known here.

        Raises:
            EngineRefusedError: the endpoint refuses the key or the model.
            EngineUnavailableError: the server is away. Answers that it has given are kept.
            EngineError: it cannot decode this way.
        """
        if sampling.num_beams > 1:
            raise EngineError("openai endpoints have no beam search; set sampling.num_beams to 1")
        start = time.perf_counter()
        n = sampling.num_samples
        keys = [key_of(self._body(request, sampling, n, 0), n) for request in requests]
        answers = {i: kept for i, key in enumerate(keys) if (kept := self._interrupted.take(key))}
        missing = [i for i in range(len(requests)) if i not in answers]
        alone = [i for i in missing if self._interrupted.is_suspect(keys[i])]
        together = [i for i in missing if i not in alone]
        try:
            if together:
                with self._turns.together():
                    self._ask(together, requests, keys, sampling, answers)
            for i in alone:
                with self._turns.alone():
                    self._ask([i], requests, keys, sampling, answers)
        finally:
            if len(answers) < len(requests):
                for i, answer in answers.items():
                    self._interrupted.keep(keys[i], answer)
        return _share_time([answers[i] for i in range(len(requests))], time.perf_counter() - start)

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
        """Close the connections; requests that wait are not asked. May be called again."""
        if self._endpoint.is_closed:
            return
        self._endpoint.end_calls()
        self._threads.shutdown()
        self._endpoint.close()

    def _ask(
        self,
        group: Sequence[int],
        requests: Sequence[Request],
        keys: Sequence[str],
        how: Sampling,
        answers: dict[int, list[Completion]],
    ) -> None:
        """Ask about some of the requests at a time; puts position → completions into `answers`.

        Raises:
            EngineRefusedError, EngineUnavailableError: some may be answered nevertheless.
        """
        halt = self._endpoint.begin()
        asked: dict[int, Future[list[Completion]]] = {}
        try:
            for i in group:
                asked[i] = self._threads.submit(self._answer, requests[i], how, halt)
        except RuntimeError:  # the threads are shut down: nothing is left to be waited for
            halt.check()
            raise
        wait(asked.values(), return_when=FIRST_EXCEPTION)
        begun = {i: future for i, future in asked.items() if not future.cancel()}
        wait(begun.values())
        for i, future in begun.items():
            error = future.exception()
            if error is None and future.result():
                answers[i] = future.result()
                self._interrupted.answered(keys[i])
            elif isinstance(error, RateLimitedError):
                continue
            elif isinstance(error, EngineUnavailableError):
                self._interrupted.met(keys[i], halt)
                if self._interrupted.is_to_blame(keys[i]):
                    self._interrupted.answered(keys[i])
                    message = f"the server went away each time that it was asked: {error}"
                    answers[i] = self._failed(requests[i], how.num_samples, message)
            elif error is not None and not isinstance(error, EngineError):
                raise error
        if any(i not in answers for i in group):
            halt.check()

    def _answer(self, request: Request, sampling: Sampling, halt: Halt) -> list[Completion]:
        """Return `num_samples` completions; each one's seconds are its share of the request's.

        None at all if the call has been ended before.
        """
        if halt.is_set:
            return []
        start = time.perf_counter()
        done: list[Completion] = []
        missing = sampling.num_samples
        try:
            while missing:
                # Greedy requests, and servers that ignore `n`, give one: ask again for the rest.
                body = self._body(request, sampling, missing, sample=len(done))
                done += self._read(self._endpoint.post(body, halt), request)[:missing]
                missing = sampling.num_samples - len(done)
        except RecordError as error:
            done += self._failed(request, missing, error.message, error.reason)
        share_s = (time.perf_counter() - start) / len(done)
        return [dataclasses.replace(completion, compute_s=share_s) for completion in done]

    def _failed(
        self, request: Request, count: int, message: str, reason: Reason = Reason.ENGINE_ERROR
    ) -> list[Completion]:
        estimate = tokenized_prompt(self, request).num_tokens
        return [_failure(reason, message, estimate, num_tokens=0)] * count

    def _body(self, request: Request, sampling: Sampling, n: int, sample: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": sampling.temperature,
            self._endpoint.limit: sampling.max_new_tokens,
        }
        if sampling.temperature > 0:
            seed = (request.seed + sample) & 0x7FFFFFFF  # some servers take 32 bits only
            body |= {"top_p": sampling.top_p, "seed": seed, "n": n}
        if sampling.top_k > 0:
            body["top_k"] = sampling.top_k
        if self._options.logprobs:
            body["logprobs"] = True
        return body | self._options.extra_body

    def _read(self, response: ChatCompletion, request: Request) -> list[Completion]:
        """Make completions of a response's choices.

        Raises:
            RecordError: it is not a chat completion. The library builds its objects from any
                JSON without a check, and hands other text through as it is.
        """
        try:
            usage = response.usage
            estimate = tokenized_prompt(self, request).num_tokens
            prompt_tokens = valid_count(usage.prompt_tokens) if usage else estimate
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
            message = self._endpoint.clean(why)
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


def _num_tokens(response: ChatCompletion) -> list[int] | list[None]:
    """Count each choice's tokens; None: the server's total makes no sense.

    The usage is a total over the choices: it is shared by their lengths, and adds up.
    """
    sizes = [_estimate(choice.message.content or "") for choice in response.choices]
    if response.usage is None:
        return sizes
    total, whole = valid_count(response.usage.completion_tokens), sum(sizes) or 1
    if total is None:
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
