"""The forward pass of models of the Llama family on CPUs, as few and as large calls as it takes.

Its weights are those of the module of `transformers`, once more, in the order in which oneDNN
multiplies them: its kernels are then twice as fast as those that a plain matrix gets, at a few
rows as at thousands. Rows are packed: a token is computed once, and nothing else is.

Rounding differs from the module's by about 1e-5 in float32 logits, as between batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from mas_batch.engines.transformers.adapters import Adapted, Adapters
from mas_batch.engines.transformers.int8_weight import Int8Weight, is_rounded
from mas_batch.engines.transformers.transformers_compat import is_joinable

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of these parts and no others, unless their attention forgets."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions that do not depend on how long the longest row is."""

OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
"""PyTorch's own names, not documented, for what its compiler calls: not in every build."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [tokens, heads, size], keys and values [tokens, key heads, size]) →
[tokens, heads × size]."""


def can_pack(model: Any) -> bool:
    """Whether a model is one of the family, on a device and in a dtype that oneDNN multiplies."""
    config = model.config
    if type(model).__name__ not in FAMILY or model.device.type != "cpu":
        return False
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.hidden_act != "silu" or rope not in STATIC_ROPE:
        return False
    if not torch.backends.mkldnn.is_available() or not is_joinable(DynamicCache(config=config)):
        return False
    ops = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in OPERATIONS):
        return False
    fast_bf16 = model.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
    return model.dtype == torch.float32 or bool(fast_bf16)


class Network:
    """Layers, embeddings and the vocabulary's projection of a model for which `can_pack`."""

    def __init__(self, model: Any, adapters: Adapters | None = None) -> None:
        base = model.model
        self._adapters = adapters
        attention = base.layers[0].self_attn
        self.size: int = attention.head_dim
        self.num_heads: int = attention.q_proj.out_features // self.size
        self.num_key_heads: int = attention.k_proj.out_features // self.size
        self.num_layers = len(base.layers)
        self.dtype: torch.dtype = model.dtype
        self.scale: float = attention.scaling
        self._embedding = base.embed_tokens.weight
        self._rotary = base.rotary_emb
        self._layers = [_Layer(layer, f"model.layers.{i}") for i, layer in enumerate(base.layers)]
        self._norm = base.norm
        # Where memory is to be saved it is not held a second time, packed: it would be the most.
        quantized = is_rounded(base.layers[0].mlp.up_proj.weight)
        self._head = _Linear({"lm_head": model.lm_head}, packed=not quantized)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, order: Tensor | None = None
    ) -> Tensor:
        """Return the last layer's states [tokens, hidden] of tokens [tokens].

        Args:
            order: of the rows whose adapters are in use, which one each token is of; None: in turn.
        """
        adapted = self._adapted(order)
        states = functional.embedding(tokens, self._embedding)
        cos, sin = self._rotary(states, positions[None])
        half = self.size // 2
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., :half].neg_()
        num_turned = self.num_heads + self.num_key_heads
        for i, layer in enumerate(self._layers):
            made = layer.qkv(_norm(layer.attention_norm, states), adapted)
            made = made.view(len(tokens), num_turned + self.num_key_heads, self.size)
            queries, keys, values = made.split(
                (self.num_heads, self.num_key_heads, self.num_key_heads), 1
            )
            if layer.query_norm is not None:
                queries, keys = _norm(layer.query_norm, queries), _norm(layer.key_norm, keys)
                turned = torch.cat((queries, keys), 1)
            else:
                turned = made[:, :num_turned]
            # What the module calls rotate_half, its sign moved into the sines.
            swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
            turned = torch.addcmul(turned * cos, swapped, sin)
            found = attend(i, turned[:, : self.num_heads], turned[:, self.num_heads :], values)
            states = layer.output.plus(found, states, adapted)
            inner = _norm(layer.mlp_norm, states)
            gated = layer.up.times(inner, layer.gate.silu(inner, adapted), adapted)
            states = layer.down.plus(gated, states, adapted)
        return states

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Return float32 [tokens, vocabulary]: the logits after each token of one text."""

        def attend(layer: int, *parts: Tensor) -> Tensor:
            queries, keys, values = (part.transpose(0, 1)[None] for part in parts)
            found = functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=True
            )
            return found[0].transpose(0, 1).flatten(1)

        states = self.forward(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        return self.logits(states)

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 [rows, vocabulary] of those states that the vocabulary is wanted of."""
        return self._head(_norm(self._norm, states), self._adapted()).float()

    def _adapted(self, order: Tensor | None = None) -> Sequence[Adapted]:
        return self._adapters.in_order(order) if self._adapters is not None else ()


class _Layer:
    def __init__(self, layer: Any, name: str) -> None:
        attention = layer.self_attn

        def joined(part: str, *names: str) -> _Linear:
            module = getattr(layer, part)
            return _linear({f"{name}.{part}.{own}": getattr(module, own) for own in names})

        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = joined("self_attn", "q_proj", "k_proj", "v_proj")
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        self.output = joined("self_attn", "o_proj")
        self.gate, self.up = joined("mlp", "gate_proj"), joined("mlp", "up_proj")
        self.down = joined("mlp", "down_proj")


def _linear(layers: Mapping[str, Any]) -> _Linear:
    is_int8 = is_rounded(next(iter(layers.values())).weight)
    return (_Int8Linear if is_int8 else _Linear)(layers)


class _Linear:
    """Linear layers that read the same, as one; what follows is done while results are at hand.

    Args:
        layers: by their names in the model, which are those in adapters.
    """

    def __init__(self, layers: Mapping[str, Any], *, packed: bool = True) -> None:
        own = list(layers.values())
        with torch.inference_mode():
            biases = [layer.bias for layer in own]
            self._bias = None if biases[0] is None else torch.cat(biases)
            self._hold([layer.weight for layer in own], packed)
        ends = list(accumulate(len(layer.weight) for layer in own))
        self._columns = dict(zip(layers, map(slice, [0, *ends], ends), strict=False))

    def _hold(self, weights: Sequence[Any], packed: bool) -> None:
        self._weight = torch.cat(tuple(weights)) if len(weights) > 1 else weights[0].detach()
        if packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    def __call__(self, states: Tensor, adapted: Sequence[Adapted]) -> Tensor:
        found = self._run(states, "none")
        for each in adapted:
            self._add(each, states, found)
        return found

    def silu(self, states: Tensor, adapted: Sequence[Adapted]) -> Tensor:
        own = [each for each in adapted if not each.layers.keys().isdisjoint(self._columns)]
        if sum(each.num_rows(states) for each in own) == len(states):
            return functional.silu(self(states, own), inplace=True)
        found = self._run(states, "swish")
        for each in own:  # what is added comes before the curve: these rows are computed again
            again = self._run(states[each.rows], "none")
            self._add(replace(each, rows=None), states[each.rows], again)
            found[each.rows] = functional.silu(again)
        return found

    def plus(self, states: Tensor, other: Tensor, adapted: Sequence[Adapted]) -> Tensor:
        found = self._run_with(states, other, "add")
        for each in adapted:
            self._add(each, states, found)
        return found

    def times(self, states: Tensor, other: Tensor, adapted: Sequence[Adapted]) -> Tensor:
        found = self._run_with(states, other, "mul")
        for each in adapted:
            self._add(each, states, found, other)
        return found

    def _add(
        self, adapted: Adapted, states: Tensor, found: Tensor, times: Tensor | None = None
    ) -> None:
        for layer, columns in self._columns.items():
            adapted.add(layer, states, found[:, columns], times)

    def _run(self, states: Tensor, then: str) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, self._bias, then, [], ""
        )
        return found

    def _run_with(self, states: Tensor, other: Tensor, then: str) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, other, self._weight, self._bias, then
        )
        return found


class _Int8Linear(_Linear):
    """The same of weights that torchao has rounded: see `Int8Weight.parts`."""

    def _hold(self, weights: Sequence[Any], packed: bool) -> None:
        self._rounded = Int8Weight(weights)

    def _run(self, states: Tensor, then: str) -> Tensor:
        run = torch.ops.mkldnn._linear_pointwise
        parts = self._rounded.parts()
        return _joined([run(states, part, self._bias_of(i), then, [], "") for i, part in parts])

    def _run_with(self, states: Tensor, other: Tensor, then: str) -> Tensor:
        run = torch.ops.mkldnn._linear_pointwise
        found = [
            run(states, other[:, rows].contiguous(), part, self._bias_of(rows), then)
            for rows, part in self._rounded.parts()
        ]
        return _joined(found)

    def _bias_of(self, rows: slice) -> Tensor | None:
        return None if self._bias is None else self._bias[rows]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)


def _norm(module: Any, states: Tensor) -> Tensor:
    """Root mean square normalisation."""
    weight = module.weight
    return functional.rms_norm(states, weight.shape, weight, module.variance_epsilon)
