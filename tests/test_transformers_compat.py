"""What we use of transformers beyond its documentation still does what we need."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mas_batch.engines.transformers.transformers_compat import (  # noqa: E402 - it needs torch
    GrowingLayer,
    accepted,
    cache_argument,
    dequantized,
    drop_columns,
    is_joinable,
    join_rows,
    model_length,
)

SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
LLAMA = transformers.LlamaConfig(**SMALL)


@pytest.fixture(scope="module")
def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(LLAMA).eval()


def read(model: Any, ids: list[list[int]], cache: Any) -> Any:
    with torch.inference_mode():
        settings = {"use_cache": True, cache_argument(model): cache}
        return model(input_ids=torch.tensor(ids), **settings).logits[:, -1]


def test_the_argument_that_takes_a_cache_has_one_of_the_names_that_we_know(llama: Any) -> None:
    assert cache_argument(llama)
    cache = transformers.DynamicCache(config=LLAMA)
    read(llama, [[1, 2, 3]], cache)
    assert cache.get_seq_length() == 3


def test_a_model_says_which_arguments_it_takes(llama: Any) -> None:
    assert accepted(llama, position_ids=1, logits_to_keep=2, no_such_argument=3) == {
        "position_ids": 1,
        "logits_to_keep": 2,
    }


def test_layers_that_forget_are_told_from_plain_ones() -> None:
    assert is_joinable(transformers.DynamicCache(config=LLAMA))
    sliding = transformers.MistralConfig(**SMALL, sliding_window=4)
    assert not is_joinable(transformers.DynamicCache(config=sliding))


def test_a_cache_that_is_put_together_is_read_and_written_by_the_model(llama: Any) -> None:
    whole = transformers.DynamicCache(config=LLAMA)
    read(llama, [[1, 2, 3], [4, 5, 6]], whole)
    expected = read(llama, [[7], [8]], whole)

    parts = []
    for row, ids in enumerate(([1, 2, 3], [4, 5, 6])):
        part = transformers.DynamicCache(config=LLAMA)
        read(llama, [ids], part)
        parts.append((torch.tensor([row]), part))
    joined = join_rows(parts, num_rows=2, width=3, capacity=8)

    assert torch.allclose(read(llama, [[7], [8]], joined), expected, atol=1e-6)
    assert joined.layers[0].keys.shape[2] == joined.layers[0].values.shape[2] == 4


def halves(llama: Any) -> list[Any]:
    """Two caches of a row each."""
    parts = []
    for row, ids in enumerate(([1, 2, 3], [4, 5])):
        part = transformers.DynamicCache(config=LLAMA)
        read(llama, [ids], part)
        parts.append((torch.tensor([row]), part))
    return parts


def test_caches_are_put_together_a_layer_at_a_time(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, held = halves(llama), []
    old = weakref.WeakSet(layer for _, part in parts for layer in part.layers)
    fill = GrowingLayer.fill
    monkeypatch.setattr(GrowingLayer, "fill", lambda *args: held.append(len(old)) or fill(*args))
    join_rows(parts, num_rows=2, width=3, capacity=8)
    assert held == [4, 4, 2, 2]
    assert not old


def test_a_cache_to_which_rows_could_not_be_joined_goes_on_as_it_was(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, alone = halves(llama)[::-1], halves(llama)[1][1]
    parts = [(torch.tensor([row]), part) for row, (_, part) in enumerate(parts)]
    make = GrowingLayer.__init__

    def fail_at_the_last(layer: Any, like: Any, *args: int) -> None:
        if like is parts[0][1].layers[-1]:
            raise MemoryError
        make(layer, like, *args)

    monkeypatch.setattr(GrowingLayer, "__init__", fail_at_the_last)
    with pytest.raises(MemoryError):
        join_rows(parts, num_rows=2, width=3, capacity=8)
    assert torch.equal(read(llama, [[7]], parts[0][1]), read(llama, [[7]], alone))


def test_rows_of_a_cache_that_is_put_together_can_go_in_another_order(llama: Any) -> None:
    part = transformers.DynamicCache(config=LLAMA)
    read(llama, [[1, 2, 3], [4, 5, 6]], part)
    rows = torch.tensor([0, 1])
    joined = join_rows([(rows, part)], num_rows=2, width=3, capacity=8)
    before = joined.layers[1].keys.clone()

    joined.reorder_cache(torch.tensor([1, 1, 0]))
    drop_columns(joined, 1)

    assert torch.equal(joined.layers[1].keys, before[[1, 1, 0], :, 1:])


def test_a_tokenizer_that_knows_no_length_says_a_number_beyond_all_models() -> None:
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    silent = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    told = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=77)
    assert (model_length(silent), model_length(told)) == (None, 77)


def test_a_gguf_can_be_loaded_without_its_quantization() -> None:
    assert dequantized().dequantize is True
