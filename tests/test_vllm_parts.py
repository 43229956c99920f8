"""What the engine `vllm` is made of, without vLLM."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from mas_batch.engines.base import EngineConfig, Sampling
from mas_batch.engines.job_options import check_options
from mas_batch.engines.vllm.arguments import arguments
from mas_batch.engines.vllm.choices import MOST_TOKENS, questions, scores
from mas_batch.engines.vllm.environment import Hardware, is_fault, set_up, variables
from mas_batch.engines.vllm.options import Options, read
from mas_batch.engines.vllm.replies import chosen, next_logprobs, written
from mas_batch.errors import JobError, Reason
from mas_batch.job import Agent, Job, fingerprint


def agent(**settings: Any) -> Agent:
    return Agent.model_validate({"name": "a", "model": "org/m", **settings})


def output(*samples: dict[str, Any], read: int = 7, cached: int | None = 4) -> Any:
    made = [
        SimpleNamespace(**{"index": i, "cumulative_logprob": -1.5, "finish_reason": "stop", **each})
        for i, each in enumerate(samples)
    ]
    return SimpleNamespace(outputs=made, prompt_token_ids=[0] * read, num_cached_tokens=cached)


def decode(tokens: Any) -> str:
    return " " + " ".join(map(str, tokens))


def test_the_end_token_is_counted_but_not_shown() -> None:
    [done] = written(output({"token_ids": [5, 6, 2]}), decode, 3.0)
    assert (done.text, done.token_ids, done.num_tokens) == ("5 6", (5, 6), 3)
    assert (done.finish_reason, done.sum_logprob, done.compute_s) == ("stop", -1.5, 3.0)
    assert (done.prompt_tokens, done.cached_tokens, done.prefill_s) == (7, 4, None)


def test_samples_are_in_order_and_share_the_time_by_their_tokens() -> None:
    late = {"token_ids": [9], "index": 1, "finish_reason": "length"}
    first, second = written(output(late, {"token_ids": [5, 6, 2], "index": 0}), decode, 4.0)
    assert (first.text, second.text) == ("5 6", "9")
    assert (first.compute_s, second.compute_s) == (3.0, 1.0)
    assert second.finish_reason == "length"


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"finish_reason": "abort"}, "vLLM ended it with 'abort'"),
        ({"cumulative_logprob": math.nan}, "logits are not finite"),
        ({"cumulative_logprob": None}, "logits are not finite"),
    ],
)
def test_what_is_no_reply_fails_alone(sample: dict[str, Any], words: str) -> None:
    bad, good = written(output({"token_ids": [5, 2], **sample}, {"token_ids": [6, 2]}), decode, 1.0)
    assert (bad.reason, bad.finish_reason) == (Reason.ENGINE_ERROR, "error")
    assert words in bad.message
    assert good.text == "6"


def test_single_tokens_that_differ_are_one_request() -> None:
    assert questions([(4,), (5,), (6,)]) == [((), (4, 5, 6))]


def test_choices_share_the_requests_of_their_beginnings() -> None:
    choices = [(4, 7), (4, 8), (5,), (4, 7, 9)]
    assert questions(choices) == [((), (4, 5)), ((4,), (7, 8)), ((4, 7), (9,))]
    found = {(): {4: -1.0, 5: -2.0}, (4,): {7: -0.5, 8: -3.0}, (4, 7): {9: -0.25}}
    assert scores(choices, found) == (-1.5, -4.0, -2.0, -1.75)


def test_more_next_tokens_than_a_request_may_ask_about_are_several() -> None:
    asked = questions([(i,) for i in range(MOST_TOKENS + 1)])
    assert [len(tokens) for _, tokens in asked] == [MOST_TOKENS, 1]


def test_the_likeliest_choice_is_the_text() -> None:
    sampling = Sampling(4, choices=("no", " yes"))
    [done] = chosen(sampling, [(1,), (2, 3)], (-2.0, -0.5), 9, 8, 1.0)
    assert (done.text, done.choice_logprobs, done.choice_tokens) == (" yes", (-2.0, -0.5), (1, 2))
    assert (done.sum_logprob, done.cached_tokens, done.finish_reason) == (-0.5, 8, "stop")
    [bad] = chosen(sampling, [(1,), (2, 3)], (-math.inf, -0.5), 9, 8, 1.0)
    assert bad.reason == Reason.ENGINE_ERROR


def test_the_next_tokens_are_read_with_the_one_that_was_drawn() -> None:
    logprobs = [{4: SimpleNamespace(logprob=-1.0), 9: SimpleNamespace(logprob=-0.5)}]
    assert next_logprobs(output({"logprobs": logprobs})) == {4: -1.0, 9: -0.5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2}, "unknown option; the engine vllm allows: max_context_tokens"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: 1.5 is not allowed"),
        ({"block_size": 12}, "block_size: 12 is not allowed"),
        ({"max_lora_rank": 7}, "max_lora_rank: 7 is not allowed"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(
    make_job: Callable[..., Job], options: dict[str, Any], words: str
) -> None:
    agents = [{"name": "a", "model": "org/m", "engine": "vllm", "options": options}]
    with pytest.raises(JobError) as caught:
        check_options(make_job(agents=agents, routing={}))
    assert words in str(caught.value)


def test_several_devices_hold_a_model_only_by_an_engine_that_can() -> None:
    parts = {"parallel": {"tensor": 2}}
    with pytest.raises(ValidationError, match="allowed: 1, or engine: vllm"):
        agent(**parts)
    with pytest.raises(ValidationError, match=r"resources.GPU has to be 2, not 1; or set device"):
        agent(**parts, engine="vllm", resources={"GPU": 1.0})
    with pytest.raises(ValidationError, match=r"parallel.tensor\n.*greater than or equal to 1"):
        agent(parallel={"tensor": 0})
    assert agent(**parts, engine="vllm", resources={"GPU": 2.0}).parallel.tensor == 2
    assert agent(**parts, engine="vllm", device="cpu").parallel.tensor == 2


def test_parts_of_a_model_are_held_by_other_hosts_than_the_whole() -> None:
    whole, parts = (
        agent(engine="vllm", device="cpu", parallel={"tensor": n}).engine_settings for n in (1, 2)
    )
    assert fingerprint(whole) != fingerprint(parts)


def test_vllm_is_told_what_it_reads_when_it_is_imported() -> None:
    cpu = variables(Hardware("cpu"), tensor=1, threads=2, batch_invariant=True)
    assert cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == cpu["VLLM_BATCH_INVARIANT"] == "0"
    assert (cpu["VLLM_CPU_OMP_THREADS_BIND"], cpu["OMP_NUM_THREADS"]) == ("nobind", "2")
    for capability, wanted, expected in (
        ((8, 0), True, "1"), ((7, 5), True, "0"), ((9, 0), False, "0"), (None, True, "0")
    ):  # fmt: skip
        card = Hardware("cuda", 2, capability)
        told = variables(card, tensor=2, threads=0, batch_invariant=wanted)
        assert told["VLLM_BATCH_INVARIANT"] == expected
        assert told["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
        assert "VLLM_CPU_OMP_THREADS_BIND" not in told


def test_too_few_cards_are_an_error() -> None:
    with pytest.raises(JobError, match="4 is more than the 2 accelerators"):
        set_up(Hardware("cuda", 2), tensor=4, threads=0, batch_invariant=True)


def test_dead_engines_and_cards_are_told_from_failed_requests() -> None:
    dead = type("EngineDeadError", (Exception,), {})()
    assert is_fault(dead)
    assert is_fault(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_fault(RuntimeError("CUDA out of memory"))
    assert not is_fault(ValueError("the decoder prompt cannot be empty"))


def test_a_float32_checkpoint_stays_so_on_a_card(tmp_path: Any) -> None:
    def made(config: str, here: Hardware, **settings: Any) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(config)
        return arguments(tmp_path, EngineConfig(**settings), read({}), here)

    card, cpu = Hardware("cuda"), Hardware("cpu")
    assert made('{"torch_dtype": "float32"}', card)["dtype"] == "float32"
    assert made('{"text_config": {"dtype": "bfloat16"}}', card)["dtype"] == "bfloat16"
    assert made("{}", card)["dtype"] == "auto"
    assert made("{}", card, dtype="float16")["dtype"] == "float16"
    assert made('{"dtype": "bfloat16"}', cpu)["dtype"] == "float32"
    assert made("{}", cpu)["kv_cache_memory_bytes"] == 2**30
    assert "kv_cache_memory_bytes" not in made("{}", card)
    assert "enable_lora" not in made("{}", card)
    assert made("{}", cpu)["enable_chunked_prefill"] is False
    assert "enable_chunked_prefill" not in made("{}", card)
    assert made("{}", card)["enable_prefix_caching"] is True
    lora = made("{}", card, adapters=3)
    assert (lora["enable_lora"], lora["max_loras"], lora["max_lora_rank"]) == (True, 3, 16)
    assert made("{}", card, tensor=2)["distributed_executor_backend"] == "mp"


def test_no_option_is_needed() -> None:
    assert read({}) == Options()
