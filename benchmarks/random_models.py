"""Language models with random weights, made on the spot where real ones are too large to carry.

What they write means nothing; how long it takes, and whether two devices write the same, does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from mas_batch.engines.base import Message, Request
from mas_batch.models import ModelFiles

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model of the Llama family."""

    hidden: int
    between: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 49_152


SHAPES = {
    "135m": Shape(576, 1536, 30, 9, 3),
    "1.7b": Shape(2048, 8192, 24, 32, 32),
    "tiny": Shape(64, 128, 2, 4, 2, vocabulary=512),
    "wide": Shape(64, 2048, 1, 4, 2, vocabulary=512),
}
"""The first two are SmolLM2's. *wide*: reading prompts takes memory, not time."""


def make_model(folder: Path, name: str, device: str) -> ModelFiles:
    """Save a model in bfloat16, in which it can be loaded as well as in float32.

    Unlike SmolLM2's, its output matrix is its own: tied to the embeddings, random weights repeat
    their last token for ever. Nothing ends a sequence, so all are as long as they may be.
    """
    shape, path = SHAPES[name], folder / name
    if path.exists():
        return ModelFiles(str(path), "path", path, name, "")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.between,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(7)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    half = folder / f"{name}-half"
    model.save_pretrained(half)
    _tokenizer(shape.vocabulary).save_pretrained(half)
    half.replace(path)  # who is stopped before leaves nothing that others would take for a model
    return ModelFiles(str(path), "path", path, name, "")


def _tokenizer(num_words: int) -> Any:
    words = [*SPECIAL, *(f"w{i}" for i in range(num_words - len(SPECIAL)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        model_max_length=2048,
    )


def make_requests(number: int, shortest: int, longest: int) -> list[Request]:
    """Return prompts of unlike lengths, in no order."""
    rng = np.random.default_rng(3)
    lengths = rng.permutation(np.linspace(shortest, longest, number).astype(int))
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 500, size=n)) for n in lengths]
    return [Request(f"r{i}", text, (Message("user", text),)) for i, text in enumerate(texts)]
