"""Caches that hold a context, and steps that leave them as they were.

    decoder = Decoder(model, filled_cache(model, batch=16, context=512, room=32))
    decoder.run()     # one token of every row, then the cache is put back

Keys, values and gated inputs of a context are random numbers; only modal filters read a whole prompt, because it must
make no difference to them. States of Mamba and LFM2 come from a prompt of a few tokens: they have one size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from hyena_hf import HyenaForCausalLM
from hyena_hf.cache import ExactHistory, HyenaCacheLayer, ModalState, OnlineTiles, Plan


_FEW = 8  # tokens that give every layer its tensors


def feed(model: Any, cache: Cache, ids: Tensor, call: Callable | None = None) -> None:
    """Run a model over tokens (B, n)."""
    keyword = "cache_params" if model.config.model_type.startswith("mamba") else "past_key_values"
    with torch.no_grad():
        (call or model)(input_ids=ids, use_cache=True, logits_to_keep=1, **{keyword: cache})


def tokens_for(model: Any, batch: int, length: int) -> Tensor:
    """Random ones (B, L)."""
    return torch.randint(model.config.vocab_size, (batch, length))


def filled_cache(
    model: Any, batch: int, context: int, room: int, *, static: bool = False, decode_cache: str = "history"
) -> Cache:
    """A cache that holds a context, with room for so many tokens more.

    Args:
        model: Any causal language model.
        batch: B.
        context: Tokens of every row.
        room: Tokens to come.
        static: Of fixed size.
        decode_cache: What an exact Hyena keeps; tiles have folded the context before this returns.
    """
    if static:
        cache: Cache = StaticCache(config=model.config, max_cache_len=context + room)
    else:
        cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if isinstance(layer, HyenaCacheLayer) and not static:
            layer.expected_length = context + room
            layer.plan = Plan(decode_cache, new=room, ends=True)
    modal = isinstance(model, HyenaForCausalLM) and "modal" in model.config.filter_types
    feed(model, cache, tokens_for(model, batch, context if modal else min(_FEW, context)))
    for layer in cache.layers:
        _lengthen(layer, batch, context)
    while any(isinstance(history, OnlineTiles) and history.far is None for history in _histories(cache)):
        feed(model, cache, tokens_for(model, batch, 1))
    return cache


def _histories(cache: Cache) -> Iterator[Any]:
    for layer in cache.layers:
        if isinstance(layer, HyenaCacheLayer):
            yield from layer.histories


def _lengthen(layer: Any, batch: int, context: int) -> None:
    """Random numbers for the tokens that are missing."""
    if isinstance(layer, (StaticLayer, DynamicLayer)):
        _draw_attention(layer, context, static=isinstance(layer, StaticLayer))
    elif isinstance(layer, HyenaCacheLayer) and not any(isinstance(x, ModalState) for x in layer.histories):
        missing = context - int(layer.length)
        for history in layer.histories:
            if isinstance(history, ExactHistory) and history.buffer is not None and missing:
                history.commit(torch.randn(batch, history.buffer.shape[1], missing), None)
        layer.advance(missing, None)


def _draw_attention(layer: Any, context: int, *, static: bool) -> None:
    if static:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    else:
        batch, heads, _, width = layer.keys.shape
        layer.keys, layer.values = torch.randn(2, batch, heads, context, width).unbind()


def bytes_per_sequence(cache: Cache) -> int:
    """Of a filled cache, without evaluated filters, which all rows share."""
    held, batch = 0, 1
    for layer in cache.layers:
        if isinstance(layer, HyenaCacheLayer):
            held += sum(history.nbytes() for history in layer.histories)
            batch = layer.batch_size
        else:
            tensors = list(_tensors(layer))
            held += sum(x.nbytes for x in tensors)
            batch = len(tensors[0])
    return held // batch


def _tensors(layer: Any) -> Iterator[Tensor]:
    for value in vars(layer).values():
        for x in value.values() if isinstance(value, dict) else (value,):
            if isinstance(x, Tensor) and x.ndim:
                yield x


def filter_bytes(cache: Cache) -> int:
    """Of evaluated filters."""
    return sum(layer.taps.nbytes() for layer in cache.layers if isinstance(layer, HyenaCacheLayer))


class Decoder:
    """A model with a filled cache.

    Args:
        model: Any causal language model.
        cache: Holds a context.
        compiled: How to compile steps as `generate` does with a static cache; None: not at all.
        steps: Tokens of a run.
    """

    def __init__(self, model: Any, cache: Cache, *, compiled: CompileConfig | None = None, steps: int = 1) -> None:
        self.model, self.cache, self.steps = model, cache, steps
        self.call = None if compiled is None else model.get_compiled_call(compiled)
        self.token = tokens_for(model, _rows(cache), 1)
        holders = [*cache.layers, *_histories(cache)]
        self.saved = [(vars(holder), copy.copy(vars(holder))) for holder in holders]
        counts = (x for _, saved in self.saved for x in saved.values() if isinstance(x, Tensor) and not x.ndim)
        self.counts = [(x, x.clone()) for x in counts]

    def run(self) -> None:
        """Some tokens; then the cache holds the same context again."""
        for _ in range(self.steps):
            feed(self.model, self.cache, self.token, self.call)
        for present, saved in self.saved:
            present.update(saved)
        for present, saved in self.counts:
            present.copy_(saved)


def _rows(cache: Cache) -> int:
    first: Any = cache.layers[0]
    return first.batch_size if isinstance(first, HyenaCacheLayer) else len(next(_tensors(first)))


def compile_config(*, smoke: bool) -> CompileConfig:
    """Fixed shapes, on every device; without a compiler where only the path is tried."""
    config: Any = CompileConfig(dynamic=False, mode="default", backend="eager" if smoke else "inductor")
    config._compile_all_devices = True
    return config


def operations(call: Callable[[], object]) -> int:
    """Calls of torch's operators, nested ones included."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
