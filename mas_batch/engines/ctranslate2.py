"""Encoder-decoder models converted to CTranslate2: opus-mt, T5, BART and the like.

The fast engine for encoder-decoder work on a CPU; decoder-only models belong to `transformers`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctranslate2

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Request,
    Sampling,
    TokenizedPrompt,
    tokenized_prompt,
)
from mas_batch.engines.ctranslate2_options import read
from mas_batch.engines.devices import pick_device
from mas_batch.errors import JobError, ModelError, OutOfMemoryError
from mas_batch.models import ModelFiles

log = logging.getLogger(__name__)

VOCABULARIES = ("shared_vocabulary.json", "target_vocabulary.json")
INNER_BATCH_TOKENS = 8192
"""Source tokens at once where the job sets no `max_batch_tokens`: CTranslate2 then splits."""


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """Text to the model's token strings and back."""

    name: str
    encode: Callable[[str], list[str]]
    """The source as the model wants it, except an end token that CTranslate2 adds itself."""
    decode: Callable[[list[str]], str]
    """Takes the output without its end token."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the converter wrote beside the weights."""

    eos_token: str
    adds_source_eos: bool
    """CTranslate2 itself ends the source; a second end token would change the output."""
    token_ids: Mapping[str, int]
    """Of the target vocabulary."""


class CTranslate2Engine:
    """The engine `ctranslate2`: texts in, outputs out; prompts are not read.

    It loads a converted model: `model.bin`, `config.json`, a vocabulary and a tokenizer's files.
    CTranslate2 draws samples from a generator of its own that a running engine cannot reseed,
    so `Request.seed` has no effect on it; `describe()` says so.

    Raises:
        JobError: an option, dtype, compute type or device that this engine does not know.
        ModelError: a file is missing or damaged, or the model is not an encoder-decoder.
    """

    takes_messages = False
    only_translates = True
    samples = True

    def __init__(self, model: ModelFiles, config: EngineConfig) -> None:
        options = read(config.options)
        self.max_context_tokens = options.max_context_tokens
        self.max_batch_tokens = config.max_batch_tokens
        self._model = model
        self._threads = config.threads
        self._warned = False
        here = {"cuda": ctranslate2.get_cuda_device_count(), "cpu": 1}
        device, index = pick_device(config.device, here)
        compute_type = _compute_type(options.compute_type, config.dtype, device)
        if model.path is None or not model.path.is_dir():
            raise ModelError(f"{model.source}: a converted model is a directory")
        self._settings = _read_settings(model.path)
        self._tokenizer = _read_tokenizer(model.path, self._settings)
        try:
            self._translator = ctranslate2.Translator(
                str(model.path),
                device,
                device_index=index or 0,
                compute_type=compute_type,
                inter_threads=1,
                intra_threads=config.threads,
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{model.path}: CTranslate2 cannot load it: {error}") from error

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Tokenise the source; its end token is counted where CTranslate2 adds it, too."""
        tokens = self._tokenizer.encode(request.text)
        return TokenizedPrompt(len(tokens) + self._settings.adds_source_eos, tokens)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Run one batch; see `Engine.generate`. Samples are not reproducible."""
        if not requests:
            return []
        sampling.check()
        if sampling.temperature > 0 and not self._warned:
            self._warned = True
            log.warning("ctranslate2 ignores seeds: another run will draw other samples")
        start = time.perf_counter()
        prompts = [tokenized_prompt(self, request) for request in requests]
        try:
            results = self._translator.translate_batch(
                [prompt.tokens for prompt in prompts],
                max_batch_size=self.max_batch_tokens or INNER_BATCH_TOKENS,
                batch_type="tokens",
                **_search(sampling),
            )
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise OutOfMemoryError(str(error)) from error
        lengths = [prompt.num_tokens for prompt in prompts]
        counts = [n + len(h) for n, r in zip(lengths, results, strict=True) for h in r.hypotheses]
        token_s = (time.perf_counter() - start) / sum(counts)
        return [
            [
                self._completion(tokens, score, sampling, length, token_s)
                for tokens, score in zip(result.hypotheses, result.scores, strict=True)
            ]
            for result, length in zip(results, lengths, strict=True)
        ]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest."""
        return {
            "engine": "ctranslate2",
            "ctranslate2": ctranslate2.__version__,
            "model": self._model.source,
            "sha256": self._model.sha256,
            "tokenizer": self._tokenizer.name,
            "device": self._translator.device,
            "dtype": self._translator.compute_type,
            "threads": self._threads,
            "max_context_tokens": self.max_context_tokens,
            "reproducible_samples": False,
        }

    def close(self) -> None:
        """Free the model; may be called again."""
        self._translator.unload_model()

    def _completion(
        self, tokens: list[str], score: float, sampling: Sampling, num_source: int, token_s: float
    ) -> Completion:
        """Spread the batch's time over its tokens, read and written, at `token_s` each."""
        # A source without text is answered by CTranslate2 itself: no token, not even the end.
        ended = not tokens or tokens[-1] == self._settings.eos_token
        # A beam's score is the mean over all its tokens, an end token that was generated
        # included; the others are asked for with length_penalty 0, which leaves the sum.
        sum_logprob = score * len(tokens) if sampling.num_beams > 1 else score
        return Completion(
            text=self._tokenizer.decode(tokens[:-1] if ended else tokens),
            token_ids=tuple(self._settings.token_ids[token] for token in tokens),
            sum_logprob=sum_logprob if tokens else None,
            num_tokens=len(tokens),
            finish_reason="stop" if ended else "length",
            prompt_tokens=num_source,
            compute_s=token_s * (num_source + len(tokens)),
        )


load = CTranslate2Engine


def _search(sampling: Sampling) -> dict[str, Any]:
    """Translate `Sampling` to arguments of `translate_batch`."""
    search = {
        "max_decoding_length": sampling.max_new_tokens,
        "min_decoding_length": 0,
        "max_input_length": 0,  # by default a longer source is cut without a word
        "beam_size": sampling.num_beams,
        "length_penalty": 1.0 if sampling.num_beams > 1 else 0.0,
        "return_scores": True,
        "return_end_token": True,
    }
    if sampling.temperature > 0:
        search |= {
            "num_hypotheses": sampling.num_samples,
            "sampling_temperature": sampling.temperature,
            "sampling_topk": sampling.top_k,
            "sampling_topp": sampling.top_p,
        }
    return search


def _compute_type(option: str | None, dtype: str, device: str) -> str:
    """Choose the arithmetic: the option first, then the dtype, float32 on a CPU by default."""
    automatic = "float32" if device == "cpu" else "default"
    key = "dtype" if option is None else "options.compute_type"
    wanted = option or (automatic if dtype == "auto" else dtype)
    allowed = sorted({"default", "auto", *ctranslate2.get_supported_compute_types(device)})
    if wanted not in allowed:
        message = f"{wanted!r} cannot run on {device}; allowed: {', '.join(allowed)}"
        raise JobError(message, key=f"agents.{key}")
    return str(wanted)


def _read_settings(path: Path) -> _Settings:
    config = _read_json(path / "config.json", dict)
    if "decoder_start_token" not in config:
        raise ModelError(f"{path}: not a converted encoder-decoder: no decoder_start_token")
    found = [path / name for name in VOCABULARIES if (path / name).exists()]
    if not found:
        raise ModelError(f"{path}: needs {' or '.join(VOCABULARIES)}; convert the model anew")
    ids: dict[str, int] = {}
    for i, token in enumerate(_read_json(found[0], list)):
        ids.setdefault(token, i)
    return _Settings(config.get("eos_token", "</s>"), bool(config.get("add_source_eos")), ids)


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise ModelError(f"{path}: not a JSON {kind.__name__}")
    return content


def _read_tokenizer(path: Path, settings: _Settings) -> _Tokenizer:
    """Take a Hugging Face tokenizer where there is one, else a pair of SentencePiece models."""
    if (path / "tokenizer.json").exists() or (path / "tokenizer_config.json").exists():
        return _hugging_face(path, settings)
    if (path / "source.spm").exists() and (path / "target.spm").exists():
        return _sentencepiece(path, settings)
    needed = "tokenizer.json and tokenizer_config.json, or source.spm and target.spm"
    raise ModelError(f"{path}: no tokenizer; copy {needed} beside model.bin")


def _hugging_face(path: Path, settings: _Settings) -> _Tokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def encode(text: str) -> list[str]:
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        tokens: list[str] = tokenizer.convert_ids_to_tokens(ids)
        twice = settings.adds_source_eos and tokens[-1:] == [settings.eos_token]
        return tokens[:-1] if twice else tokens

    def decode(tokens: list[str]) -> str:
        ids = tokenizer.convert_tokens_to_ids(tokens)
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return _Tokenizer(type(tokenizer).__name__, encode, decode)


def _sentencepiece(path: Path, settings: _Settings) -> _Tokenizer:
    from sentencepiece import SentencePieceProcessor as Pieces

    try:
        source, target = (Pieces(model_file=str(path / f"{n}.spm")) for n in ("source", "target"))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from error
    end = [] if settings.adds_source_eos else [settings.eos_token]
    return _Tokenizer(
        "sentencepiece",
        encode=lambda text: [*source.encode(text, out_type=str), *end],
        decode=lambda tokens: str(target.decode_pieces(tokens)),
    )
