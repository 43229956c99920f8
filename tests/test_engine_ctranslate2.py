from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mas_batch.engines import detect_engine, load_engine
from mas_batch.engines.base import Completion, Engine, EngineConfig, Request, Sampling
from mas_batch.engines.batching import complete
from mas_batch.errors import EngineError, JobError, ModelError, Reason
from mas_batch.models import ModelFiles

ctranslate2 = pytest.importorskip("ctranslate2")
sentencepiece = pytest.importorskip("sentencepiece")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Punctuation normalisation that MarianTokenizer offers and nothing here calls.
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")

VOCAB, EOS, UNK = 45, 0, 1
PAD = VOCAB
SENTENCES = [
    "the red cat sleeps on the old sofa",
    "a dog",
    "where is the small house by the green lake and who lives in it now",
    "she reads",
    "we walk to the market every single day",
    "the old dog sleeps by the lake",
]
SEED, EOS_BIAS = 3, 8.0  # of these, greedy outputs have 1, 2, 11, 14 and 20 tokens
GREEDY = Sampling(max_new_tokens=20)
TOKENIZER_FILES = ["source.spm", "target.spm", "vocab.json", "tokenizer_config.json"]


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """A tiny random MarianMT model in the Hugging Face layout, tokenizer included."""
    path = tmp_path_factory.mktemp("reference")
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([s for s in SENTENCES if s] * 20),
        model_writer=pieces,
        vocab_size=VOCAB,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        minloglevel=2,
    )
    for name in ("source.spm", "target.spm"):
        (path / name).write_bytes(pieces.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.getvalue())
    vocabulary = {processor.id_to_piece(i): i for i in range(VOCAB)} | {"<pad>": PAD}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "pt"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tiny_model().save_pretrained(path)
    return path


def tiny_model() -> Any:
    config = transformers.MarianConfig(
        vocab_size=VOCAB + 1,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        bos_token_id=None,
        forced_eos_token_id=None,
        init_std=0.5,
        scale_embedding=True,
        normalize_before=False,
        normalize_embedding=False,
    )
    torch.manual_seed(SEED)
    model = transformers.MarianMTModel(config).eval()
    model.final_logits_bias[0, EOS] = EOS_BIAS  # so that outputs end, at various lengths
    return model


@pytest.fixture(scope="session")
def converted(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "tiny"
    converter = ctranslate2.converters.TransformersConverter(
        str(reference), copy_files=TOKENIZER_FILES
    )
    converter.convert(str(path))
    return path


@pytest.fixture
def directory(converted, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


def files(directory: Path) -> ModelFiles:
    return ModelFiles(str(directory), "path", directory, "tiny", "0" * 64)


def open_engine(directory: Path, **config) -> Engine:
    settings = {"device": "cpu", "threads": 1, **config}
    return load_engine("ctranslate2", files(directory), EngineConfig(**settings))


@pytest.fixture(scope="session")
def engine(converted) -> Engine:
    return open_engine(converted)


@pytest.fixture(scope="session")
def tokenizer(reference) -> Any:
    return transformers.AutoTokenizer.from_pretrained(reference)


@pytest.fixture(scope="session")
def model(reference) -> Any:
    torch.set_num_threads(1)  # the model is too small to share
    return transformers.MarianMTModel.from_pretrained(reference, dtype=torch.float32).eval()


def ask(texts: list[str]) -> list[Request]:
    return [Request(f"r{i}", text, ()) for i, text in enumerate(texts)]


def facts(completion: Completion) -> tuple:
    return completion.token_ids, completion.text, completion.finish_reason


def generate(model, tokenizer, text: str, **search) -> list[int]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        bad_words_ids=[[PAD]],
        **search,
    )
    return found[0, 1:].tolist()


def sum_logprob(model, tokenizer, text: str, tokens: list[int]) -> float:
    """Teacher-forced in transformers, without the padding token that the converter removes."""
    with torch.inference_mode():
        logits = model(
            input_ids=tokenizer(text, return_tensors="pt").input_ids,
            decoder_input_ids=torch.tensor([[PAD, *tokens[:-1]]]),
        ).logits[0]
        logits[:, PAD] = -torch.inf
    return float(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())


def test_greedy_equals_transformers(engine, model, tokenizer):
    found = engine.generate(ask(SENTENCES), GREEDY)
    reasons = set()
    for text, (completion,) in zip(SENTENCES, found, strict=True):
        expected = generate(model, tokenizer, text, num_beams=1)
        assert list(completion.token_ids) == expected
        assert completion.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert completion.num_tokens == len(expected)
        assert completion.finish_reason == ("stop" if expected[-1] == EOS else "length")
        assert completion.prompt_tokens == len(tokenizer(text).input_ids)
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}, "both ends must be covered"


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, num_beams=4),
        replace(GREEDY, temperature=1.5, num_samples=3),
        replace(GREEDY, temperature=0.7, top_k=5, num_samples=2),
        replace(GREEDY, temperature=1.2, top_p=0.8, num_samples=2),
    ],
    ids=["greedy", "beam", "samples", "top_k", "top_p"],
)
def test_log_probability_is_that_of_transformers(engine, model, tokenizer, sampling):
    ended = set()
    for text, completions in zip(SENTENCES, engine.generate(ask(SENTENCES), sampling), strict=True):
        assert len(completions) == sampling.num_samples
        for completion in completions:
            expected = sum_logprob(model, tokenizer, text, list(completion.token_ids))
            assert completion.sum_logprob == pytest.approx(expected, abs=1e-3)
            ended.add(completion.finish_reason)
    assert "stop" in ended, "the end token's share must be covered"


def test_a_source_without_text_has_an_empty_answer_and_no_score(engine):
    first, empty = (c[0] for c in engine.generate(ask(["a dog", ""]), GREEDY))
    assert facts(empty) == ((), "", "stop")
    assert (empty.sum_logprob, empty.num_tokens, empty.prompt_tokens) == (None, 0, 1)
    assert first.sum_logprob < 0


def test_beam_search_equals_transformers(engine, model, tokenizer):
    beam = replace(GREEDY, num_beams=4)
    found = engine.generate(ask(SENTENCES), beam)
    for text, (completion,) in zip(SENTENCES, found, strict=True):
        expected = generate(model, tokenizer, text, num_beams=4, early_stopping=True)
        assert list(completion.token_ids) == expected
    assert found != engine.generate(ask(SENTENCES), GREEDY)


def test_samples_differ_and_the_lack_of_seeds_is_said(directory, caplog):
    engine = open_engine(directory)
    sampling = replace(GREEDY, temperature=1.0, num_samples=8)
    found = engine.generate(ask(SENTENCES[:1]), sampling)[0]
    assert len({c.token_ids for c in found}) > 1
    engine.generate(ask(SENTENCES[:1]), sampling)
    assert [r.message for r in caplog.records if "ignores seeds" in r.message] == [
        "ctranslate2 ignores seeds: another run will draw other samples"
    ]
    assert engine.describe()["reproducible_samples"] is False


def test_a_request_alone_and_in_a_batch_gets_the_same(engine):
    together = engine.generate(ask(SENTENCES), GREEDY)
    for text, (completion,) in zip(SENTENCES, together, strict=True):
        assert facts(engine.generate(ask([text]), GREEDY)[0][0]) == facts(completion)


def test_a_batch_over_the_inner_budget_is_split_and_kept_in_order(engine, directory):
    small = open_engine(directory, max_batch_tokens=16)
    for (a,), (b,) in zip(
        small.generate(ask(SENTENCES), GREEDY), engine.generate(ask(SENTENCES), GREEDY), strict=True
    ):
        assert facts(a) == facts(b)


def test_what_is_too_long_is_named_and_never_cut(directory):
    engine = open_engine(directory, options={"max_context_tokens": 60})
    first, long, last = (
        c[0] for c in complete(engine, ask(["a dog", SENTENCES[2] * 6, "she reads"]), GREEDY)
    )
    assert long.reason is Reason.TOO_LONG
    assert {first.reason, last.reason} == {None}
    whole = open_engine(directory, options={"max_context_tokens": 5000})
    (failed,) = complete(whole, ask([SENTENCES[2] * 6]), GREEDY)[0]
    assert failed.reason is Reason.ENGINE_ERROR
    assert "position" in failed.message


def test_sentencepiece_alone_gives_the_same(engine, directory):
    for name in ("tokenizer_config.json", "vocab.json"):
        (directory / name).unlink()
    plain = open_engine(directory)
    assert plain.describe()["tokenizer"] == "sentencepiece"
    for text in SENTENCES:
        (request,) = ask([text])
        assert plain.tokenize(request).num_tokens == engine.tokenize(request).num_tokens
        expected = engine.generate([request], GREEDY)[0][0]
        assert facts(plain.generate([request], GREEDY)[0][0]) == facts(expected)


@pytest.mark.parametrize("kept", [TOKENIZER_FILES, ["source.spm", "target.spm"]])
def test_the_source_has_one_end_token_whoever_adds_it(engine, directory, kept):
    config = json.loads((directory / "config.json").read_text())
    assert not config["add_source_eos"]
    (directory / "config.json").write_text(json.dumps(config | {"add_source_eos": True}))
    for name in set(TOKENIZER_FILES) - set(kept):
        (directory / name).unlink()
    adding = open_engine(directory)
    for (a,), (b,) in zip(
        adding.generate(ask(SENTENCES), GREEDY),
        engine.generate(ask(SENTENCES), GREEDY),
        strict=True,
    ):
        assert facts(a) == facts(b)
        assert a.prompt_tokens == b.prompt_tokens


def test_sampling_that_contradicts_itself_is_refused(engine):
    with pytest.raises(EngineError, match="num_beams 2 needs temperature 0"):
        engine.generate(ask(["a"]), Sampling(4, temperature=1.0, num_beams=2))
    with pytest.raises(EngineError, match="num_samples 2 needs a temperature above 0"):
        engine.generate(ask(["a"]), Sampling(4, num_samples=2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"options": {"beam": 4}},
            "beam: unknown option; the engine ctranslate2 allows: compute_type, max_",
        ),
        (
            {"options": {"max_context_tokens": 0}},
            "0 is not allowed: input should be greater than or equal to 2",
        ),
        ({"options": {"compute_type": "int3"}}, "options.compute_type: 'int3' cannot run on cpu"),
        ({"dtype": "float8"}, "agents.dtype: 'float8' cannot run on cpu; allowed: .*float32"),
        ({"device": "mps"}, "agents.device: 'mps' is not here; allowed: auto, .*cpu"),
    ],
)
def test_a_config_that_cannot_be_is_a_job_error(converted, config, message):
    with pytest.raises(JobError, match=message):
        open_engine(converted, **config)


def test_int8_is_an_option(converted):
    engine = open_engine(converted, options={"compute_type": "int8"})
    assert engine.describe()["dtype"] == "int8_float32"
    assert all(c[0].num_tokens for c in engine.generate(ask(SENTENCES), GREEDY))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: [(d / f).unlink() for f in TOKENIZER_FILES],
            "no tokenizer; copy tokenizer.json",
        ),
        (lambda d: (d / "shared_vocabulary.json").unlink(), "needs shared_vocabulary.json or"),
        (lambda d: (d / "config.json").write_text("{}"), "not a converted encoder-decoder"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda d: (d / "model.bin").write_bytes(b"no"), "CTranslate2 cannot load it"),
    ],
)
def test_a_directory_that_is_not_whole_is_named(directory, spoil, message):
    spoil(directory)
    with pytest.raises(ModelError, match=message):
        open_engine(directory)


def test_describe_and_close(directory):
    assert detect_engine(files(directory)) == "ctranslate2"
    engine = open_engine(directory)
    described = engine.describe()
    assert (described["device"], described["dtype"], described["threads"]) == ("cpu", "float32", 1)
    assert described["tokenizer"] == "MarianTokenizer"
    engine.close()
    engine.close()
