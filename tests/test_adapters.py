"""LoRA adapters against the same weights added to the base's own, and against peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mas_batch import pipeline
from mas_batch.engines.base import Request, Sampling, Waiting
from mas_batch.errors import EngineError, JobError, ModelError
from mas_batch.events import HostReady
from mas_batch.incremental.identity import asked_as, why_not_reusable
from mas_batch.job import Job
from mas_batch.models import ModelFiles, fetch
from mas_batch.run_folder.read import open_run
from tests.clusters import summarizers
from tests.test_engine_transformers import (
    END,
    MODELS,
    PACKED,
    _load,
    _plain,
    _prompt,
    _reference,
    _requests,
    _step_all,
    tokenizer_of,
)
from tests.test_run import Recorder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

DECODED = {"llama": (1, 2), "qwen3": (1,), "gpt2": (1,), "sliding": (1,), "t5": (1,), "bart": (2,)}
"""Kinds of models and numbers of beams."""
LOGITS = 1e-4
"""The most by which logits may differ: rounding in another order."""
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "base_model_name_or_path": "someone/llama",
}
Weights = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFiles]:
    """Save a tiny random model of a kind, once."""
    saved: dict[str, ModelFiles] = {}

    def make(kind: str) -> ModelFiles:
        if kind not in saved:
            path = tmp_path_factory.mktemp("base") / kind
            with torch.random.fork_rng():
                torch.manual_seed(7)
                model = {**MODELS, **PACKED}[kind]()
            model.save_pretrained(path)
            tokenizer_of(kind).save_pretrained(path)
            saved[kind] = fetch(str(path))
        return saved[kind]

    return make


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Name → inputs and outputs, as the weights of an adapter have them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            found[name] = (module.nx, module.nf)
    return found


def random_weights(layers: Mapping[str, tuple[int, int]], seed: int, rank: int = 4) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (inputs, outputs) in layers.items():
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            weight = torch.randn(shape, generator=generator) * 0.2
            weights[f"base_model.model.{name}.lora_{side}.weight"] = weight
    return weights


def write(folder: Path, weights: Weights, **config: Any) -> ModelFiles:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    safetensors.save_file(weights, folder / "adapter_model.safetensors")
    return fetch(str(folder))


class Two:
    """Two adapters of one model: of all its layers, and stronger of a few."""

    def __init__(self, files: ModelFiles, folder: Path) -> None:
        self.base = files
        self.model = _reference(files)
        layers = linear_layers(self.model)
        some = dict(list(layers.items())[::2])
        self.weights = {"all": random_weights(layers, 1), "some": random_weights(some, 2, rank=2)}
        self.scales = {"all": 8 / 4, "some": 3 / 2**0.5}
        self.files = {
            "all": write(folder / "all", self.weights["all"]),
            "some": write(
                folder / "some", self.weights["some"], r=2, lora_alpha=3, use_rslora=True
            ),
        }

    def given_to(self, engine: Any) -> Any:
        for name, files in self.files.items():
            engine.add_adapter(name, files)
        return engine

    @contextmanager
    def merged(self, name: str | None) -> Iterator[Any]:
        """The base with an adapter's additions in its weights."""
        weights = self.weights.get(name or "", {})
        kept = {key: weight.clone() for key, weight in self.model.state_dict().items()}
        for key in weights:
            if key.endswith("lora_A.weight"):
                down, up = weights[key], weights[key.replace("lora_A", "lora_B")]
                layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                module = self.model.get_submodule(layer)
                added = self.scales[name or ""] * (up @ down)
                # The vocabulary's projection may have the embedding's weight, which keeps its own.
                weight = module.weight.data
                module.weight = torch.nn.Parameter(
                    weight + (added if isinstance(module, torch.nn.Linear) else added.T)
                )
        try:
            yield self.model
        finally:
            self.model.tie_weights()
            self.model.load_state_dict(kept)
            self.model.tie_weights()


@pytest.fixture
def two(base: Callable[[str], ModelFiles], tmp_path: Path) -> Callable[[str], Two]:
    return lambda kind: Two(base(kind), tmp_path / "adapters")


NAMES = ("all", None, "some")


def mixed(number: int = 6) -> list[Request]:
    return [replace(r, adapter=NAMES[i % 3]) for i, r in enumerate(_requests(number))]


def tokens(completions: Sequence[Any]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize(
    ("kind", "num_beams"), [(kind, beams) for kind, each in DECODED.items() for beams in each]
)
def test_a_mixed_batch_answers_as_merged_weights_do(
    kind: str, num_beams: int, two: Callable[[str], Two]
) -> None:
    adapters = two(kind)
    engine, requests = adapters.given_to(_load(adapters.base)), mixed()
    sampling = Sampling(8, num_beams=num_beams)

    together = [c for (c,) in engine.generate(requests, sampling)]
    alone = [engine.generate([request], sampling)[0][0] for request in requests]

    expected = {}
    for name in NAMES:
        with adapters.merged(name):
            for request in (r for r in requests if r.adapter == name):
                row = _plain(
                    adapters.base, _prompt(adapters.base, request),
                    max_new_tokens=8, num_beams=num_beams,
                )  # fmt: skip
                expected[request.request_id] = tuple(row[:-1] if row[-1] in END else row)
    assert tokens(together) == tokens(alone) == [expected[r.request_id] for r in requests]
    base = [c for (c,) in engine.generate([replace(r, adapter=None) for r in requests], sampling)]
    changed = [i for i, name in enumerate(tokens(base)) if name != together[i].token_ids]
    assert changed
    assert all(requests[i].adapter for i in changed)


def test_rows_of_several_adapters_share_steps(two: Callable[[str], Two]) -> None:
    adapters = two("llama")
    engine, requests = adapters.given_to(_load(adapters.base)), mixed()
    sampled = Sampling(12, temperature=1.2, num_samples=2)
    waiting = [Waiting(i, r, sampled if i % 2 else Sampling(12)) for i, r in enumerate(requests)]
    stepped = _step_all(engine, [waiting[:4], [], [], waiting[4:]])
    alone = [engine.generate([one.request], one.sampling)[0] for one in waiting]
    assert [tokens(stepped[i]) for i in range(len(waiting))] == [tokens(row) for row in alone]


@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_have_the_logits_of_merged_weights(
    kind: str, two: Callable[[str], Two]
) -> None:
    from mas_batch.engines.transformers.adapters import Adapters
    from mas_batch.engines.transformers.network import Network
    from mas_batch.engines.transformers.packed_stream import PackedStream

    adapters = two(kind)
    own = Adapters(adapters.model, adapters.base)
    for name, files in adapters.files.items():
        own.add(name, files)
    rows = [[5, 9, 12], [7] * 40, [3, 60], [4] * 20]

    def logits(names: Sequence[str | None]) -> list[Any]:
        """Of two steps; rows of unlike lengths stand in another order than they came in."""
        stream = PackedStream(Network(adapters.model, own))
        with torch.inference_mode():
            for name, row in zip(names, rows, strict=True):
                with own.used([name]):
                    stream.join([row], 1, [9], name)
            with own.used(names):
                return [stream.step(torch.tensor([8, 9, 10, 11])) for _ in range(2)]

    names = [None, "all", "some", None]
    found, plain = logits(names), logits([None] * 4)
    for i, name in enumerate(names):
        with adapters.merged(name) as model, torch.inference_mode():
            row = torch.tensor([[*rows[i], 8 + i, 8 + i]])
            expected = model(input_ids=row).logits[0, -2:]
        for step in range(2):
            assert torch.allclose(found[step][i], expected[step], atol=LOGITS)
            if name is None:
                assert torch.equal(found[step][i], plain[step][i])
    # All rows with an adapter: what is added before the curve is not computed twice.
    names = ["all", "some", "all", "some"]
    for found_step, i in zip(logits(names), (-2, -1), strict=True):
        for row, name in enumerate(names):
            with adapters.merged(name) as model, torch.inference_mode():
                ids = torch.tensor([[*rows[row], 8 + row, 8 + row]])
                expected = model(input_ids=ids).logits[0, i]
            assert torch.allclose(found_step[row], expected, atol=LOGITS)


def test_ranks_and_strengths_of_single_layers(
    base: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    from mas_batch.engines.transformers.adapter_files import read_adapter

    model = _reference(base("llama"))
    layers = linear_layers(model)
    strong = {name: size for name, size in layers.items() if name.endswith("1.mlp.up_proj")}
    rest = {name: size for name, size in layers.items() if name.endswith("q_proj")}
    weights = random_weights(strong, 1, rank=6) | random_weights(rest, 2)
    files = write(
        tmp_path / "a", weights,
        rank_pattern={"up_proj": 6}, alpha_pattern={r"model\.layers\.1\.mlp\..*": 12},
    )  # fmt: skip
    found = read_adapter(files, model, base("llama"))
    for name, low in found.items():
        up = weights[f"base_model.model.{name}.lora_B.weight"]
        assert torch.allclose(low.up, up * 2.0)
        assert len(low.down) == (6 if name in strong else 4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_an_adapter_is_what_peft_makes_of_it(
    base: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    files = base("llama")
    made = {"x": {"r": 4, "lora_alpha": 8}, "y": {"r": 8, "use_rslora": True}}
    engine = _load(files)
    models = {}
    for name, settings in made.items():
        config = peft.LoraConfig(
            target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
            init_lora_weights=False, task_type="CAUSAL_LM", **settings,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(len(name) + settings["r"])
            model = peft.get_peft_model(
                transformers.AutoModelForCausalLM.from_pretrained(files.path), config
            )
        model.save_pretrained(tmp_path / name)
        engine.add_adapter(name, fetch(str(tmp_path / name)))
        models[name] = model.eval()
    requests = [replace(r, adapter="xy"[i % 2]) for i, r in enumerate(_requests(4))]
    for request, (completion,) in zip(
        requests, engine.generate(requests, Sampling(12)), strict=True
    ):
        prompt = _prompt(files, request)
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            logits = models[request.adapter](input_ids=ids).logits[0, len(prompt) - 1 :]
        likeliest = logits.argmax(-1).tolist()
        assert likeliest[: len(completion.token_ids)] == list(completion.token_ids)
        logprobs = logits.double().log_softmax(-1).amax(-1)
        end = completion.finish_reason == "stop"
        assert completion.sum_logprob == pytest.approx(
            float(logprobs[: len(completion.token_ids) + end].sum()), abs=1e-3
        )


def other(name: str) -> Callable[[Weights], Weights]:
    """Add a weight of another kind."""
    return lambda weights: {**weights, f"base_model.model.{name}": torch.ones(3)}


def renamed(weights: Weights) -> Weights:
    return {name.replace("layers.1", "layers.9"): weight for name, weight in weights.items()}


def half(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if "layers.1.self_attn.q" not in name
            or "lora_A" in name}  # fmt: skip


def narrow(weights: Weights) -> Weights:
    return {name: w[:, :9].clone() if "lora_A" in name else w for name, w in weights.items()}


Q = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (dict, {"peft_type": "IA3"}, "peft_type 'IA3' is not supported; allowed: 'LORA'"),
        (dict, {"use_dora": True}, "use_dora: True is not supported"),
        (dict, {"bias": "lora_only"}, "bias: 'lora_only' is not supported; allowed: 'none'"),
        (dict, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (dict, {"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        (dict, {"some_new_way": {"a": 1}}, "some_new_way"),
        (dict, {"r": 5}, "is of rank 4; adapter_config.json says r: 5"),
        (dict, {"lora_alpha": None}, "lora_alpha: None is no number"),
        (other("lm_head.weight"), {}, "lm_head.weight is not supported: modules_to_save"),
        (other(f"{Q}.lora_magnitude_vector.weight"), {}, "use_dora"),
        (other("model.embed_tokens.lora_embedding_A"), {}, "embeddings"),
        (lambda _: other("x")({}), {}, "modules_to_save"),
        (renamed, {}, "LlamaForCausalLM, has no linear layer of that name"),
        (half, {}, "layers.1.self_attn.q_proj has no lora_B"),
        (narrow, {}, r"A \[4, 9\] and B \[32, 4\] do not fit .* \[4, 32\] and \[32, 4\]"),
    ],
)
def test_what_is_no_plain_lora_of_the_base_is_refused(
    change: Callable[[Weights], Weights],
    config: Mapping[str, Any],
    said: str,
    base: Callable[[str], ModelFiles],
    tmp_path: Path,
) -> None:
    from mas_batch.engines.transformers.adapter_files import read_adapter

    model = _reference(base("llama"))
    layers = {n: size for n, size in linear_layers(model).items() if n.endswith("q_proj")}
    files = write(tmp_path / "a", change(random_weights(layers, 1)), **config)
    with pytest.raises(ModelError, match=said) as error:
        read_adapter(files, model, base("llama"))
    assert str(tmp_path / "a") in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(
    name: str, base: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    files = write(tmp_path / "a", random_weights({"lm_head": (32, 64)}, 1))
    (tmp_path / "a" / name).unlink()
    with pytest.raises(ModelError, match=f"no {name}; an adapter is a folder"):
        _load(base("llama")).add_adapter("a", files)


def test_another_bases_name_is_a_warning(
    base: Callable[[str], ModelFiles], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = _load(base("llama"))
    weights = random_weights({"lm_head": (32, 64)}, 1)
    with caplog.at_level(logging.WARNING):
        engine.add_adapter("same", write(tmp_path / "a", weights))
        assert not caplog.records
        engine.add_adapter("other", write(tmp_path / "b", weights, base_model_name_or_path="x/y"))
    assert "was trained on x/y" in caplog.text
    facts = engine.describe()["adapters"]
    assert facts["same"]["sha256"] == fetch(str(tmp_path / "a")).sha256
    assert set(facts) == {"same", "other"}


def test_a_request_for_an_adapter_that_is_not_there(base: Callable[[str], ModelFiles]) -> None:
    with pytest.raises(EngineError, match="the adapter 'x' was not added"):
        _load(base("llama")).generate([replace(_requests(1)[0], adapter="x")], Sampling(2))


def agents(files: ModelFiles, adapters: Mapping[str, str]) -> list[dict[str, Any]]:
    own = {"model": files.source, "engine": "transformers", "device": "cpu"}
    return [
        {"name": "plain", **own},
        *({"name": name, **own, "adapter": source} for name, source in adapters.items()),
    ]


def test_agents_with_adapters_of_one_base_share_a_host(
    make_job: Callable[..., Job], two: Callable[[str], Two], tmp_path: Path
) -> None:
    adapters = two("llama")
    sources = {name: files.source for name, files in adapters.files.items()}
    write(tmp_path / "wrong", random_weights({"nothing": (2, 2)}, 1))
    sources["wrong"] = str(tmp_path / "wrong")
    rows = [{"id": f"r{i}", "text": f"w{i} w7"} for i in range(4)]
    events = Recorder()
    merge = {"method": "vote"}
    routing = {"answers_per_record": 3}
    job = make_job(rows, agents=agents(adapters.base, sources), merge=merge, routing=routing)
    with summarizers(1) as client:
        run = open_run(pipeline.run(job, client=client, emit=events).run)

    assert [event.agents for event in events.of(HostReady)] == [("plain", "all", "some")]
    loads = [row for row in run.ledger().to_pylist() if row["stage"] == "load"]
    assert len(loads) == 1
    table = run.arrow("answers").select(["agent_id", "family_id", "text"]).to_pylist()
    assert {row["agent_id"] for row in table} == {"plain", "all", "some"}
    assert {row["family_id"] for row in table} == {"llama"}, "adapters of one base err alike"
    texts = {name: [r["text"] for r in table if r["agent_id"] == name] for name in ("plain", "all")}
    assert texts["plain"] != texts["all"]
    engines = run.manifest["engines"]
    assert "adapter" not in engines["plain"]
    for name in ("all", "some"):
        files = adapters.files[name]
        assert engines[name]["adapter"]["source"] == files.source
        assert engines[name]["adapter"]["sha256"] == files.sha256


def test_an_adapter_is_part_of_who_is_asked_but_not_of_what_is_held(
    make_job: Callable[..., Job], two: Callable[[str], Two], tmp_path: Path
) -> None:
    adapters = two("llama")
    job = make_job(agents=agents(adapters.base, {"all": adapters.files["all"].source}))
    plain, adapted = job.agents
    assert plain.engine_settings == adapted.engine_settings
    assert asked_as(job, plain)["adapter"] != asked_as(job, adapted)["adapter"]
    first, second = job.identity()["agents"]
    assert "adapter" not in first, "runs of earlier versions keep their names"
    assert second["adapter"] == adapters.files["all"].source

    engine = {
        "sha256": adapters.base.sha256,
        "adapter": {"sha256": adapters.files["all"].sha256},
    }
    earlier = {"asked_as": {"all": asked_as(job, adapted)}, "engines": {"all": engine}}
    assert why_not_reusable(job, adapted, earlier, is_embedded=True) is None
    write(tmp_path / "adapters" / "all", random_weights({"lm_head": (32, 64)}, 5))
    assert why_not_reusable(job, adapted, earlier, is_embedded=True) == (
        "changed since: the adapter's files"
    )


def test_an_engine_without_adapters_is_refused_when_the_job_is_submitted(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    from mas_batch.engines.job_options import check_options

    job = make_job(agents=[{"name": "a", "model": "echo", "adapter": "someone/lora"}])
    with pytest.raises(JobError, match="allowed with engine transformers") as error:
        check_options(job)
    assert error.value.key == "agents.a.adapter"
    with pytest.raises(JobError, match="has no files; an adapter is a folder"):
        make_job(agents=[{"name": "a", "model": "echo", "adapter": "echo"}])
