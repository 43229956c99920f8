"""vLLM in the worker's process: requests are added one by one and stepped together.

vLLM chooses what a step reads and writes, keeps the prompts' prefixes and preempts when its cache
is full; so all that waits is given to it at once. Requests are token ids, and texts are made of
token ids here: both as `transformers` does, so that the two engines can be compared.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, TypeVar

import torch
import transformers
import vllm
from vllm import SamplingParams, envs
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from mas_batch.engine_info import NOT_PROMISED
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
from mas_batch.engines.torch_device import free_caches
from mas_batch.engines.vllm.adapters import adapter_request
from mas_batch.engines.vllm.choices import questions, scores
from mas_batch.engines.vllm.environment import Hardware, is_fault, memory
from mas_batch.engines.vllm.options import Options
from mas_batch.engines.vllm.replies import chosen, failed, next_logprobs, written
from mas_batch.errors import (
    EngineError,
    EngineLostError,
    EngineRefusedError,
    ModelError,
    OutOfMemoryError,
    Reason,
)
from mas_batch.models import ModelFiles

T = TypeVar("T")

MAX_TEMPERATURE = 2.0
"""vLLM refuses a higher one."""
_SEED_BITS = 62
"""Seeds of the samples of a request are counted up from its own, and have to fit 64 bits."""


@dataclass(slots=True)
class _Asked:
    """A request under way: one of vLLM's, or several that tell of its choices."""

    key: int
    request: Request
    sampling: Sampling
    choices: tuple[tuple[int, ...], ...] = ()
    """Tokens of `sampling.choices`."""
    left: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """vLLM's name of a request → what follows the prompt in it."""
    found: dict[tuple[int, ...], dict[int, float]] = field(default_factory=dict)
    """What follows the prompt → next token → its log-probability."""
    cached_tokens: int | None = None
    compute_s: float = 0.0


class VllmEngine:
    """One model, held by vLLM. See `load` in `engines.vllm.loading`."""

    takes_messages = True
    only_translates = False
    samples = True
    scores_choices = True
    max_batch_tokens: int | None = None  # vLLM makes its own batches

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        files: ModelFiles,
        config: EngineConfig,
        options: Options,
        here: Hardware,
    ) -> None:
        self._llm = llm
        self._vllm = llm.llm_engine
        self._tokenizer = tokenizer
        self._choices = ChoiceTokens(tokenizer, seq2seq=False)
        self._files = files
        self._config = config
        self._options = options
        self._here = here
        whole = self._vllm.vllm_config
        self.concurrent = options.partitions_at_once
        self.max_context_tokens: int = whole.model_config.max_model_len
        self._max_running: int = whole.scheduler_config.max_num_seqs
        self._adapters: dict[str, LoRARequest] = {}
        self._hashes: dict[str, str] = {}  # of the adapters
        self._own_keys = count(-1, -1)  # of `generate`; those of whoever calls `begin` are not < 0
        self._names = count()
        self._asked: dict[int, _Asked] = {}  # by key, in the order of vLLM's queue
        self._by_name: dict[str, _Asked] = {}
        self._refused: list[Finished] = []  # since the last step

    def tokenize(self, request: Request) -> TokenizedPrompt:
        """Tokenise the prompt.

        Raises:
            JobError: the model's chat template refuses the prompt.
        """
        text, special = chat_text(self._tokenizer, request.messages, self._files.source)
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return TokenizedPrompt(len(ids), ids)

    def add_adapter(self, name: str, files: ModelFiles) -> None:
        """Load a LoRA adapter; requests may name it from then on. Adding one again does nothing.

        Raises:
            JobError: its rank is over `max_lora_rank`.
            ModelError: it is no adapter of this model.
        """
        if name in self._adapters:
            return
        adapter = adapter_request(name, len(self._adapters) + 1, files, self._options)
        try:
            self._call(lambda: self._vllm.add_lora(adapter))
        except EngineLostError:
            raise
        except Exception as error:
            raise ModelError(f"{files.source}: {type(error).__name__}: {error}") from error
        self._adapters[name] = adapter
        self._hashes[name] = files.sha256

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Run a batch; see `Engine.generate`."""
        waiting = [Waiting(next(self._own_keys), request, sampling) for request in requests]
        found: dict[int, list[Completion]] = {}
        try:
            self.begin(waiting)
            while len(found) < len(requests):
                found.update((done.key, done.completions) for done in self.step())
        except BaseException:
            self.drop()  # else the next call would be given these answers
            raise
        return [found[one.key] for one in waiting]

    def can_step(self, sampling: Sampling) -> bool:
        """See `SteppingEngine.can_step`; what cannot be decoded so is refused by `generate`."""
        return sampling.num_beams == 1

    def begin(self, waiting: Sequence[Waiting]) -> list[int]:
        """Give all of them to vLLM; one that it refuses fails alone, at the next step.

        Raises:
            EngineRefusedError: vLLM cannot decode this way.
            EngineLostError: the engine is dead.
        """
        for sampling in {one.sampling for one in waiting}:
            _check(sampling)
        for one in waiting:
            start = time.perf_counter()
            asked = _Asked(one.key, one.request, one.sampling)
            try:
                self._call(lambda asked=asked: self._add(asked))  # type: ignore[misc]
            except EngineLostError:
                raise
            except Exception as error:
                self._forget(asked, error)
                message = f"{type(error).__name__}: {error}"
                failure = failed(self._num_read(asked), Reason.ENGINE_ERROR, message)
                completions = [failure] * one.sampling.num_samples
                self._refused.append(Finished(one.key, completions))
            else:
                self._asked[one.key] = asked
                asked.compute_s = time.perf_counter() - start
        return list(range(len(waiting)))

    def step(self) -> list[Finished]:
        """Have vLLM do one step; returns what has ended by it.

        Its seconds are shared by those that vLLM may be at: as many as it runs at once.

        Raises:
            EngineLostError: the engine is dead.
            EngineError: vLLM has lost a request.
            OutOfMemoryError: there was not enough for the step.
        """
        finished, self._refused = self._refused, []
        if not self._asked:
            return finished
        start = time.perf_counter()
        outputs = self._call(self._vllm.step)
        running = list(islice(self._asked.values(), self._max_running))
        share_s = (time.perf_counter() - start) / len(running)
        for asked in running:
            asked.compute_s += share_s
        for output in outputs:
            if (of := self._by_name.pop(output.request_id, None)) is None:
                continue  # of one that was dropped
            if completions := self._take(of, output):
                del self._asked[of.key]
                finished.append(Finished(of.key, completions))
        if self._asked and not outputs and not self._vllm.has_unfinished_requests():
            raise EngineError(f"vLLM has lost {len(self._asked)} requests")
        return finished

    def drop(self) -> None:
        """Forget everything under way, and prefixes that a failed step may not have written.

        Raises:
            EngineLostError: vLLM cannot.
        """
        names = list(self._by_name)
        self._asked.clear()
        self._by_name.clear()
        self._refused.clear()
        try:
            self._vllm.abort_request(names, internal=False)
            self._vllm.reset_prefix_cache()
        except Exception as error:
            raise EngineLostError(f"vLLM cannot begin anew: {error}") from error

    def describe(self) -> Mapping[str, Any]:
        """Facts for the manifest."""
        whole = self._vllm.vllm_config
        dtype = str(whole.model_config.dtype).removeprefix("torch.")
        invariant = bool(envs.VLLM_BATCH_INVARIANT)
        return {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": self._files.source,
            "sha256": self._files.sha256,
            "architecture": next(iter(whole.model_config.architectures), None),
            "device": self._here.kind,
            "dtype": dtype,
            "quantization": whole.model_config.quantization,
            "tensor_parallel": whole.parallel_config.tensor_parallel_size,
            "max_context_tokens": self.max_context_tokens,
            "max_num_seqs": self._max_running,
            "memory": memory(self._llm, self._here, in_process=self._config.tensor == 1),
            "prefix_caching": bool(whole.cache_config.enable_prefix_caching),
            "adapters": {name: {"sha256": digest} for name, digest in self._hashes.items()},
            "batch_invariant": invariant,
            "equal_output": _promise(invariant, self._here.kind, dtype),
            "options": self._options.model_dump(mode="json", exclude_defaults=True),
        }

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards. May be called again."""
        if "_llm" not in vars(self):
            return
        self._vllm.engine_core.shutdown()
        for name in ("_llm", "_vllm"):
            delattr(self, name)
        gc.collect()
        cleanup_dist_env_and_memory()

    def _add(self, asked: _Asked) -> None:
        """Hand a request to vLLM.

        Raises:
            EngineError: it names an adapter that is not here.
            Exception: what vLLM says of a prompt that it does not take.
        """
        name, sampling = asked.request.adapter, asked.sampling
        if name is not None and name not in self._adapters:
            raise EngineError(f"no adapter is called {name!r}")
        prompt = list(tokenized_prompt(self, asked.request).tokens)
        asked.choices = self._choices.after(prompt, sampling.choices)
        every: list[tuple[tuple[int, ...], SamplingParams]] = [
            (beginning, _one_token(tokens)) for beginning, tokens in questions(asked.choices)
        ]
        if not sampling.choices:
            every = [((), _as_vllm(sampling, asked.request.seed))]
        for beginning, params in every:
            own = str(next(self._names))
            asked.left[own] = beginning
            self._by_name[own] = asked
            self._vllm.add_request(
                own,
                {"type": "token", "prompt_token_ids": [*prompt, *beginning]},
                params,
                lora_request=self._adapters[name] if name is not None else None,
            )

    def _take(self, asked: _Asked, output: Any) -> list[Completion]:
        """Take what vLLM says; returns the request's completions when it has said all."""
        beginning = asked.left.pop(output.request_id)
        if not asked.sampling.choices:
            return written(output, self._decode, asked.compute_s)
        asked.found.setdefault(beginning, {}).update(next_logprobs(output))
        if not beginning:
            asked.cached_tokens = output.num_cached_tokens
        if asked.left:
            return []
        return chosen(
            asked.sampling,
            asked.choices,
            scores(asked.choices, asked.found),
            self._num_read(asked),
            asked.cached_tokens,
            asked.compute_s,
        )

    def _forget(self, asked: _Asked, why: Exception) -> None:
        """Take back what was added of a request.

        Raises:
            EngineLostError: vLLM cannot, so it has requests that nobody waits for.
        """
        for name in asked.left:
            del self._by_name[name]
        try:
            self._vllm.abort_request(list(asked.left), internal=False)
        except Exception as error:
            self.drop()
            raise EngineLostError(f"vLLM cannot take back a request: {error}") from why

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _num_read(self, asked: _Asked) -> int:
        return tokenized_prompt(self, asked.request).num_tokens

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except torch.OutOfMemoryError as error:
            message = f"{type(error).__name__}: {error}"
        except Exception as error:
            if is_fault(error):
                raise EngineLostError(f"{type(error).__name__}: {error}") from error
            raise
        # Only here: as long as the exception lives, its frames hold the step's tensors.
        free_caches()
        raise OutOfMemoryError(message)


def _check(sampling: Sampling) -> None:
    sampling.check()
    if sampling.num_beams > 1:
        raise EngineRefusedError("vllm has no beam search here; set sampling.num_beams to 1")
    if sampling.temperature > MAX_TEMPERATURE:
        raise EngineRefusedError(
            f"sampling.temperature {sampling.temperature:g} is not allowed; vllm allows "
            f"{MAX_TEMPERATURE:g} at most"
        )


def _as_vllm(sampling: Sampling, seed: int) -> SamplingParams:
    """Return it in vLLM's words; nothing is left to its defaults, or to a checkpoint's."""
    return SamplingParams(
        n=sampling.num_samples,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed % 2**_SEED_BITS,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _one_token(tokens: Sequence[int]) -> SamplingParams:
    """Return how to ask for the probabilities of these next tokens."""
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=list(tokens),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _promise(invariant: bool, device: str, dtype: str) -> str:
    """Say whether a request is answered in the same way whatever else is in the batch.

    In float32 on a CPU only tokens can swap that tie to within rounding, as with `transformers`.
    """
    if invariant:
        return "promised"
    return "but for ties" if device == "cpu" and dtype == "float32" else NOT_PROMISED
