"""The openai engine against a real HTTP server that speaks the protocol, well and badly."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mas_batch.engines import load_engine
from mas_batch.engines.base import Completion, Engine, EngineConfig, Message, Request, Sampling
from mas_batch.engines.batching import complete
from mas_batch.engines.claims import MAX_CHARS_PER_TOKEN
from mas_batch.engines.interrupted import Interrupted
from mas_batch.engines.loop import EngineLoop
from mas_batch.errors import (
    EngineError,
    EngineRefusedError,
    EngineUnavailableError,
    JobError,
    Reason,
)
from mas_batch.models import fetch
from tests.waiting import wait_until

CANARY = "sk-canary-4711-never-to-be-seen"
GREEDY = Sampling(max_new_tokens=16)
SAMPLED = Sampling(max_new_tokens=16, temperature=0.7, top_p=0.9, num_samples=3)


class Server(ThreadingHTTPServer):
    """Answers in capitals; the words of a text decide how it fails."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.tries: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.fault: Callable[[str], tuple[int, dict[str, str]] | None] = lambda text: None
        """Text → status and headers of the server's own trouble; status 0: the connection ends."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            self.server.tries[text] += 1
            attempt = self.server.tries[text]
        fault = self.server.fault(text)
        if fault is not None and fault[0] == 0:
            self.close_connection = True
            return
        status, reply = (fault[0], {}) if fault else self.reply_to(text, attempt, body)
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        kind = "text/html" if content.startswith(b"<") else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (fault[1] if fault else {"Retry-After-Ms": "1"}).items():
            self.send_header(name, value)
        if text.startswith("drip header"):
            self.flush_headers()
            self.drip(b"X: " + b"y" * 10**6)
        self.end_headers()
        if text.startswith("drip body"):
            self.drip(content[:1] + b" " * 10**6)
        self.wfile.write(content)

    def drip(self, content: bytes) -> None:
        """Send a byte now and then, until the client has had enough."""
        with suppress(OSError):
            for byte in content:
                self.connection.sendall(bytes([byte]))
                time.sleep(0.02)
        self.close_connection = True

    def reply_to(self, text: str, attempt: int, body: dict[str, Any]) -> tuple[int, Any]:
        if self.path != "/v1/chat/completions":
            return 500, {"error": {"message": f"unexpected path {self.path}"}}
        word = text.split()[0]
        if word == "busy":
            return (429, {"error": {"message": "slow down"}}) if attempt < 3 else (200, whole(body))
        if word.isdecimal():
            quoted = f"you sent {self.headers['Authorization']} and {text}"
            return int(word), {"error": {"message": quoted, "code": None}}
        if word == "long":
            message = "This model's maximum context length is 8 tokens"
            return 400, {"error": {"message": message, "code": "context_length_exceeded"}}
        if word == "claims":  # counts as the rest of the text says
            prompt, completion = json.loads(text.removeprefix("claims "))
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
            return 200, whole(body) | {"usage": usage}
        return 200, BAD_REPLIES.get(word) or whole(body)

    def log_message(self, *args: Any) -> None:
        """Keep the test's output clean."""


BAD_REPLIES: dict[str, Any] = {
    "html": b"<html>welcome</html>",
    "broken": b'{"choices": [',
    "list": [1, 2],
    "nothing": {"choices": []},
    "strange": {"choices": [{"text": "old protocol"}]},
    "filtered": {
        "choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "content_filter"}]
    },
    "refused": {
        "choices": [{"message": {"content": None, "refusal": "no way"}, "finish_reason": "stop"}]
    },
    "silent": {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
    "uncounted": {"choices": [{"message": {"content": "123456789"}, "finish_reason": "stop"}]},
    "single": {"choices": [{"message": {"content": "ONE"}, "finish_reason": "stop"}]},
    "echoed": {
        "choices": [
            {"message": {"content": None, "refusal": f"not with {CANARY}"}, "finish_reason": "stop"}
        ]
    },
    "surrogate": {"choices": [{"message": {"content": "a \ud800 b"}, "finish_reason": "stop"}]},
    "endless": {"choices": [{"message": {"content": "x " * 10**6}, "finish_reason": "stop"}]},
    "several": {"choices": [{"message": {"content": "1"}}, {"message": {"content": "2"}}]},
}


def whole(body: dict[str, Any]) -> dict[str, Any]:
    """A good reply; choice i has i exclamation marks and every word is a token."""
    words = body["messages"][-1]["content"].upper().split()
    limit = body.get("max_tokens", 1000)
    choices = []
    for i in range(body.get("n", 1)):
        choice: dict[str, Any] = {
            "index": i,
            "message": {"role": "assistant", "content": " ".join(words[:limit]) + "!" * i},
            "finish_reason": "length" if len(words) > limit else "stop",
        }
        if body.get("logprobs"):
            tokens = [{"token": w, "logprob": -0.5, "top_logprobs": []} for w in words[:limit]]
            choice["logprobs"] = {"content": tokens}
        choices.append(choice)
    num_tokens = len(words[:limit]) * len(choices)
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": choices,
        "usage": {"prompt_tokens": 11, "completion_tokens": num_tokens, "total_tokens": 0},
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=[0.01])
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def load(server: Server) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def load(**options: Any) -> Engine:
        config = EngineConfig(options={"base_url": server.url, "max_retries": 2, **options})
        engines.append(load_engine("auto", fetch("openai:some/model:tag"), config))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def request(text: str, seed: int = 0) -> Request:
    return Request(text, text, (Message("system", "be brief"), Message("user", text)), seed)


def test_a_greedy_request_and_its_completion(server, load):
    ((completion,),) = load().generate([request("how are you")], GREEDY)
    assert server.bodies == [
        {
            "model": "some/model:tag",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "how are you"},
            ],
            "temperature": 0.0,
            "max_tokens": 16,
        }
    ]
    assert server.keys == {f"Bearer {CANARY}"}
    assert (completion.text, completion.finish_reason) == ("HOW ARE YOU", "stop")
    assert (completion.prompt_tokens, completion.num_tokens) == (11, 3)
    assert (completion.sum_logprob, completion.token_ids) == (None, ())


def test_completions_are_in_the_requests_order_and_cut_ones_say_so(load):
    rows = load(concurrency=3).generate(
        [request(f"number {i} " + "word " * i) for i in range(20)], GREEDY
    )
    assert [row[0].text.split()[1] for row in rows] == [str(i) for i in range(20)]
    assert [row[0].finish_reason for row in rows] == ["stop"] * 15 + ["length"] * 5


def test_samples_come_in_one_call_and_their_tokens_add_up(server, load):
    (row,) = load().generate([request("one two", seed=2**62 + 5)], SAMPLED)
    (body,) = server.bodies
    assert (body["n"], body["temperature"], body["top_p"], body["seed"]) == (3, 0.7, 0.9, 5)
    assert [c.text for c in row] == ["ONE TWO", "ONE TWO!", "ONE TWO!!"]
    assert sum(c.num_tokens for c in row) == 6
    assert all(c.prompt_tokens == 11 for c in row)


def test_a_server_that_ignores_n_is_asked_for_the_rest(server, load):
    (row,) = load().generate([request("single")], SAMPLED)
    assert [c.text for c in row] == ["ONE"] * 3
    assert [body["n"] for body in server.bodies] == [3, 2, 1]
    assert [body["seed"] for body in server.bodies] == [0, 1, 2]


def test_completions_that_were_not_asked_for_are_left_out(load):
    (row,) = load().generate([request("several")], GREEDY)
    assert [c.text for c in row] == ["1"]


def test_greedy_samples_are_several_calls(server, load):
    (row,) = load().generate([request("one")], replace(GREEDY, num_samples=2))
    assert [c.text for c in row] == ["ONE", "ONE"]
    assert all("n" not in body for body in server.bodies)


def test_logprobs_only_on_request(server, load):
    ((completion,),) = load(logprobs=True).generate([request("one two three")], GREEDY)
    assert completion.sum_logprob == -1.5
    assert server.bodies[0]["logprobs"] is True


def test_extra_body_wins_and_top_k_is_passed_on(server, load):
    engine = load(extra_body={"temperature": 1, "reasoning_effort": "low"})
    engine.generate([request("one")], replace(SAMPLED, top_k=7))
    (body,) = server.bodies
    assert (body["temperature"], body["reasoning_effort"], body["top_k"]) == (1, "low", 7)


def test_beam_search_is_refused(load):
    with pytest.raises(EngineError, match="num_beams"):
        load().generate([request("one")], replace(GREEDY, num_beams=2))


def test_token_counts_are_estimated_where_the_server_does_not_count(load):
    engine = load()
    assert engine.tokenize(request("ab")).num_tokens == 2 + 1 + 2 * 4
    assert engine.tokenize(request("語" * 8)).num_tokens == 2 + 6 + 2 * 4
    ((completion,),) = engine.generate([request("uncounted")], GREEDY)
    assert completion.num_tokens == 3
    assert completion.prompt_tokens == engine.tokenize(request("uncounted")).num_tokens


def test_time_is_that_which_passed(load):
    rows = load().generate([request(f"number {i}") for i in range(8)], SAMPLED)
    assert all(completion.compute_s > 0 for row in rows for completion in row)


# --- Failures


def test_a_busy_server_is_asked_again(server, load):
    ((completion,),) = load().generate([request("busy now")], GREEDY)
    assert completion.text == "BUSY NOW"
    assert server.tries["busy now"] == 3


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("500 oops", Reason.ENGINE_ERROR, "InternalServerError: Error code: 500"),
        ("400 wrong", Reason.ENGINE_ERROR, "BadRequestError: Error code: 400"),
        ("429 Request too large: 9 tokens", Reason.TOO_LONG, "RateLimitError"),
        ("long text", Reason.TOO_LONG, "maximum context length is 8 tokens"),
        ("html", Reason.ENGINE_ERROR, "no chat completion"),
        ("broken", Reason.ENGINE_ERROR, "JSONDecodeError"),
        ("list", Reason.ENGINE_ERROR, "no chat completion"),
        ("nothing", Reason.ENGINE_ERROR, "no chat completion"),
        ("strange", Reason.ENGINE_ERROR, "no chat completion"),
        ("filtered", Reason.ENGINE_ERROR, "content filter"),
        ("refused", Reason.ENGINE_ERROR, "the model refused: no way"),
    ],
)
def test_one_request_fails_and_its_neighbours_are_answered(load, text, reason, words):
    before, failed, after = load().generate([request(t) for t in ("a", text, "b")], GREEDY)
    assert [before[0].text, after[0].text] == ["A", "B"]
    (completion,) = failed
    assert (completion.reason, completion.finish_reason) == (reason, "error")
    assert words in completion.message
    assert completion.text == ""


def test_every_sample_of_a_failed_request_fails(load):
    (row,) = load().generate([request("500 oops")], SAMPLED)
    assert [c.reason for c in row] == [Reason.ENGINE_ERROR] * 3


def test_an_empty_reply_is_left_to_the_parser(load):
    ((completion,),) = load().generate([request("silent")], GREEDY)
    assert (completion.text, completion.reason) == ("", None)


def test_a_server_that_is_not_there(load):
    engine = load(base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(EngineUnavailableError, match=r"http://127.0.0.1:9/v1: APIConnectionError"):
        engine.generate([request("a")], GREEDY)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_stops_everything_at_once(server, load, status):
    engine = load(concurrency=1)
    asked = [request(f"{status} no"), *(request(f"text {i}") for i in range(50))]
    with pytest.raises(EngineError, match=f"Error code: {status}"):
        engine.generate(asked, GREEDY)
    assert len(server.bodies) == 1
    with pytest.raises(EngineError, match=f"Error code: {status}"):
        engine.generate([request(f"{status} again")], GREEDY)
    assert len(server.bodies) == 2, "the next batch asks again"


def test_batching_does_not_halve_what_is_refused(server, load):
    with pytest.raises(EngineRefusedError):
        complete(load(concurrency=1), [request(f"401 {i}") for i in range(64)], GREEDY)
    assert len(server.bodies) == 1


# --- A server that is away


@pytest.mark.parametrize(
    ("status", "headers", "after_s"),
    [
        (0, {}, 0),
        (503, {}, 0),
        (502, {"Retry-After": "7"}, 7),
        (429, {}, 15),
        (429, {"Retry-After": "86400"}, 86400),
        (429, {"Retry-After": "Fri, 01 Jan 1999 00:00:00 GMT"}, 15),
        (429, {"Retry-After-Ms": "90000", "Retry-After": "1"}, 90),
        (503, {"Retry-After": "soon"}, 0),
        (504, {"Retry-After": "nan"}, 0),
    ],
)
def test_a_server_that_is_away_is_no_records_fault(server, load, status, headers, after_s):
    server.fault = lambda text: (status, headers)
    with pytest.raises(EngineUnavailableError, match=server.url) as caught:
        load(max_retries=0, wait_s=5.0).generate([request("a")], GREEDY)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.retry_after_s, error.wait_s) == (after_s, 5.0)
    assert str(error) == str(caught.value)


def test_a_long_retry_after_is_not_slept_through(server, load):
    server.fault = lambda text: (429, {"Retry-After": "86400"})
    with pytest.raises(EngineUnavailableError):
        load(max_retries=9).generate([request("a")], GREEDY)
    assert server.tries["a"] == 1


def test_what_was_answered_before_the_server_went_away_is_not_asked_again(server, load):
    engine, texts = load(max_retries=0, concurrency=2), [f"text {i}" for i in range(12)]
    answered: Counter[str] = Counter()

    def falls(text: str) -> tuple[int, dict[str, str]] | None:
        if answered.total() >= 5:
            return 0, {}
        answered[text] += 1
        return None

    server.fault = falls
    with pytest.raises(EngineUnavailableError):
        engine.generate([request(t) for t in texts], GREEDY)
    for _ in range(3):
        with pytest.raises(EngineUnavailableError):
            engine.generate([request(t) for t in texts], GREEDY)
    assert server.tries["Hello"] == 3, "one small request finds out whether it is back"
    before = Counter(server.tries)
    server.fault = lambda text: None
    rows = complete(engine, [request(t) for t in texts], GREEDY)
    assert [row[0].text for row in rows] == [t.upper() for t in texts]
    assert all(server.tries[t] == before[t] + (t not in answered) for t in texts)
    assert all(row[0].compute_s > 0 for row in rows)


def test_a_request_that_always_fells_the_server_fails_alone(server, load):
    engine, texts = load(max_retries=0, concurrency=4), ["a", "b", "poison", "c", "d"]
    server.fault = lambda text: (0, {}) if text == "poison" else None
    rows, num_interruptions = None, 0
    while rows is None:
        try:
            rows = complete(engine, [request(t) for t in texts], GREEDY)
        except EngineUnavailableError:
            num_interruptions += 1
    assert num_interruptions == 3
    assert server.tries["poison"] == 4
    assert [row[0].text for row in rows] == ["A", "B", "", "C", "D"]
    assert rows[2][0].reason is Reason.ENGINE_ERROR
    assert "went away each time that it was asked" in rows[2][0].message


def test_a_rate_limit_is_no_requests_fault_however_often_it_is_met(server, load):
    engine = load(max_retries=0, concurrency=4)
    server.fault = lambda text: (429, {}) if text == "large" else None
    for _ in range(9):
        with pytest.raises(EngineUnavailableError):
            complete(engine, [request("a"), request("large")], GREEDY)
    server.fault = lambda text: None
    rows = complete(engine, [request("a"), request("large")], GREEDY)
    assert [row[0].text for row in rows] == ["A", "LARGE"]
    assert server.tries["a"] == 1


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_reply_that_drips_is_ended_in_time(load, part):
    engine = load(timeout_s=0.2)
    with pytest.raises(EngineUnavailableError, match=r"no whole reply within 0\.2 s"):
        engine.generate([request(f"drip {part}")], GREEDY)


def test_a_request_without_a_reply_in_time_is_waited_for_and_not_sent_again_at_once(server, load):
    release = threading.Event()

    def hangs(text: str) -> tuple[int, dict[str, str]]:
        release.wait()
        return 0, {}

    server.fault = hangs
    engine = load(max_retries=4, timeout_s=0.05)
    with pytest.raises(EngineUnavailableError, match="no whole reply within"):
        engine.generate([request("a")], GREEDY)
    release.set()
    assert server.tries["a"] == 1


def test_an_error_inside_a_server_is_the_records_only_if_others_are_answered(server, load):
    engine = load(max_retries=0)
    server.fault = lambda text: (500, {}) if text == "bad" else None
    good, bad = engine.generate([request("good"), request("bad")], GREEDY)
    assert (good[0].reason, bad[0].reason) == (None, Reason.ENGINE_ERROR)
    server.fault = lambda text: (500, {})
    with pytest.raises(EngineUnavailableError, match="500"):
        engine.generate([request("good"), request("bad")], GREEDY)


# --- Several partitions at once


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make the calls in a thread each; returns what each returned, or raised."""
    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def test_calls_at_once_share_one_bound(server, load):
    under_way, most, full = set[str](), 0, threading.Event()

    def held(text: str) -> None:
        nonlocal most
        with server.lock:
            under_way.add(text)
            most = max(most, len(under_way))
        if len(under_way) >= 3:
            full.set()
        full.wait()
        with server.lock:
            under_way.remove(text)

    server.fault = held
    engine, texts = load(concurrency=3), [f"text {i}" for i in range(24)]
    calls = [partial(engine.generate, [request(t) for t in texts[i::3]], GREEDY) for i in range(3)]
    for i, rows in enumerate(at_once(*calls)):
        assert [row[0].text for row in rows] == [t.upper() for t in texts[i::3]]
    assert most == 3
    assert engine.threadsafe
    assert (load(concurrency=1).concurrent, load(concurrency=8).concurrent) == (2, 4)


def test_a_server_that_goes_away_halts_all_calls_and_no_answer_is_lost(server, load):
    engine, away, answered = (
        load(max_retries=0, concurrency=2),
        threading.Event(),
        threading.Event(),
    )
    first = ["falls", "same", "a", "b"]
    second = ["same", "c", "waits", "d"]

    def falls(text: str) -> tuple[int, dict[str, str]] | None:
        if text == "falls":
            answered.wait()
            away.set()
        elif text == "waits":
            answered.set()
            away.wait()
        return (0, {}) if away.is_set() else None

    server.fault = falls
    one = partial(complete, engine, [request(t) for t in first], GREEDY)
    other = partial(complete, engine, [request(t) for t in second], GREEDY)
    with ThreadPoolExecutor(2) as threads:
        earlier = threads.submit(one)
        wait_until(lambda: server.tries["b"])  # it is the first in the queue of requests
        later = threads.submit(other)
        errors = [earlier.exception(), later.exception()]
    assert [type(error) for error in errors] == [EngineUnavailableError] * 2
    assert errors[0] is not errors[1]
    server.fault = lambda text: None
    rows = at_once(one, other)
    assert [[row[0].text for row in each] for each in rows] == [
        [t.upper() for t in first],
        [t.upper() for t in second],
    ]
    asked = {t: server.tries[t] for t in {*first, *second}}
    assert asked == {"falls": 2, "waits": 2, "same": 2, "a": 1, "b": 1, "c": 1, "d": 1}


def test_who_is_asked_alone_is_alone_among_all_calls(server, load):
    """Else it would be blamed for what another call's request does to the server."""
    engine, fallen = load(max_retries=0), threading.Event()

    def falls(text: str) -> tuple[int, dict[str, str]] | None:
        if text == "poison":
            fallen.set()
        if text == "slow":
            fallen.wait(0.3)
        return (0, {}) if fallen.is_set() and text in ("poison", "slow") else None

    server.fault = falls
    left = {text: partial(complete, engine, [request(text)], GREEDY) for text in ("slow", "poison")}
    rows: dict[str, Any] = {}
    while left:
        fallen.clear()
        for text, outcome in zip(list(left), at_once(*left.values()), strict=True):
            if not isinstance(outcome, EngineUnavailableError):
                rows[text] = outcome[0][0]
                del left[text]
    assert (rows["slow"].text, rows["slow"].reason) == ("SLOW", None)
    assert rows["poison"].reason is Reason.ENGINE_ERROR
    assert server.tries["poison"] == 4


def test_what_is_remembered_of_equal_requests() -> None:
    kept, once, again = Interrupted(), object(), object()
    for interruption in (once, once, again):
        assert not kept.is_suspect("key")
        kept.met("key", interruption)
    assert kept.is_suspect("key"), "it met two interruptions, one of them twice"
    first, second = [[Completion(text, (), None, 1, "stop", 1)] for text in "ab"]
    kept.keep("key", first)
    kept.keep("key", second)
    assert [kept.take("key") for _ in range(3)] == [second, first, None]
    assert not kept.is_suspect("key")


def test_closing_the_loop_asks_nothing_further(server, load):
    release, engine = threading.Event(), load(concurrency=1)
    server.fault = lambda text: release.wait() and None
    loop = EngineLoop(lambda: engine)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(loop.complete, [request("a"), request("b")], GREEDY)
        try:
            wait_until(lambda: server.tries["a"])
            loop.close()
            wait_until(lambda: engine._endpoint.is_closed)
        finally:
            release.set()
        assert isinstance(asked.exception(), EngineUnavailableError)
    assert server.tries["b"] == 0


def test_closing_ends_the_calls_that_are_under_way(server, load):
    release, engine = threading.Event(), load(concurrency=1)
    server.fault = lambda text: release.wait() and None
    call = partial(complete, engine, [request("a"), request("b")], GREEDY)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(call)
        wait_until(lambda: server.tries["a"])
        closing = threads.submit(engine.close)
        wait_until(lambda: engine._endpoint.is_closed)
        release.set()
        closing.result()
        assert isinstance(asked.exception(), EngineUnavailableError)
    with pytest.raises(EngineUnavailableError, match="is being closed"):
        call()
    assert server.tries["b"] == 0


# --- What a server claims


@pytest.mark.parametrize(
    ("claimed", "kept"),
    [
        ("[1099511627776, 2]", (None, 2)),
        ("[7, 1099511627776]", (7, None)),
        ("[-1, -2]", (None, None)),
        ('["7", null]', (None, None)),
        ("[7.5, 2]", (None, 2)),
    ],
)
def test_a_count_that_makes_no_sense_is_null_and_the_answer_counts(server, load, claimed, kept):
    texts = ("a", f"claims {claimed}", "b")
    rows = complete(load(), [request(text) for text in texts], GREEDY)
    assert [row[0].text for row in rows] == [text.upper() for text in texts]
    assert (rows[1][0].prompt_tokens, rows[1][0].num_tokens) == kept
    assert len(server.bodies) == 3, "each is asked once"


def test_a_reply_that_is_no_unicode_fails_alone_and_its_batch_mates_are_not_asked_again(
    server, load
):
    rows = complete(load(), [request(text) for text in ("a", "surrogate", "b")], GREEDY)
    assert [row[0].text for row in rows] == ["A", "", "B"]
    assert rows[1][0].reason is Reason.ENGINE_ERROR
    assert "lone surrogate, U+D800" in rows[1][0].message
    assert len(server.bodies) == 3


def test_a_reply_without_end_is_cut(load):
    ((completion,),) = complete(load(), [request("endless")], GREEDY)
    assert len(completion.text) == MAX_CHARS_PER_TOKEN * GREEDY.max_new_tokens
    assert completion.finish_reason == "length"


# --- The key


def test_a_key_that_a_refusal_quotes_is_taken_out(load):
    ((completion,),) = load().generate([request("echoed")], GREEDY)
    assert completion.message == "the model refused: not with [key]"


def test_the_key_is_nowhere_to_be_seen(server, load, caplog):
    caplog.set_level(logging.DEBUG)
    engine = load(max_retries=0)
    rows = engine.generate([request("500 oops"), request("fine")], GREEDY)
    assert "[key]" in rows[0][0].message
    with pytest.raises(EngineError) as caught:
        engine.generate([request("401 no")], GREEDY)
    assert "[key]" in str(caught.value)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    seen = [repr(engine), repr(engine.describe()), repr(rows), repr(error), caplog.text]
    seen += traceback.format_exception(error)
    assert not [text for text in seen if CANARY in text]
    assert "POST" in caplog.text


def test_a_missing_key_is_named(monkeypatch, load):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JobError, match="OTHER_KEY is not set") as caught:
        load(api_key_env="OTHER_KEY")
    assert caught.value.key == "agents.options.api_key_env"
    with pytest.raises(JobError, match="OPENAI_API_KEY is not set"):
        load(base_url="https://api.openai.com/v1")


def test_the_official_endpoint_is_the_default(monkeypatch):
    monkeypatch.setenv("MY_KEY", CANARY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/elsewhere")
    config = EngineConfig(options={"api_key_env": "MY_KEY"})
    engine = load_engine("openai", fetch("openai:m"), config)
    assert engine.describe()["base_url"] == "https://api.openai.com/v1"
    engine.close()


def test_a_server_of_ones_own_needs_no_key(monkeypatch, server, load):
    monkeypatch.delenv("OPENAI_API_KEY")
    ((completion,),) = load().generate([request("none 400")], GREEDY)
    assert completion.text == "NONE 400"
    assert CANARY not in str(server.keys)


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        (
            {"api_key": CANARY},
            "api_key",
            "unknown option; the engine openai allows: base_url, api_key_env",
        ),
        ({"api_key_env": CANARY}, "api_key_env", "is not allowed: string should match"),
        ({"base_url": f"ftp://{CANARY}"}, "base_url", "is not allowed: string should match"),
        ({"base_url": f"http://u:{CANARY}@h/v1"}, "base_url", "is not allowed: string should"),
        ({"base_url": f"http://h/v1?key={CANARY}"}, "base_url", "is not allowed: string should"),
        ({"concurrency": 0}, "concurrency", "greater than or equal to 1"),
    ],
)
def test_wrong_options_are_refused_without_showing_them(load, options, key, words):
    with pytest.raises(JobError, match=words) as caught:
        load(**options)
    assert caught.value.key == f"agents.options.{key}"
    shown = "".join(traceback.format_exception(caught.value))
    assert CANARY not in shown + repr(caught.value)


def test_describe(server, load):
    facts = load(max_context_tokens=100).describe()
    assert facts["engine"] == "openai"
    assert facts["model"] == "some/model:tag"
    assert facts["base_url"] == server.url
    assert facts["max_context_tokens"] == 100
