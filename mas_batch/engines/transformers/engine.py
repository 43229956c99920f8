"""The reference engine: any decoder-only or encoder-decoder model that `transformers` knows.

Runs on a CPU, CUDA or MPS. Weights come from safetensors only, and no code of a checkpoint is
run. Of a checkpoint's `generation_config` only token ids are heeded: how to decode is the job's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import transformers
from transformers.utils import logging as transformers_logging

from mas_batch.engines.base import (
    Completion,
    EngineConfig,
    Finished,
    Request,
    Sampling,
    TokenizedPrompt,
    Waiting,
    tokenized_prompt,
)
from mas_batch.engines.chat import chat_text
from mas_batch.engines.choice_tokens import ChoiceTokens
from mas_batch.engines.decoding import Decoded, completion, completions
from mas_batch.engines.torch_device import free_caches, run_freeing, torch_device
from mas_batch.engines.transformers.adapters import Adapters
from mas_batch.engines.transformers.beams import beam_search
from mas_batch.engines.transformers.checkpoints import (
    checkpoint,
    load_model,
    load_tokenizer,
)
from mas_batch.engines.transformers.choices import (
    Scores,
    choice_completions,
    score_packed,
    score_stream,
)
from mas_batch.engines.transformers.network import Network, can_pack
from mas_batch.engines.transformers.options import Options, read
from mas_batch.engines.transformers.perplexity import Passage, module_logits, perplexity
from mas_batch.engines.transformers.prefixes import Prefixes
from mas_batch.engines.transformers.quantized import (
    load_settings,
    measure_whole,
    quantized_facts,
)
from mas_batch.engines.transformers.running import Asked, Running
from mas_batch.engines.transformers.streams import SpecialTokens, Stream, open_stream
from mas_batch.engines.transformers.transformers_compat import model_length, silence_torchao
from mas_batch.errors import EngineError, JobError
from mas_batch.models import ModelFiles

T = TypeVar("T")

DTYPES = ("auto", "float32", "bfloat16", "float16")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
"""Where configurations say how many positions there are."""


class TransformersEngine:
    """One model in memory with its tokenizer. See `load`.

    `Completion.token_ids` are without the end token; `num_tokens` and `sum_logprob` count it.
    """

    samples = True
    scores_choices = True

    def __init__(
        self, model: Any, tokenizer: Any, files: ModelFiles, config: EngineConfig, options: Options
    ) -> None:
        self.facts: dict[str, Any] = {}
        """More of `describe`: what whoever loads it has found."""
        self._model = model
        self._tokenizer = tokenizer
        self._files = files
        self._options = options
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self._special = _special_tokens(model, tokenizer, options)
        self.takes_messages = not self._seq2seq or options.reads == "messages"
        self.only_translates = not self.takes_messages
        self.max_context_tokens = _context_limit(model.config, tokenizer, options, files)
        self.max_batch_tokens = config.max_batch_tokens
        self._adapters = Adapters(model, files)
        packed = options.pack_weights and can_pack(model)
        self._network = Network(model, self._adapters) if packed else None
        self._prefixes = Prefixes() if options.share_prefixes else None
        self._choices = ChoiceTokens(tokenizer, seq2seq=self._seq2seq)
        self._running = self._open()

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Tokenise the prompt, or the source for an encoder.

        Raises:
            JobError: the model's chat template refuses the prompt.
        """
        text, special = self._prompt(request)
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return TokenizedPrompt(len(ids), ids)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Run one batch; see `Engine.generate`."""
        if not requests:
            return []
        if self.can_step(sampling):
            return self._generate(requests, sampling)
        found: dict[int, list[Completion]] = {}
        for name in dict.fromkeys(request.adapter for request in requests):
            own = [i for i, request in enumerate(requests) if request.adapter == name]
            with self._adapters.used([name]):
                answers = self._generate([requests[i] for i in own], sampling)
            found.update(zip(own, answers, strict=True))
        return [found[i] for i in range(len(requests))]

    def add_adapter(self, name: str, files: ModelFiles) -> None:
        """Load a LoRA adapter: from now on requests may name it.

        Raises:
            ModelError: see `adapter_files.read_adapter`.
        """
        self._adapters.add(name, files)

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Run one batch, of one adapter unless its rows can be stepped."""
        prompts = [self._tokens(request, sampling) for request in requests]
        if sampling.choices:
            return self._score(prompts, sampling, requests[0].adapter)
        if sampling.num_beams > 1:
            start = time.perf_counter()
            with torch.inference_mode():
                found = run_freeing(
                    lambda: beam_search(self._model, prompts, self._special, sampling)
                )
            total_s = time.perf_counter() - start
            best = [[decoded] for decoded in found]
            found_rows = completions(prompts, best, self._read, total_s=total_s, prefill_s=None)
            return [[replace(one, cached_tokens=0) for one in row] for row in found_rows]
        running = self._open()
        asked = [
            Asked(i, prompt, sampling, request.seed, request.adapter)
            for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        self._call(lambda: running.begin(asked))
        while running.num_asked:
            self._call(running.step)
        return [self._completions(one) for one in asked]

    def can_step(self, sampling: Sampling) -> bool:
        """See `SteppingEngine.can_step`: no beams, and a cache whose rows can be put together."""
        return sampling.num_beams == 1 and not sampling.choices and self._running.joinable

    def begin(self, waiting: Sequence[Waiting]) -> list[int]:
        """See `SteppingEngine.begin`."""
        asked = [
            Asked(
                one.key, self._tokens(one.request, one.sampling), one.sampling, one.request.seed,
                one.request.adapter,
            )
            for one in waiting
        ]  # fmt: skip
        chosen = self._running.choose(asked, self.max_batch_tokens)
        if chosen:
            self._call(lambda: self._running.begin([asked[i] for i in chosen]))
        return chosen

    def step(self) -> list[Finished]:
        """See `SteppingEngine.step`."""
        return [Finished(one.key, self._completions(one)) for one in self._call(self._running.step)]

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return self._running.num_asked

    def drop(self) -> None:
        """Forget everything under way."""
        self._running = self._open()

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest."""
        return {
            "engine": "transformers",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": self._files.source,
            "sha256": self._files.sha256,
            "architecture": type(self._model).__name__,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "packed_weights": self._network is not None,
            "threads": torch.get_num_threads(),
            "max_context_tokens": self.max_context_tokens,
            "options": self._options.model_dump(mode="json", exclude_defaults=True),
            **({"adapters": dict(facts)} if (facts := self._adapters.facts) else {}),
            **self.facts,
        }

    def perplexity(self, asked: Sequence[Passage]) -> float:
        """Return that of passages, computed as answers are."""
        logits = module_logits(self._model)
        if (network := self._network) is not None:  # of decoder-only models, which read no source
            logits = lambda passage: network.read(passage.tokens)  # noqa: E731
        return self._call(lambda: perplexity(logits, asked))

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards. May be called again."""
        for name in ("_model", "_network", "_running", "_prefixes", "_adapters"):
            vars(self).pop(name, None)
        free_caches()

    def _prompt(self, request: Request) -> tuple[str, bool]:
        """Return what the model reads, and whether the tokenizer adds its special tokens."""
        if not self.takes_messages:
            return self._options.prefix + request.text, True
        if self._seq2seq or not self._tokenizer.chat_template:
            turns = "\n\n".join(message.content for message in request.messages)
            return self._options.prefix + turns, True
        return chat_text(self._tokenizer, request.messages, self._files.source)

    def _score(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, adapter: str | None
    ) -> list[list[Completion]]:
        """Return how likely each of the choices is after each prompt."""
        start = time.perf_counter()
        choices = [self._choices.after(prompt, sampling.choices) for prompt in prompts]
        for prompt, own in zip(prompts, choices, strict=True):
            if len(prompt) + (longest := max(map(len, own))) > self.max_context_tokens:
                raise EngineError(
                    f"{len(prompt)} prompt tokens + {longest} of a choice are over the model's "
                    f"context of {self.max_context_tokens}"
                )

        def score() -> Scores:
            if self._network is not None:
                return score_packed(self._network, prompts, choices, self._prefixes, adapter)
            return score_stream(
                self._stream, self._special, prompts, choices, self.max_batch_tokens
            )

        scores = self._call(score)
        total_s = time.perf_counter() - start
        return choice_completions(prompts, choices, scores, sampling, total_s)

    def _stream(self) -> Stream:
        return open_stream(self._model, self._special, self._network, self._prefixes)

    def _open(self) -> Running:
        return Running(self._stream(), self._special, self._adapters)

    def _call(self, call: Callable[[], T]) -> T:
        with torch.inference_mode():
            return run_freeing(call)

    def _tokens(self, request: Request, sampling: Sampling) -> list[int]:
        sampling.check()
        if request.adapter is not None and request.adapter not in self._adapters:
            raise EngineError(f"the adapter {request.adapter!r} was not added")
        tokens: list[int] = tokenized_prompt(self, request).tokens
        if not tokens:
            raise EngineError(f"request {request.request_id!r} has no tokens")
        return tokens

    def _completions(self, asked: Asked) -> list[Completion]:
        prefill_s = asked.prefill_s / len(asked.results)
        # All samples but the first have the prompt as it was read for that one.
        cached = [asked.cached_tokens, *[len(asked.prompt)] * (len(asked.results) - 1)]
        return [
            replace(
                completion(
                    asked.prompt, row.decoded, self._read, row.decode_s + prefill_s, prefill_s
                ),
                cached_tokens=num,
            )
            for row, num in zip(asked.results, cached, strict=True)
        ]

    def _read(self, decoded: Decoded) -> tuple[str, list[int]]:
        kept = decoded.tokens[:-1] if decoded.ended else decoded.tokens
        return self._tokenizer.decode(kept, skip_special_tokens=True).strip(), kept


def load(model: ModelFiles, config: EngineConfig) -> TransformersEngine:
    """Load a directory of safetensors, or a .gguf file by way of safetensors made once.

    Raises:
        JobError: an option, device or dtype that is unknown or not to be had here.
        ModelError: no safetensors, no tokenizer, or an architecture that cannot be decoded.
    """
    options = read(config.options)
    device = torch_device(config, ("cuda", "mps", "cpu"))
    if config.dtype not in DTYPES:
        raise JobError(f"{config.dtype!r}; allowed: {', '.join(DTYPES)}", key="agents.dtype")
    dtype = config.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # greedy answers then don't depend on the batch; bfloat16 is slow
    transformers_logging.disable_progress_bar()
    silence_torchao()
    path = checkpoint(model, dtype)
    tokenizer = load_tokenizer(path, model)

    def whole(**how: Any) -> Any:
        return load_model(path, model, options, dtype, **how).to(device).eval()

    if config.quantize is None:
        return TransformersEngine(whole(), tokenizer, model, config, options)
    how = load_settings(config.quantize, device)
    before = measure_whole(whole, tokenizer)
    engine = TransformersEngine(whole(**how), tokenizer, model, config, options)
    after = None if before is None else engine.perplexity(before.asked)
    engine.facts |= quantized_facts(model.source, config.quantize, before, after)
    free_caches()  # what loading and comparing took is more than what is left
    return engine


def _special_tokens(model: Any, tokenizer: Any, options: Options) -> SpecialTokens:
    """Take the ids, and only those, out of the checkpoint's defaults for `generate`."""
    given = model.generation_config
    end = given.eos_token_id if given.eos_token_id is not None else tokenizer.eos_token_id
    ends = [end] if isinstance(end, int) else end or []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    words = given.bad_words_ids or []
    banned = {word[0] for word in words if len(word) == 1} | set(given.suppress_tokens or [])
    # What is left here would be filled into every later call of `generate`: a checkpoint's
    # repetition penalty, minimum length, forced end…
    model.generation_config = transformers.GenerationConfig()
    special = SpecialTokens(frozenset(ends), pad, banned=tuple(sorted(banned)))
    if not model.config.is_encoder_decoder:
        return special
    start = given.decoder_start_token_id
    return replace(
        special,
        decoder_start=given.bos_token_id if start is None else start,
        forced_first=_language(tokenizer, options) or given.forced_bos_token_id,
    )


def _language(tokenizer: Any, options: Options) -> int | None:
    """Set the source's language in the tokenizer; return the target's token."""
    ids: dict[str, int] = {}
    for key in ("source_lang", "target_lang"):
        if (code := getattr(options, key)) is None:
            continue
        ids[key] = tokenizer.convert_tokens_to_ids(code)
        if ids[key] in (None, tokenizer.unk_token_id):
            raise JobError(f"{code!r} is no token of this model", key=f"agents.options.{key}")
    if options.source_lang is not None:
        tokenizer.src_lang = options.source_lang
    return ids.get("target_lang")


def _context_limit(config: Any, tokenizer: Any, options: Options, files: ModelFiles) -> int:
    """Return the model's limit or the lower one asked for.

    An encoder-decoder has one limit per side, but is held to their sum like all others.
    """
    text_config = config.get_text_config()
    found = (getattr(text_config, key, None) for key in CONTEXT_KEYS)
    own = next((n for n in found if isinstance(n, int) and n > 0), None)
    if own is None:
        own = model_length(tokenizer)
    asked, key = options.max_context_tokens, "agents.options.max_context_tokens"
    if own is None and asked is None:
        raise JobError(f"{files.source} does not say its context length: it is required", key=key)
    if own is not None and asked is not None and asked > own:
        raise JobError(f"{asked} is over the {own} tokens of {files.source}", key=key)
    return asked or own or 0
