"""Translation with Marian's "tiny" models (Mozilla's Firefox layout), in PyTorch, float32.

Marian's own engines know greedy and beam search only; this one also samples and returns
log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from mas_batch.engines.base import Completion, EngineConfig, Request, Sampling
from mas_batch.engines.marian.decoding import Hypothesis, beam_search, decode, greedy, sampler
from mas_batch.engines.marian.format import read_marian
from mas_batch.engines.marian.network import Network, State
from mas_batch.engines.timing import BatchTime, batch_time
from mas_batch.errors import EngineError, JobError, ModelError, OutOfMemoryError
from mas_batch.models import ModelFiles

MAX_CONTEXT_TOKENS = 1024
"""Default of the option `max_context_tokens`, source plus translation. Sinusoidal positions have
no end, but these models are trained on sentences: callers split long texts before they ask."""
OPTIONS = {"max_context_tokens": MAX_CONTEXT_TOKENS}


def load(model: ModelFiles, config: EngineConfig) -> MarianEngine:
    """Load a directory of `*.intgemm.alphas.bin` and `vocab*.spm`.

    Raises:
        JobError: an option, dtype or device that this engine does not know.
        ModelError: a file is missing or damaged, or the model is of another architecture.
    """
    return MarianEngine(model, config)


class MarianEngine:
    """The engine `marian`: sentences in, translations out; prompts are not read."""

    takes_messages = False
    only_translates = True
    samples = True

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        self.max_context_tokens = _context_option(config.options)
        self.max_batch_tokens = config.max_batch_tokens
        self._model = model
        device = _device(config)
        if config.threads > 0:
            torch.set_num_threads(config.threads)
        vocabulary = _only_file(model, "vocab*.spm")
        file = read_marian(_only_file(model, "*.intgemm.alphas.bin"))
        self._pieces = _read_pieces(vocabulary)
        self._network = Network(file, device, self._pieces.unk_id(), self.max_context_tokens)
        num_rows, num_pieces = len(self._network.embedding), self._pieces.get_piece_size()
        if num_rows != num_pieces:
            raise ModelError(f"{vocabulary}: {num_pieces} pieces, {file.path.name} has {num_rows}")

    def prompt_tokens(self, request: Request) -> int:
        """Count the source's pieces and its end token."""
        return len(self._source(request))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Translate one batch; see `Engine.generate`. A sample depends on its request's seed and
        its number alone, up to rounding where a draw falls on the border of two tokens."""
        if not requests:
            return []
        start = time.perf_counter()
        sources = [self._source(request) for request in requests]
        self._check(max(map(len, sources)), sampling)
        with torch.inference_mode(), _named_errors():
            seeds = [request.seed for request in requests]
            found, prefill_s = self._decode(seeds, sources, sampling)
        spent = batch_time(
            time.perf_counter() - start,
            prefill_s,
            [len(source) for source in sources],
            [[len(h.tokens) for h in hypotheses] for hypotheses in found],
        )
        return [
            [self._completion(hypothesis, len(source), spent) for hypothesis in hypotheses]
            for source, hypotheses in zip(sources, found, strict=True)
        ]

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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _source(self, request: Request) -> list[int]:
        return [*self._pieces.encode(request.text), self._pieces.eos_id()]

    def _check(self, longest: int, sampling: Sampling) -> None:
        if longest + sampling.max_new_tokens > self.max_context_tokens:
            raise EngineError(
                f"{longest} source tokens + {sampling.max_new_tokens} new are over the context "
                f"of {self.max_context_tokens}"
            )
        if sampling.temperature > 0 and sampling.num_beams > 1:
            raise EngineError(f"num_beams {sampling.num_beams} needs temperature 0")
        if sampling.temperature == 0 and sampling.num_samples > 1:
            raise EngineError(f"num_samples {sampling.num_samples} needs a temperature above 0")

    def _decode(
        self, seeds: Sequence[int], sources: Sequence[Sequence[int]], sampling: Sampling
    ) -> tuple[list[list[Hypothesis]], float]:
        """Return the hypotheses per source, and the seconds of encoding the sources."""
        network = self._network
        start = time.perf_counter()
        state = network.encode(sources, sampling.num_beams)
        if network.device.type == "cuda":
            torch.cuda.synchronize(network.device)
        prefill_s = time.perf_counter() - start
        return self._extend(state, seeds, len(sources), sampling), prefill_s

    def _extend(
        self, state: State, seeds: Sequence[int], num_sources: int, sampling: Sampling
    ) -> list[list[Hypothesis]]:
        network, length, eos_id = self._network, sampling.max_new_tokens, self._pieces.eos_id()
        if sampling.num_beams > 1:
            return [[best] for best in beam_search(network, state, length, eos_id)]
        if sampling.temperature == 0:
            return [[h] for h in decode(network, state, length, eos_id, greedy)]
        n = sampling.num_samples
        groups = torch.arange(num_sources, device=network.device).repeat_interleave(n)
        choose = sampler(sampling, [(seed, sample) for seed in seeds for sample in range(n)])
        flat = decode(network, state.select(groups), length, eos_id, choose)
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _completion(self, h: Hypothesis, num_source: int, spent: BatchTime) -> Completion:
        compute_s, prefill_s = spent.share(num_source, len(h.tokens))
        return Completion(
            text=self._pieces.decode(h.tokens[:-1] if h.ended else h.tokens),
            token_ids=tuple(h.tokens),
            sum_logprob=h.sum_logprob,
            num_tokens=len(h.tokens),
            finish_reason="stop" if h.ended else "length",
            prompt_tokens=num_source,
            compute_s=compute_s,
            prefill_s=prefill_s,
        )


def _context_option(options: Mapping[str, Any]) -> int:
    if unknown := sorted(options.keys() - OPTIONS):
        raise JobError(
            f"engine marian does not know {', '.join(unknown)}; allowed: {', '.join(OPTIONS)}",
            key="agents.options",
        )
    value = options.get("max_context_tokens", MAX_CONTEXT_TOKENS)
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise JobError(
            f"{value!r} is not a number of tokens; allowed: whole numbers from 2",
            key="agents.options.max_context_tokens",
        )
    return value


def _device(config: EngineConfig) -> torch.device:
    if config.dtype not in ("auto", "float32"):
        raise JobError(
            f"engine marian computes in float32, not {config.dtype!r}; allowed: auto, float32",
            key="agents.dtype",
        )
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise JobError(
            f"engine marian cannot use {name!r}; allowed: auto, cpu, cuda, cuda:N",
            key="agents.device",
        )
    return torch.device(name)


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


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turn torch's ways to say out of memory into ours; on a CPU it is a RuntimeError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(str(error)) from error
