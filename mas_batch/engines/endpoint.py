"""The endpoint that an `openai` agent asks: what a request meets, and who tries again.

A request that fails for a moment is tried `max_retries` times here. A server that is away for
longer (refused or lost connections, time-outs, 429, 502 to 504) is a matter of the router, or of
the pool: `EngineUnavailableError`.

Several threads ask at once, each for a call of its own. What one of them finds out of the server
ends all calls that are under way, and none that begins later: they share a `Halt`.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import re
import threading
from dataclasses import dataclass
from typing import Annotated, Any

import openai
from openai.types.chat import ChatCompletion
from pydantic import Field

from mas_batch.engines.options import EngineOptions
from mas_batch.engines.retrying import (
    AWAY,
    MAX_PAUSE_S,
    RATE_LIMITED,
    is_retried,
    pause_s,
    retry_after_s,
)
from mas_batch.errors import (
    EngineError,
    EngineRefusedError,
    EngineUnavailableError,
    JobError,
    Reason,
    RecordError,
)

OFFICIAL_URL = "https://api.openai.com/v1"
REFUSED = (401, 403, 404)
"""No key, no right, no such model: what fails one request fails all."""
MAX_MESSAGE_CHARS = 300
RATE_LIMITED_S = 15.0
"""What a 429 without a `Retry-After` is taken to ask for: limits are counted by the minute."""

_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|maximum (?:number of )?tokens|request too large", re.I
)


_MAX_PARTITIONS = 32
"""At once: each has a thread of the worker, and is put off when the server goes away."""


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
    """For one try of one request, from connecting to the last byte of the reply."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 4
    """Further tries at once after 408, 409, 429, 5xx and lost connections, with growing pauses of
    seconds. They are for a moment's trouble; a server that is away is waited for all the same."""
    wait_s: Annotated[float, Field(ge=0.0)] = 600.0
    """How long a run waits for a server that is away before it ends, to be resumed."""
    max_context_tokens: Annotated[int, Field(ge=1)] = 8192
    """Prompt plus completion, by estimate. What the server finds too long is reported so."""
    logprobs: bool = False
    """Ask for log-probabilities. Not every endpoint has them; most leave the end token out."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Merged over the body of every request."""

    @property
    def partitions_at_once(self) -> int:
        """Enough that `concurrency` requests are under way, though each has but four left.

        One's answers are being committed and one's texts are being read meanwhile.
        """
        return min(_MAX_PARTITIONS, 2 + self.concurrency // 4)

    def check_environment(self) -> None:
        """Find the key, where one is wanted."""
        wanted = self.base_url == OFFICIAL_URL or "api_key_env" in self.model_fields_set
        if wanted and not os.environ.get(self.api_key_env):
            raise JobError(
                f"the environment variable {self.api_key_env} is not set where the agent runs",
                key="agents.options.api_key_env",
            )


class RateLimitedError(EngineUnavailableError):
    """How much the server is asked is limited; which request is refused tells nothing of it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A request's reply that is none."""

    status: int
    """HTTP status; 0: the connection was refused or lost, or the time was over."""
    message: str
    retry_after_s: float = 0.0
    timed_out: bool = False

    @property
    def is_brief(self) -> bool:
        """Whether the next try, moments later, may end otherwise."""
        return is_retried(self.status) or (self.status == 0 and not self.timed_out)

    @property
    def is_away(self) -> bool:
        """Whether it says that the server is away."""
        return self.status == 0 or self.status in AWAY

    @property
    def is_servers(self) -> bool:
        """Whether it may be the server's fault rather than the request's."""
        return self.is_away or self.status >= 500


class Halt:
    """Why none of the calls that are under way sends anything further; unset until there is why."""

    def __init__(self) -> None:
        self._is_set = threading.Event()
        self._error: EngineError | None = None

    @property
    def is_set(self) -> bool:
        """Whether the calls are to end."""
        return self._is_set.is_set()

    def set(self, error: EngineError) -> None:
        """End the calls; the first error stays."""
        self._error = self._error or error
        self._is_set.set()

    def wait(self, seconds: float) -> bool:
        """Wait, but not after it is set; returns whether it is."""
        return self._is_set.wait(seconds)

    def check(self) -> None:
        """Raise the error if there is one, for each call its own: it will carry a traceback."""
        if self._error is not None:
            raise copy.copy(self._error)


class Endpoint:
    """One model behind an endpoint, asked by several threads.

    Args:
        key: goes nowhere but into the requests; None: the endpoint wants none.
    """

    def __init__(self, options: Options, model: str, key: str | None) -> None:
        self.url = options.base_url
        self._lock = threading.Lock()
        self._halt = Halt()
        self._is_away = False
        """The server was away when it was asked last."""
        self._knocking = threading.Lock()
        self._num_knocks = 0
        self._last_knock: Fault | None = None
        self.is_closed = False
        """No call can begin any more."""
        self._options = options
        self._model = model
        self._key = key
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # the library insists on one
            base_url=options.base_url,
            timeout=None,  # `_reply` has one for the whole request
            max_retries=0,  # `post` tries again: it knows what the batch's other requests met
        )
        # The library's own time-out is of each read: a reply that drips would go on for ever.
        # Only a task of an event loop can be ended at any moment.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="openai-loop", daemon=True
        )
        self._thread.start()

    @property
    def limit(self) -> str:
        """Name of the most new tokens in a request's body."""
        # The official endpoint has renamed it; the servers that imitate it know the old name.
        return "max_completion_tokens" if self.url == OFFICIAL_URL else "max_tokens"

    def begin(self) -> Halt:
        """Begin a call; returns what ends it together with all others that are under way.

        After the server was away something small is asked first, so that no record's request meets
        that.

        Raises:
            EngineUnavailableError: it still is, or the endpoint is closed.
        """
        while True:
            with self._lock:
                if self.is_closed:
                    raise self._closing()
                if not self._is_away:
                    if self._halt.is_set:  # a passing fault deserves another try
                        self._halt = Halt()
                    return self._halt
            if fault := self._knock():
                raise self._unavailable(fault)

    def end_calls(self) -> None:
        """End all calls that are under way, for good: none can begin any more."""
        with self._lock:
            self.is_closed = True
            self._halt.set(self._closing())

    def close(self) -> None:
        """Close the connections, after `end_calls`; no request may be under way."""
        with self._knocking:  # a call that was about to begin may be asking
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def post(self, body: dict[str, Any], halt: Halt) -> ChatCompletion:
        """Send one request of a call, and send it again after a moment's trouble.

        Raises:
            EngineRefusedError: no request to this endpoint can succeed.
            EngineUnavailableError: the server is away, for longer than a moment.
            RecordError: this one did not.
        """
        for attempt in itertools.count():
            reply = self._send(body)
            if not isinstance(reply, Fault):
                return reply
            pause = pause_s(attempt, reply.retry_after_s)
            last = attempt >= self._options.max_retries or pause > MAX_PAUSE_S
            if last or not reply.is_brief or halt.wait(pause):
                break
        # The other requests would be refused as well, and hundreds of calls with a wrong key are
        # what gets accounts locked.
        if reply.status in REFUSED:
            raise self._end(halt, EngineRefusedError(reply.message))
        too_long = reply.status in (400, 413, 429) and _TOO_LONG.search(reply.message)
        if reply.is_away and not too_long:
            raise self._end(halt, self._unavailable(reply))
        if reply.status >= 500:  # an error inside the server: is it this request's?
            other = self._send(self._small_body())
            if isinstance(other, Fault) and other.is_servers:
                raise self._end(halt, self._unavailable(other))
        raise RecordError(Reason.TOO_LONG if too_long else Reason.ENGINE_ERROR, reply.message)

    def _knock(self) -> Fault | None:
        """Ask whether the server is back; returns why it is not.

        Who comes while another thread asks takes its reply.

        Raises:
            EngineUnavailableError: the endpoint is closed.
        """
        number = self._num_knocks
        with self._knocking:
            if self.is_closed:
                raise self._closing()
            if self._num_knocks == number:
                reply = self._send(self._small_body())
                fault = reply if isinstance(reply, Fault) and reply.is_servers else None
                self._last_knock, self._is_away = fault, fault is not None
                self._num_knocks += 1
            return self._last_knock

    def _end(self, halt: Halt, error: EngineError) -> EngineError:
        """End the calls that are under way; returns the error, to be raised."""
        with self._lock:
            self._is_away |= isinstance(error, EngineUnavailableError)
            halt.set(error)
        return error

    def _closing(self) -> EngineUnavailableError:
        return EngineUnavailableError(f"{self.url}: the engine is being closed")

    def _unavailable(self, fault: Fault) -> EngineUnavailableError:
        after_s, wait_s = fault.retry_after_s, self._options.wait_s
        if fault.status not in RATE_LIMITED:
            return EngineUnavailableError(fault.message, retry_after_s=after_s, wait_s=wait_s)
        after_s = after_s or RATE_LIMITED_S
        return RateLimitedError(fault.message, retry_after_s=after_s, wait_s=wait_s)

    def _send(self, body: dict[str, Any]) -> ChatCompletion | Fault:
        """Send one request once.

        Faults are returned: an exception raised here would carry the response along.
        """
        try:
            return asyncio.run_coroutine_threadsafe(self._reply(body), self._loop).result()
        except TimeoutError:
            limit = f"{self._options.timeout_s:g} s (options.timeout_s)"
            return Fault(0, f"{self.url}: no whole reply within {limit}", timed_out=True)
        except openai.APIStatusError as error:
            after_s = retry_after_s(error.response.headers)
            return Fault(error.status_code, self._tell(error), after_s)
        except openai.APIConnectionError as error:
            return Fault(0, self._tell(error))
        except (openai.APIError, ValueError) as error:  # ValueError: a reply that is not JSON
            return Fault(200, self._tell(error))

    async def _reply(self, body: dict[str, Any]) -> ChatCompletion:
        async with asyncio.timeout(self._options.timeout_s):
            return await self._client.post("/chat/completions", body=body, cast_to=ChatCompletion)

    def _tell(self, error: Exception) -> str:
        """Put an error in words."""
        return self.clean(f"{self.url}: {type(error).__name__}: {error}")

    def clean(self, message: str) -> str:
        """Take the key out of what a server says, and bound it."""
        if self._key:
            message = message.replace(self._key, "[key]")
        return message[:MAX_MESSAGE_CHARS]

    def _small_body(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Hello"}]
        body = {"model": self._model, "messages": messages, self.limit: 1}
        return body | self._options.extra_body
