"""Sentence embeddings: texts to unit vectors whose dot product is their cosine similarity.

Any encoder that `transformers` knows, with safetensors. Mean pooling over the attention mask is
that of Sentence-BERT (Reimers & Gurevych, 2019); a checkpoint in the sentence-transformers layout
may ask for the first token's vector instead, and is refused where it asks for anything else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.batching import plan_batches
from mas_batch.engines.recent import RecentVectors
from mas_batch.engines.torch_device import ONE_LOADS, free_caches, torch_device
from mas_batch.errors import JobError, ModelError
from mas_batch.models import ModelFiles
from mas_batch.models.weights import read_json

BATCH_TOKENS = 8192
"""Padded tokens per batch where the agent sets no budget."""
RECENT_BYTES = 64 * 2**20
"""For vectors of texts that were encoded lately: some 37,000 of 384 numbers."""
MODULES = frozenset({"Transformer", "Pooling", "Normalize"})
"""Of a sentence-transformers pipeline, the steps that are done here."""
POOLINGS: dict[str, Literal["mean", "first"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint says about how its vectors are made."""

    pooling: Literal["mean", "first"] = "mean"
    max_tokens: int | None = None
    """Longest window it was tuned for; None: as long as its positions go."""


class Encoder:
    """An encoder in memory with its tokenizer. See `load`. Any number of threads may use it."""

    def __init__(
        self, model: Any, tokenizer: Any, layout: Layout, max_batch_tokens: int | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = layout.pooling
        self.max_tokens = min(
            layout.max_tokens or tokenizer.model_max_length,
            tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length,
        )
        """Tokens that the model reads at once, special tokens included."""
        self._max_batch_tokens = max_batch_tokens or BATCH_TOKENS
        self.dimension = int(model.config.hidden_size)
        self._recent = RecentVectors(RECENT_BYTES)
        self._encoding = threading.Lock()
        # How a tokenizer cuts is a state of it, which another thread would change in between.
        self._tokenizing = threading.Lock()

    @classmethod
    def load(cls, files: ModelFiles, config: EngineConfig) -> Encoder:
        """Load a directory of safetensors with its tokenizer; `config.options` is not read.

        Raises:
            JobError: a device that is not there, or a dtype other than float32.
            ModelError: no such files, an encoder-decoder, or a pooling that is not known here.
        """
        if config.dtype not in ("auto", "float32"):
            raise JobError(
                f"an encoder computes in float32, not {config.dtype!r}, so that vectors of "
                "different workers can be compared; allowed: auto, float32",
                key="agents.dtype",
            )
        path = files.path
        if path is None or not next(path.glob("*.safetensors"), None):
            raise ModelError(f"{files.source}: an encoder is a directory with a .safetensors file")
        layout = read_layout(path)
        transformers_logging.disable_progress_bar()
        settings = {"trust_remote_code": False, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **settings)
        architecture = transformers.AutoConfig.from_pretrained(path, **settings)
        if architecture.is_encoder_decoder or tokenizer.pad_token_id is None:
            raise ModelError(
                f"{files.source}: {architecture.model_type} is not an encoder of sentences: "
                "that has no decoder, and a padding token"
            )
        with ONE_LOADS:
            model = transformers.AutoModel.from_pretrained(
                path, use_safetensors=True, dtype=torch.float32, **settings
            )
        # An Apple GPU has to be asked for: its vectors may be compared with those of a CPU.
        device = torch_device(config, ("cuda", "cpu", "mps"))
        return cls(model.to(device).eval(), tokenizer, layout, config.max_batch_tokens)

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self._model.device)

    def count_tokens(self, text: str) -> int:
        """Count a text's tokens, special tokens of one window included."""
        with self._tokenizing:
            return len(self._tokenizer(text, verbose=False)["input_ids"])

    def encode(self, texts: Sequence[str], *, remember: bool = True) -> NDArray[np.float32]:
        """Return one unit vector per text, [N, dimension].

        Nothing is cut off: a text over `max_tokens` is read in windows, and the mean is over
        the tokens of all of them. A text's vector is the same whatever else is encoded with it,
        but for rounding (less than 1e-5 in each component). Equal texts are read once; so are
        those of the last calls, whoever asks, if they were asked with `remember`.
        """
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        with self._encoding:
            asked = dict.fromkeys(texts)
            vectors = {text: v for text in asked if (v := self._recent.get(text)) is not None}
            new = [text for text in asked if text not in vectors]
            for text, vector in zip(new, self._read(new), strict=True):
                vectors[text] = vector
                if remember:
                    self._recent.add(text, vector)
        return np.stack([vectors[text] for text in texts])

    def _read(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one unit vector per text, all of them computed now."""
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        with self._tokenizing:
            encoded = self._tokenizer(
                list(texts),
                truncation=True,
                max_length=self.max_tokens,
                return_overflowing_tokens=True,
            )
        windows, owners = encoded["input_ids"], encoded["overflow_to_sample_mapping"]
        sums = np.zeros((len(texts), self.dimension))
        for batch in plan_batches(list(map(len, windows)), 0, self._max_batch_tokens):
            vectors = self._pooled([windows[i] for i in batch])
            np.add.at(sums, [owners[i] for i in batch], vectors)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        unit: NDArray[np.float32] = (sums / norms).astype(np.float32)
        return unit

    def close(self) -> None:
        """Free the model; the encoder cannot be used afterwards. May be called again."""
        vars(self).pop("_model", None)
        free_caches()

    def _pooled(self, windows: Sequence[list[int]]) -> NDArray[np.float64]:
        """Return the sum of the token vectors of each window (its first one), [N, dimension].

        Sums, not means: the vectors are scaled to unit length in the end, and windows of one
        text have to count by their tokens.
        """
        batch = self._tokenizer.pad({"input_ids": list(windows)}, return_tensors="pt")
        batch = batch.to(self._model.device)
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state
            if self._pooling == "first":
                pooled = states[:, 0]
            else:
                pooled = (states * batch["attention_mask"].unsqueeze(-1)).sum(dim=1)
        vectors: NDArray[np.float64] = pooled.cpu().numpy().astype(np.float64)
        return vectors


def read_layout(path: Path) -> Layout:
    """Read the files of the sentence-transformers layout; without them the mean is taken.

    Raises:
        ModelError: a step or a pooling that would have to be left out.
    """
    if not (path / "modules.json").exists():
        return Layout()
    try:
        steps = json.loads((path / "modules.json").read_bytes())
        modules = {step["type"].rpartition(".")[2]: path / step["path"] for step in steps}
    except (ValueError, TypeError, LookupError) as error:
        raise ModelError(f"{path}: modules.json is damaged: {error}") from error
    if unknown := sorted(set(modules) - MODULES):
        raise ModelError(
            f"{path}: the step {unknown[0]!r} of modules.json is not known here; "
            f"allowed: {', '.join(sorted(MODULES))}"
        )
    pooling = _read_pooling(modules["Pooling"]) if "Pooling" in modules else "mean"
    limit = read_json(path / "sentence_bert_config.json").get("max_seq_length")
    return Layout(pooling, limit)


def _read_pooling(folder: Path) -> Literal["mean", "first"]:
    facts = read_json(folder / "config.json")
    chosen = [key for key, value in facts.items() if key.startswith("pooling_mode_") and value]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ModelError(
            f"{folder}: {' and '.join(chosen) or 'no pooling'} is not known here; "
            f"allowed: one of {', '.join(POOLINGS)}"
        )
    return POOLINGS[chosen[0]]
