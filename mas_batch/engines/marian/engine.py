"""Translation with Marian's "tiny" models (Mozilla's Firefox layout), in PyTorch, float32.

Marian's own engines know greedy and beam search only; this one also samples and returns
log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.decoding import Decoded, completions, greedy
from mas_batch.engines.marian.decoding import beam_search, decode
from mas_batch.engines.marian.format import read_marian
from mas_batch.engines.marian.network import Network, State
from mas_batch.engines.marian.options import read
from mas_batch.engines.sampling import Sampler
from mas_batch.engines.torch_device import free_caches, run_freeing, torch_device, wait_for
from mas_batch.errors import EngineError, JobError, ModelError
from mas_batch.models import ModelFiles


class MarianEngine:
    """The engine `marian`: sentences in, translations out; prompts are not read.

    It loads a directory of `*.intgemm.alphas.bin` and `vocab*.spm`.

    Raises:
        JobError: an option, dtype or device that this engine does not know.
        ModelError: a file is missing or damaged, or the model is of another architecture.
    """

    takes_messages = False
    only_translates = True
    samples = True

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        options = read(config.options)
        self.max_context_tokens = options.max_context_tokens
        self.max_batch_tokens = config.max_batch_tokens
        self._model = model
        if config.dtype not in ("auto", "float32"):
            raise JobError(
                f"engine marian computes in float32, not {config.dtype!r}; allowed: auto, float32",
                key="agents.dtype",
            )
        device = torch_device(config, ("cuda", "cpu"))
        vocabulary = _only_file(model, "vocab*.spm")
        file = read_marian(_only_file(model, "*.intgemm.alphas.bin"))
        self._pieces = _read_pieces(vocabulary)
        self._network = Network(file, device, self._pieces.unk_id(), self.max_context_tokens)
        num_rows, num_pieces = len(self._network.embedding), self._pieces.get_piece_size()
        if num_rows != num_pieces:
            raise ModelError(f"{vocabulary}: {num_pieces} pieces, {file.path.name} has {num_rows}")

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Cut the source into pieces, and end it."""
        source = [*self._pieces.encode(request.text), self._pieces.eos_id()]
        return TokenizedPrompt(len(source), source)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Translate one batch; see `Engine.generate`. A sample depends on its request's seed and
        its number alone, up to rounding where a draw falls on the border of two tokens."""
        if not requests:
            return []
        start = time.perf_counter()
        sources: list[list[int]] = [tokenized_prompt(self, request).tokens for request in requests]
        longest = max(map(len, sources))
        if longest + sampling.max_new_tokens > self.max_context_tokens:
            raise EngineError(
                f"{longest} source tokens + {sampling.max_new_tokens} new are over the context "
                f"of {self.max_context_tokens}"
            )
        sampling.check()
        seeds = [request.seed for request in requests]
        with torch.inference_mode():
            found, prefill_s = run_freeing(lambda: self._decode(seeds, sources, sampling))
        total_s = time.perf_counter() - start
        return completions(sources, found, self._read, total_s=total_s, prefill_s=prefill_s)

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest."""
        return {
            "engine": "marian",
            "torch": torch.__version__,
            "sentencepiece": sentencepiece.__version__,
            "model": self._model.source,
            "sha256": self._model.sha256,
            "device": str(self._network.device),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "max_context_tokens": self.max_context_tokens,
        }

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards. May be called again."""
        vars(self).pop("_network", None)
        free_caches()

    def _decode(
        self, seeds: Sequence[int], sources: Sequence[Sequence[int]], sampling: Sampling
    ) -> tuple[list[list[Decoded]], float]:
        """Return the hypotheses per source, and the seconds of encoding the sources."""
        network = self._network
        start = time.perf_counter()
        state = network.encode(sources, sampling.num_beams)
        wait_for(network.device)
        prefill_s = time.perf_counter() - start
        return self._extend(state, seeds, len(sources), sampling), prefill_s

    def _extend(
        self, state: State, seeds: Sequence[int], num_sources: int, sampling: Sampling
    ) -> list[list[Decoded]]:
        network, length, eos_id = self._network, sampling.max_new_tokens, self._pieces.eos_id()
        if sampling.num_beams > 1:
            return [[best] for best in beam_search(network, state, length, eos_id)]
        if sampling.temperature == 0:
            return [[h] for h in decode(network, state, length, eos_id, greedy)]
        n = sampling.num_samples
        groups = torch.arange(num_sources, device=network.device).repeat_interleave(n)
        streams = [
            np.random.SeedSequence((seed % 2**64, sample)) for seed in seeds for sample in range(n)
        ]
        choose = Sampler(sampling, streams)
        flat = decode(network, state.select(groups), length, eos_id, choose)
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _read(self, decoded: Decoded) -> tuple[str, list[int]]:
        kept = decoded.tokens[:-1] if decoded.ended else decoded.tokens
        return self._pieces.decode(kept), decoded.tokens


load = MarianEngine


def _only_file(model: ModelFiles, pattern: str) -> Path:
    found = sorted(model.path.glob(pattern)) if model.path else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{model.source}: needs one {pattern} in its directory; found: {names}")
    return found[0]


def _read_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from error
