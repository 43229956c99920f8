"""Prefixes that prompts share: what is read, what is kept, and that answers stay what they are."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mas_batch.agents.work import _counts_of_answers as counts_of_answers  # noqa: E402
from mas_batch.engines.base import Sampling  # noqa: E402
from mas_batch.engines.transformers import blocks  # noqa: E402
from mas_batch.engines.transformers.adapters import Adapters  # noqa: E402
from mas_batch.engines.transformers.choices import score_packed, score_stream  # noqa: E402
from mas_batch.engines.transformers.network import Network  # noqa: E402
from mas_batch.engines.transformers.packed_stream import PackedStream  # noqa: E402
from mas_batch.engines.transformers.prefixes import (  # noqa: E402
    LEAST_TOKENS,
    Layers,
    Prefixes,
    num_common,
    stretches,
)
from mas_batch.engines.transformers.running import Asked, Running  # noqa: E402
from mas_batch.engines.transformers.streams import SpecialTokens, open_stream  # noqa: E402
from mas_batch.models import ModelFiles  # noqa: E402
from mas_batch.records import ANSWERS  # noqa: E402

TEMPLATE = [i % 50 + 3 for i in range(12)]
DOCUMENT = [i * 7 % 50 + 3 for i in range(30)]


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.LlamaForCausalLM(config).eval()


def test_prompts_are_cut_where_they_part() -> None:
    one, other, third = [*TEMPLATE, *DOCUMENT, 1], [*TEMPLATE, *DOCUMENT, 2], [*TEMPLATE, 1, 2]

    found = stretches([one, third, other], [0, 0, 0])

    assert sorted((each.start, each.stop, each.prompts) for each in found) == [
        (0, 12, (0, 1, 2)),
        (12, 14, (1,)),
        (12, 42, (0, 2)),
        (42, 43, (0,)),
        (42, 43, (2,)),
    ]


def test_every_token_is_read_once_after_those_before_it() -> None:
    draw = random.Random(5)
    for _ in range(300):
        prompts = [
            [draw.randint(0, 1) for _ in range(draw.randint(1, 20))]
            for _ in range(draw.randint(0, 8))
        ]
        prompts = [[0] * draw.choice((0, 9)) + prompt for prompt in prompts]
        past = [0] * draw.choice((0, 12))
        known = [min(num_common(past, prompt), len(prompt) - 1) for prompt in prompts]

        read = list(known)
        for each in stretches(prompts, known):
            assert len({tuple(prompts[i][: each.stop]) for i in each.prompts}) == 1
            assert len(each.prompts) == 1 or each.stop - each.start >= LEAST_TOKENS
            for i in each.prompts:
                # Of a prompt that has more of the past, some may be read again for the others.
                assert each.start <= read[i]
                read[i] = each.stop
        assert read == [len(prompt) for prompt in prompts]


def test_prefixes_used_last_are_kept() -> None:
    prefixes = Prefixes(most_tokens=50)
    asked: list[int] = []

    def layers(num: int) -> Layers:
        asked.append(num)
        return []

    def see(prompt: list[int], adapter: str | None = None) -> int:
        found, _ = prefixes.find(prompt, adapter)
        prefixes.see(prompt, adapter, layers)
        return found

    assert [see([*TEMPLATE, i]) for i in range(3)] == [0, 0, 12]
    assert see([*TEMPLATE, 0], "adapter") == 0
    assert [see([*DOCUMENT, i]) for i in range(3)] == [0, 0, 30]
    assert see([*TEMPLATE, 5]) == 12  # 42 tokens of two prefixes
    assert [see([9] * 20 + [i]) for i in range(3)] == [0, 0, 20]  # too many: the document goes
    assert see([*TEMPLATE, 6]) == 12
    assert [see([*DOCUMENT, 9])] == [0]
    assert asked == [12, 30, 20, 30]


def test_prefixes_of_several_adapters_do_not_drive_out_each_other() -> None:
    prefixes = Prefixes(most_tokens=len(DOCUMENT))
    names = ("one", "two", None)
    for number in range(2):
        for name in names:
            prefixes.see([*DOCUMENT, number], name, lambda _: [])
    assert [prefixes.find([*DOCUMENT, 9], name)[0] for name in names] == [len(DOCUMENT)] * 3
    many = Prefixes()  # of each of more adapters than prompts are remembered
    for number in range(2):
        for i in range(20):
            many.see([*TEMPLATE, number], str(i), lambda _: [])
    assert many.find([*TEMPLATE, 9], "0")[0] == len(TEMPLATE)


def test_choices_are_scored_after_prefixes_as_after_whole_prompts(model: Any) -> None:
    network, prefixes = Network(model), Prefixes()
    prompts = [[*TEMPLATE, *DOCUMENT, i] for i in range(4)]
    choices = [[(5,), (6, 7, 8), (6, 9)]] * 4

    with torch.inference_mode():
        whole = score_packed(network, prompts, choices)
        first = score_packed(network, prompts[:2], choices[:2], prefixes)
        then = score_packed(network, prompts, choices, prefixes)
        other = score_packed(network, prompts[:1], choices[:1], prefixes, "adapter")
        _, generated = PackedStream(network, prefixes).join(prompts[:1], 1, [9], None)

    assert first.cached_tokens == other.cached_tokens * 2 == whole.cached_tokens[:2] == [0, 0]
    assert then.cached_tokens == [42] * 4
    assert generated == [42]
    for expected, found in zip(whole.logprobs, then.logprobs, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_part_with_short_choices_only_is_scored_by_any_stream(model: Any) -> None:
    special = SpecialTokens(frozenset(), 0)
    prompts, choices = [TEMPLATE, TEMPLATE], [[(5,), (6,)], [(5,), (6, 7)]]
    with torch.inference_mode():
        found = score_stream(
            lambda: open_stream(model, special, None), special, prompts, choices, 1
        )
        expected = score_packed(Network(model), prompts, choices)
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_logits_are_those_of_whole_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_QUERIES", 5)
    stream = PackedStream(Network(model), Prefixes())
    ways = [
        [*TEMPLATE, *DOCUMENT, 1, 2],
        [*TEMPLATE, 8],
        [*TEMPLATE, *DOCUMENT, 3],
        [*TEMPLATE, *DOCUMENT, 3],  # the same again
        [7, 8, 9],
    ]

    def join(prompts: list[list[int]], adapter: str | None = None) -> list[int]:
        logits, cached = stream.join(prompts, 2, [9] * len(prompts), adapter)
        for found, prompt in zip(logits, prompts, strict=True):
            expected = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            assert torch.allclose(found, expected, atol=1e-4)
        return cached

    with torch.inference_mode():
        assert join(ways) == [0, 12, 42, 42, 0]
        logits = stream.step(torch.arange(10) + 5)
        for i, found in enumerate(logits):
            prompt = [*ways[i // 2], i + 5]
            assert torch.allclose(
                found, model(input_ids=torch.tensor([prompt])).logits[0, -1], atol=1e-4
            )
        assert join([[*TEMPLATE, *DOCUMENT, 1, 2, 4]]) == [44]  # of a row under way
        assert join([[*TEMPLATE, *DOCUMENT, 4]], "adapter") == [0]
        stream.keep([])
        assert join([[*TEMPLATE, *DOCUMENT[:15], 3], [*TEMPLATE, 1]]) == [27, 12]  # of kept ones
        assert PackedStream(Network(model)).join(ways, 1, [9] * 5, None)[1] == [0] * 5


def test_what_is_not_finite_is_not_kept(model: Any) -> None:
    prefixes = Prefixes()
    broken, stream = Network(model), PackedStream(Network(model), prefixes)
    prompts = [[*TEMPLATE, 1], [*TEMPLATE, 2]]
    broken.scale = float("nan")

    with torch.inference_mode():
        PackedStream(broken, prefixes).join(prompts, 1, [9, 9], None)
        logits, cached = stream.join(prompts, 1, [9, 9], None)

    assert cached == [0, 12]
    assert logits.isfinite().all()


def test_a_task_sums_the_cached_tokens_of_its_answers() -> None:
    facts = {"agent_id": "a", "family_id": "a", "sample_id": 0}
    rows = [{"record_id": f"{i}", "cached_tokens": i, **facts} for i in range(3)]
    known = pa.Table.from_pylist(rows, schema=ANSWERS)
    unknown = pa.Table.from_pylist([{"record_id": "3", **facts}], schema=ANSWERS)

    assert counts_of_answers(known)["cached_tokens"] == 3
    assert counts_of_answers(pa.concat_tables([known, unknown]))["cached_tokens"] is None
    assert counts_of_answers(ANSWERS.empty_table())["cached_tokens"] == 0


def _running(model: Any, prefixes: Prefixes | None) -> Running:
    adapters = Adapters(model, ModelFiles("tiny", "path", None, "tiny", ""))
    stream = PackedStream(Network(model), prefixes)
    return Running(stream, SpecialTokens(frozenset(), 0), adapters)


def test_those_that_share_most_of_a_prompt_begin_together(model: Any) -> None:
    pages = [[i * (7 + page) % 50 + 3 for i in range(20)] for page in range(3)]
    prompts = [[*TEMPLATE[:5], *page, end] for end in range(3) for page in pages]
    asked = [Asked(i, prompt, Sampling(6), 0) for i, prompt in enumerate(prompts)]
    running = _running(model, Prefixes())

    assert running.choose(asked, 32) == [0]
    assert running.choose(asked, 3 * 32) == [0, 3, 6]
    assert running.choose(asked, 5 * 32) == [0, 1, 3, 4, 6]


def test_seconds_of_reading_are_of_those_who_read(model: Any) -> None:
    running = _running(model, Prefixes())
    asked = [
        Asked(i, [*TEMPLATE, *DOCUMENT, i], Sampling(3, temperature=1.0, num_samples=2), i)
        for i in range(3)
    ]

    with torch.inference_mode():
        running.begin(asked)

    assert [one.cached_tokens for one in asked] == [0, 42, 42]
    seconds = [one.prefill_s for one in asked]
    assert seconds[1] == seconds[2] == pytest.approx(seconds[0] / 43)
