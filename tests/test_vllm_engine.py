"""What the engine `vllm` does when vLLM fails, with a vLLM that says every token it reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mas_batch.engines.base import EngineConfig, Message, Request, Sampling, TokenizedPrompt
from mas_batch.engines.batching import answer_batch
from mas_batch.engines.vllm.environment import Hardware, set_up
from mas_batch.engines.vllm.options import Options, read
from mas_batch.errors import (
    EngineError,
    EngineLostError,
    JobError,
    ModelError,
    OutOfMemoryError,
    Reason,
)
from mas_batch.models import ModelFiles

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ENGINE = "mas_batch.engines.vllm.engine"


@dataclass
class Vllm:
    """Each step ends one request, by the last token of its prompt; `faults` come before."""

    faults: list[Exception] = field(default_factory=list)
    refuses: tuple[int, ...] = ()
    waiting: dict[str, int] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    """Names that it tells of though nobody waits for them."""
    resets: int = 0

    @property
    def vllm_config(self) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=100),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
        )

    def add_request(self, name: str, prompt: Mapping[str, Any], params: Any, **_: Any) -> None:
        token = prompt["prompt_token_ids"][-1]
        if token in self.refuses:
            raise ValueError(f"no token {token}")
        self.waiting[name] = token

    def abort_request(self, names: Sequence[str], internal: bool) -> None:
        for name in names:
            self.waiting.pop(name, None)

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        if self.faults:
            raise self.faults.pop(0)
        told = [(name, 1) for name in self.stale]
        self.stale = []
        if self.waiting:
            name = next(iter(self.waiting))
            told.append((name, self.waiting.pop(name)))
        return [
            SimpleNamespace(
                request_id=name, prompt_token_ids=[token], num_cached_tokens=0,
                outputs=[
                    SimpleNamespace(
                        index=0, token_ids=[token], cumulative_logprob=-1.0, finish_reason="length"
                    )
                ],
            )
            for name, token in told
        ]  # fmt: skip


class Tokenizer:
    all_special_ids: tuple[int, ...] = ()

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture
def engine_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The engine's module, in front of modules that have vLLM's names."""

    def made(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
    made("vllm", SamplingParams=SimpleNamespace, envs=envs, __version__="0", __path__=[])
    made("vllm.distributed", cleanup_dist_env_and_memory=lambda: None)
    made("vllm.lora", __path__=[])
    made("vllm.lora.request", LoRARequest=tuple)
    made("vllm.sampling_params", RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    for name in (ENGINE, "mas_batch.engines.vllm.adapters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield import_module(ENGINE)
    for name in (ENGINE, "mas_batch.engines.vllm.adapters"):
        sys.modules.pop(name, None)


def load(module: Any, vllm: Vllm) -> Any:
    files = ModelFiles("model", "path", None, "model", "")
    llm = SimpleNamespace(llm_engine=vllm)
    return module.VllmEngine(llm, Tokenizer(), files, EngineConfig(), Options(), Hardware("cpu"))


def requests(*tokens: int) -> list[Request]:
    return [
        Request(str(t), "", (Message("user", ""),), tokenized=TokenizedPrompt(1, [t]))
        for t in tokens
    ]


def texts(rows: Sequence[Sequence[Any]]) -> list[str]:
    return [row[0].reason or row[0].text for row in rows]


@pytest.mark.parametrize("number", [1, 2])
def test_after_failed_steps_every_record_has_its_own_answer(
    engine_module: Any, number: int
) -> None:
    vllm = Vllm([RuntimeError("a step failed") for _ in range(number)])
    engine = load(engine_module, vllm)

    assert texts(answer_batch(engine, requests(1, 2, 3, 4), Sampling(4))) == ["1", "2", "3", "4"]

    assert not vllm.waiting
    assert vllm.resets == number


def test_what_vllm_lost_is_an_error_and_not_waited_for(engine_module: Any) -> None:
    engine = load(engine_module, vllm := Vllm())
    engine.begin([])
    asked = engine_module.Waiting(5, requests(5)[0], Sampling(4))
    engine.begin([asked])
    vllm.waiting.clear()
    with pytest.raises(EngineError, match="vLLM has lost 1 requests"):
        engine.step()
    engine.drop()
    engine.begin([asked])
    vllm.stale = ["of one that was dropped"]
    assert [(done.key, done.completions[0].text) for done in engine.step()] == [(5, "5")]


def test_a_refused_request_is_taken_back_or_the_engine_is_given_up(
    engine_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(engine_module, vllm := Vllm(refuses=(2,)))
    rows = engine.generate(requests(1, 2, 3), Sampling(4))
    assert texts(rows) == ["1", Reason.ENGINE_ERROR, "3"]
    assert rows[1][0].message == "ValueError: no token 2"

    def abort(*_: Any, **__: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(vllm, "abort_request", abort)
    with pytest.raises(EngineLostError, match="gone"):
        engine.generate(requests(2), Sampling(4))


def test_a_step_without_memory_is_tried_with_less(engine_module: Any) -> None:
    engine = load(engine_module, Vllm([torch.OutOfMemoryError("CUDA out of memory")]))
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        engine.generate(requests(1), Sampling(4))
    assert texts(engine.generate(requests(1), Sampling(4))) == ["1"]


def test_so_many_partitions_as_fill_its_sequences(engine_module: Any) -> None:
    assert [read(o).partitions_at_once for o in ({}, {"max_num_seqs": 40})] == [24, 3]
    assert load(engine_module, Vllm()).concurrent == 24


@pytest.mark.parametrize(
    ("found", "wanted", "key"),
    [
        ({"VLLM_ENABLE_V1_MULTIPROCESSING": True}, {}, "agents.parallel.tensor"),
        ({"VLLM_BATCH_INVARIANT": True}, {}, "agents.options.batch_invariant"),
        ({}, {"batch_invariant": True}, "agents.options.batch_invariant"),
    ],
)
def test_what_vllm_has_read_of_the_process_cannot_be_changed(
    found: dict[str, bool],
    wanted: dict[str, bool],
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has = {"VLLM_ENABLE_V1_MULTIPROCESSING": False, "VLLM_BATCH_INVARIANT": False, **found}
    monkeypatch.setitem(sys.modules, "vllm.envs", SimpleNamespace(**has))  # type: ignore[misc]
    settings = {"tensor": 1, "threads": 0, "batch_invariant": False, **wanted}
    with pytest.raises(JobError, match="workers of their own") as caught:
        set_up(Hardware("cuda", 1, (9, 0)), **settings)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_an_adapters_configuration_is_checked(engine_module: Any, tmp_path: Path) -> None:
    engine = load(engine_module, Vllm())
    files = ModelFiles("folder", "path", tmp_path, "folder", "")

    def refused(config: str, error: type[Exception], words: str) -> None:
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(error, match=words):
            engine.add_adapter("a", files)

    refused("{}", ModelError, r"folder: no adapter_model\.safetensors")
    (tmp_path / "adapter_model.safetensors").touch()
    refused("{", ModelError, r"folder: adapter_config\.json: not JSON")
    refused('{"peft_type": "LORA"}', ModelError, r"folder: .*r: None is no number")
    ranks = '{"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 32}}'
    refused(ranks, JobError, r"max_lora_rank: 16 is below the rank 32 of folder")
