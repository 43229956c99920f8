"""The echo engine: pure replies, honest counts, faults that are real."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import pytest

from mas_batch.engines import echo, load_engine
from mas_batch.engines.base import Engine, EngineConfig, Message, Request, Sampling
from mas_batch.engines.batching import complete
from mas_batch.errors import (
    EngineError,
    EngineRefusedError,
    JobError,
    ModelError,
    OutOfMemoryError,
    Reason,
)
from mas_batch.models import fetch

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(max_new_tokens=5)
SAMPLED = Sampling(max_new_tokens=5, temperature=1.0, num_samples=4)
TEXTS = [f"record number {i} has this text" for i in range(400)]


def load(source: str = "echo", **options: Any) -> Engine:
    config = EngineConfig(max_batch_tokens=100, options=options)
    return load_engine("auto", fetch(source), config)


def request(text: str, seed: int = 0) -> Request:
    return Request(f"id of {text}", text, (Message("user", f"say: {text}"),), seed)


def replies(engine: Engine, texts: list[str], sampling: Sampling = GREEDY) -> list[list[str]]:
    rows = engine.generate([request(text) for text in texts], sampling)
    return [[completion.text for completion in row] for row in rows]


def test_echoes_the_first_words_and_counts_them():
    ((completion,),) = load().generate([request("a b  c d e f")], GREEDY)
    assert (completion.text, completion.finish_reason) == ("a b c d e", "length")
    assert (completion.num_tokens, len(completion.token_ids)) == (5, 5)
    assert completion.prompt_tokens == load().tokenize(request("a b  c d e f")).num_tokens == 7
    assert completion.sum_logprob is None
    assert completion.reason is None


def test_a_text_that_is_short_enough_is_echoed_as_it_is():
    ((completion,),) = load().generate([request("a\n\nb  c")], GREEDY)
    assert (completion.text, completion.finish_reason) == ("a\n\nb  c", "stop")


def test_words_end_a_reply_before_max_new_tokens_cuts_it():
    (three,) = load(words=3).generate([request("a b c d e f g")], GREEDY)
    assert (three[0].text, three[0].finish_reason) == ("a b c", "stop")
    (five,) = load(words=6).generate([request("a b c d e f g")], GREEDY)
    assert (five[0].text, five[0].finish_reason) == ("a b c d e", "length")


def test_samples_differ_and_depend_on_nothing_else():
    (alone,) = replies(load(), ["a b c d e"], SAMPLED)
    assert len(set(alone)) > 1
    assert all(sorted(text.split()) == list("abcde") for text in alone)
    among_others = replies(load(), [*TEXTS[:7], "a b c d e", *TEXTS[7:]], SAMPLED)
    assert among_others[7] == alone
    (first_two,) = replies(load(), ["a b c d e"], replace(SAMPLED, num_samples=2))
    assert first_two == alone[:2]


@pytest.mark.parametrize(
    ("source", "seed"), [("echo:other", 0), ("echo", 1)], ids=["model", "seed"]
)
def test_samples_depend_on_model_and_seed(source, seed):
    asked = [request(text, seed) for text in TEXTS[:20]]
    other = [[c.text for c in row] for row in load(source).generate(asked, SAMPLED)]
    assert other != replies(load(), TEXTS[:20], SAMPLED)


def test_replies_are_the_same_in_another_process():
    code = (
        "from tests.test_engine_echo import *\n"
        "print(replies(load(error_rate=0.5), TEXTS[:9], SAMPLED))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=env, cwd=ROOT)
    assert printed.strip() == str(replies(load(error_rate=0.5), TEXTS[:9], SAMPLED))


def test_reply_template():
    assert replies(load(reply="It says {text} {x}"), ["so"]) == [["It says so {x}"]]


def test_labels_are_spread_and_agreed_on():
    labels = ["x", "y y", "z"]
    here = replies(load("echo:a", labels=labels), TEXTS)
    assert here == replies(load("echo:b", labels=labels), TEXTS)
    counts = [sum(row == [label] for row in here) for label in labels]
    assert sum(counts) == len(TEXTS)
    assert min(counts) > 80


def test_errors_are_as_frequent_as_asked_and_independent_between_models():
    right = replies(load(labels=["x", "y"]), TEXTS)
    wrong = {
        name: {i for i, row in enumerate(replies(engine, TEXTS)) if row != right[i]}
        for name in ("echo:a", "echo:b")
        for engine in [load(name, labels=["x", "y"], error_rate=0.3)]
    }
    assert all(85 < len(positions) < 155 for positions in wrong.values())  # 120 expected
    assert len(wrong["echo:a"] & wrong["echo:b"]) < 60  # 36 expected
    assert replies(load(error_rate=0.0), ["ab cd"]) == [["ab cd"]]
    assert replies(load(error_rate=1.0), ["ab cd"]) == [["ba dc"]]


def test_compute_time_is_measured_and_shared_by_length():
    engine = load(seconds_per_batch=0.02, seconds_per_token=0.002)
    (long,), (short,) = engine.generate([request("a b c d"), request("a b")], GREEDY)
    assert long.compute_s + short.compute_s >= 0.02 + 4 * 0.002
    assert long.compute_s == pytest.approx(2 * short.compute_s)


# --- Faults


@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        ("error", EngineError, Reason.ENGINE_ERROR),
        ("out_of_memory", OutOfMemoryError, Reason.OUT_OF_MEMORY),
    ],
)
def test_a_fault_fails_its_batch_and_batching_isolates_it(fault, error, reason):
    engine = load(faults={"number 3 ": fault})
    with pytest.raises(error, match="id of record number 3 has"):
        engine.generate([request(text) for text in TEXTS[:8]], GREEDY)
    rows = complete(engine, [request(text) for text in TEXTS[:8]], GREEDY)
    assert [row[0].reason for row in rows] == [reason if i == 3 else None for i in range(8)]


def test_unparsable():
    engine = load(faults={"b": "unparsable"}, labels=["x", "y"])
    assert replies(engine, ["a", "b"])[1] == ["???"]


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_kill_and_hang_are_real(fault):
    code = (
        "from tests.test_engine_echo import *\n"
        f"engine = load(faults={{'bad': {fault!r}}})\n"
        "print(replies(engine, ['good']), flush=True)\n"
        "replies(engine, ['good', 'bad'])\n"
        "print('survived', flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "[['good']]\n"
        if fault == "hang":
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=0.5)
            child.kill()
        assert child.stdout.read() == ""
        assert child.wait() == -signal.SIGKILL


@pytest.mark.faults
def test_allocate_is_real_and_ended_by_a_nanny(tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"faults": {"bad": "allocate"}, "allocate_bytes": 2 * 2**30}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit="640 MiB",
            dashboard_address="127.0.0.1:0",
            local_directory=str(tmp_path),
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        task = client.submit(_say, options, ["good", "bad"])
        with pytest.raises(distributed.KilledWorker):
            task.result()


def _say(options: dict[str, Any], texts: list[str]) -> list[list[str]]:
    return replies(load(**options), texts)


def test_allocate_fails_the_batch_where_nothing_limits_memory(monkeypatch):
    monkeypatch.setattr(echo, "_HOLD_S", 0.0)
    engine = load(faults={"bad": "allocate"}, allocate_bytes=100 * 2**20)
    with pytest.raises(EngineError, match=r"id of bad: nothing limited .* 104857600 bytes"):
        replies(engine, ["good", "bad"])
    assert replies(engine, ["good"]) == [["good"]]


def test_a_backend_that_breaks_in_the_middle_refuses_every_batch():
    engine = load(fail_after=2)
    assert [replies(engine, ["a"]) for _ in range(2)] == [[["a"]], [["a"]]]
    for _ in range(3):
        with pytest.raises(EngineRefusedError, match=r"echo: broken by options.fail_after = 2"):
            replies(engine, ["a"])
    with pytest.raises(EngineRefusedError):  # batching does not blame the records
        complete(engine, [request("a"), request("b")], GREEDY)


def test_a_backend_that_recovers_works_for_good():
    engine = load(fail_after=0, fail_for_s=0.05)
    with pytest.raises(EngineRefusedError):
        replies(engine, ["a"])
    while True:
        with suppress(EngineRefusedError):
            assert replies(engine, ["a"]) == [["a"]]
            break
    assert [replies(engine, ["a"]) for _ in range(3)] == [[["a"]]] * 3


def test_fail_to_load():
    with pytest.raises(ModelError, match="echo:x: it fails to load"):
        load("echo:x", fail_to_load=True)


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        (
            {"wrods": 3},
            "wrods",
            "unknown option; the engine echo allows: reply, labels, words, error_rate",
        ),
        ({"words": 0}, "words", "0 is not allowed: input should be greater than or equal to 1"),
        ({"error_rate": 2.0}, "error_rate", "2.0 is not allowed"),
        (
            {"faults": {"a": "explode"}},
            "faults.a",
            "'explode' is not allowed.*'hang' or 'allocate'",
        ),
        ({"labels": []}, "labels", "at least 1 item"),
        ({"allocate_bytes": 2**37}, "allocate_bytes", "less than or equal to 68719476736"),
        ({"fail_for_s": 1.0}, "fail_for_s", "1.0 is not allowed: it needs fail_after"),
    ],
)
def test_wrong_options_are_refused(options, key, words):
    with pytest.raises(JobError, match=words) as caught:
        load(**options)
    assert caught.value.key == f"agents.options.{key}"


def test_describe_names_what_was_set():
    engine = load("echo:x", words=3)
    assert engine.describe() == {"engine": "echo", "model": "echo:x", "options": {"words": 3}}
    assert engine.max_batch_tokens == 100
    assert load(max_context_tokens=64).max_context_tokens == 64
    engine.close()
