"""Weights in fewer bits: what the engine computes with them, what it says of them, and to whom."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mas_batch import report
from mas_batch.agents.spec import agent_specs
from mas_batch.engines import load_engine
from mas_batch.engines.base import EngineConfig, Message, Request, Sampling
from mas_batch.engines.job_options import check_options
from mas_batch.errors import JobError
from mas_batch.events import HostReady
from mas_batch.job import Agent, Job
from mas_batch.models import ModelFiles
from mas_batch.monitor.progress import Bar
from tests.report_runs import made_run, result
from tests.test_engine_transformers import MODELS, PACKED, tokenizer_of

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

from mas_batch.engines.transformers import int8_weight, quantized  # noqa: E402

TEXT = " ".join(f"w{i % 11}" for i in range(40))
IDS = [1, *range(6, 40)]


def saved(model: Any, kind: str, path: Path) -> ModelFiles:
    model.save_pretrained(path)
    tokenizer_of(kind).save_pretrained(path)
    return ModelFiles(f"tiny/{kind}", "path", path, kind, "0" * 64)


def load(files: ModelFiles, *, packed: bool = True, **config: Any) -> Any:
    options = {} if packed else {"pack_weights": False}
    config = {"device": "cpu", "threads": 1, "options": options, **config}
    return load_engine("transformers", files, EngineConfig(**config))


def logits_of(engine: Any) -> Any:
    with torch.inference_mode():
        if engine._network is not None:
            return engine._network.read(IDS)
        return engine._model(input_ids=torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param("llama", int8_weight.PART_ELEMENTS, marks=pytest.mark.nightly),
        ("qwen2", 32 * 5),
    ],
)
def test_packed_int8_gives_the_logits_of_torchaos_module(
    kind: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_weight, "PART_ELEMENTS", part)
    torch.manual_seed(7)
    files = saved((MODELS | PACKED)[kind](), kind, tmp_path)
    packed, module, whole = (
        load(files, quantize="int8"),
        load(files, quantize="int8", packed=False),
        load(files),
    )
    assert packed.describe()["packed_weights"]
    assert packed.describe()["quantize"] == "int8"
    found, expected = logits_of(packed), logits_of(whole)
    torch.testing.assert_close(found, logits_of(module), atol=2e-4, rtol=1e-4)
    off = float((found - expected).norm() / expected.norm())
    assert 1e-4 < off < 0.1, "rounded, and not more than int8 rounds"
    requests = [
        Request(str(i), "", (Message("user", " ".join(f"w{k}" for k in range(i, i + 5 + 3 * i))),))
        for i in range(4)
    ]
    ours, plain = (
        [c.token_ids for (c,) in engine.generate(requests, Sampling(8))]
        for engine in (packed, module)
    )
    assert ours == plain


def test_an_encoder_decoder_is_rounded_too(tmp_path: Path) -> None:
    engine = load(saved(MODELS["t5"](), "t5", tmp_path), quantize="int8")
    linear = [m for m in engine._model.modules() if int8_weight.is_rounded(getattr(m, "weight", 0))]
    assert linear
    assert set(engine.describe()["perplexity"]) == {"whole", "quantized"}


@pytest.fixture(scope="module")
def trained() -> Any:
    """A tiny model that has learned one text."""
    torch.manual_seed(7)
    model = MODELS["llama"]()
    ids = torch.tensor([tokenizer_of("llama")(TEXT)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def with_outliers(model: Any) -> Any:
    """The same function with a column, in each matrix after a norm, that outweighs all others."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[3] /= 3000
                for reader in readers:
                    reader.weight[:, 3] *= 3000
    return model


def test_a_model_that_int8_spoils_is_warned_of(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "SENTENCES", (TEXT,))
    good = load(saved(trained, "llama", tmp_path / "good"), quantize="int8").describe()
    bad = load(saved(with_outliers(trained), "llama", tmp_path / "bad"), quantize="int8").describe()
    assert "warnings" not in good
    assert bad["perplexity"]["whole"] == pytest.approx(good["perplexity"]["whole"], rel=1e-3)
    assert good["perplexity"]["quantized"] < good["perplexity"]["whole"] * 1.02
    assert bad["perplexity"]["quantized"] > bad["perplexity"]["whole"] * 1.02
    (warning,) = bad["warnings"]
    assert "tiny/llama with quantize: int8: its perplexity is" in warning
    assert_reaches_people(warning, bad, tmp_path)


def assert_reaches_people(warning: str, facts: dict[str, Any], folder: Path) -> None:
    """In the terminal when the host is ready; later in the run's findings, once."""
    screen = io.StringIO()
    with Bar(Console(file=screen, width=1000, force_terminal=True, color_system=None)) as bar:
        bar(HostReady("a-0", ("a",), 1.0, facts))
    assert warning in screen.getvalue()
    run = made_run(folder / "run", [[result("r0", "x")]], engines={"a": facts, "b": facts})
    assert [f.text for f in report.findings(run) if f.is_bad] == [warning]


def test_a_model_that_fits_only_with_fewer_bits_is_not_compared() -> None:
    def load_whole() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert quantized.measure_whole(load_whole, None) is None
    facts = quantized.quantized_facts("m", "int8", None, None)
    assert "perplexity" not in facts
    assert "was not compared" in facts["warnings"][0]


def test_without_torchao_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(JobError, match=r"pip install 'mas_batch\[quantize\]'"):
        load(saved(MODELS["llama"](), "llama", tmp_path), quantize="int8")


def test_hosts_with_unlike_bits_are_not_shared(make_job: Callable[..., Job]) -> None:
    agents = [
        {"name": "whole", "model": "echo"},
        {"name": "int8", "model": "org/m", "engine": "transformers", "quantize": "int8"},
        {"name": "fp32", "model": "org/m", "engine": "transformers"},
    ]
    specs = agent_specs(make_job(agents=agents, routing={}), embedded=True, num_cores=2)
    assert len({spec.engine_key for spec in specs.values()}) == 3
    assert specs["int8"].engine_config.quantize == "int8"
    assert "quantize" not in specs["fp32"].agent.model_dump(), "runs keep their names"


@pytest.mark.parametrize(
    ("engine", "model"), [("auto", "echo"), ("ctranslate2", "org/m"), ("marian", "org/m")]
)
def test_an_engine_that_cannot_is_found_before_anything_runs(
    make_job: Callable[..., Job], engine: str, model: str
) -> None:
    agent = {"name": "a", "model": model, "engine": engine, "quantize": "int8"}
    with pytest.raises(JobError, match=r"'int8' is not known .* engines that can: .*transformers"):
        check_options(make_job(agents=[agent], routing={}))


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        Agent.model_validate({"name": "a", "model": "org/m", "quantize": "int3"})
