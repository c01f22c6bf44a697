# SPDX-License-Identifier: Apache-2.0
"""One cache layer for every mixer, and how a transformers cache is made of such layers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hyena_hf.configuration_hyena import HyenaConfig

from .history import AttentionHistory, History, thawed
from .plan import Plan
from .taps import FrozenTaps, Taps


# Columns that stay pending while a cache records its past, at least: a call leaves all of its own.
MAX_PENDING = 64

# Taps that a layer of states keeps for the few tokens of a verification; those of a prompt would grow with it.
KEPT_TAPS = 2 * MAX_PENDING


def _in_inference_mode() -> bool:
    """Whether what is made now can be read only outside; compiled graphs cannot ask and are made for one mode."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


class HyenaCacheLayer(CacheLayerMixin):
    """The cache of one block of a Hyena model, whatever its mixer.

    transformers builds it from `layer_types` before any width is known, so it is constructed empty; the mixer attaches
    its histories on first use.

    Args:
        max_cache_len: Capacity in tokens of a static cache; None for one that grows.
    """

    _layer_type = "hyena"
    supports_early_init = False
    is_sliding = False
    is_croppable = True

    def __init__(self, max_cache_len: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.expected_length: int | None = max_cache_len
        self.plan = Plan()
        self.max_pending = MAX_PENDING
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.histories: Sequence[History] = []
        self.taps = Taps()
        self.length: int | Tensor = 0  # columns of the stream seen, what generate() counts
        self.tokens: int | Tensor = 0  # real tokens seen: an int, 0-d, or (B,) where rows differ
        self.recorded: list[Tensor | int] = []  # columns since the last crop: widths, or (B, n) masks
        # first column and mask (B, n) of every call with masked tokens; attention layers only
        self.ragged: list[tuple[int, Tensor]] = []
        self.owner: int | None = None
        self.dtype: torch.dtype | None = None  # of the weights that filled it
        self.from_inference_mode = False  # whether it holds tensors that may only be read outside
        self.is_initialized = False

    def attach(
        self,
        make: Callable[[int | None, int | None], Sequence[History]],
        batch: int,
        device: torch.device,
        frozen: FrozenTaps | None = None,
    ) -> None:
        """Set up the histories on first use: make(static capacity or None, length to make room for or None).

        Taps of a frozen filter are shared by all caches of that time.
        """
        if self.is_initialized:
            if self.from_inference_mode and not _in_inference_mode():
                self._thaw()
            return
        self.histories = make(self.max_cache_len, self.expected_length)
        if frozen is not None:
            self.taps = frozen.taps
        if self._needs_taps():
            self.taps.capacity = self.expected_length
        self.batch_size, self.device = batch, device
        self.is_initialized = True
        if self.max_cache_len is not None:
            # tensors, so that a compiled step does not depend on their values
            self.length = torch.zeros((), dtype=torch.long, device=device)
            self.tokens = torch.zeros((), dtype=torch.long, device=device)

    def _thaw(self) -> None:
        """Go on outside inference mode: tensors made there can neither be written nor kept for gradients."""
        for holder in (self, self.taps, *self.histories):
            vars(holder).update(thawed(vars(holder)))
        self.from_inference_mode = False

    def _needs_taps(self) -> bool:
        return any(history.needs_taps for history in self.histories)

    def steps(self, new: int) -> bool:
        """Whether new inputs, as many in every row, can go through `History.step`."""
        return new == 1 and not self.record_past and self.histories[0].pending is None

    def push(self, index: int, w: Tensor, counts: Tensor | None, *operator) -> Tensor:
        """Answer new inputs w (B, C, n) of operator number `index` and remember them."""
        keep = 0
        if self.record_past:
            keep = max(self.max_pending, w.shape[-1])
        return self.histories[index].push(w, counts, keep, *operator)

    def advance(self, columns: int, mask: Tensor | None) -> None:
        """Count a call of `columns` stream columns, of which mask (B, n) were real (None: all). Once a call."""
        real = columns if mask is None else mask.sum(dim=1)
        attends = any(isinstance(history, AttentionHistory) for history in self.histories)
        if mask is not None and attends and not torch.compiler.is_compiling():
            self.ragged.append((int(self.length), mask))
        if self.max_cache_len is not None and mask is None:
            self.tokens.add_(columns)  # pyright: ignore (a tensor where static)
        else:
            self.tokens = self.tokens + real
        if self.max_cache_len is not None:
            self.length.add_(columns)  # pyright: ignore (a tensor where static)
        else:
            self.length = self.length + columns
        if self.record_past:
            self.recorded.append(columns if mask is None else mask)
        self.from_inference_mode |= _in_inference_mode()
        if columns > 1 and not self._needs_taps():  # a compiled step is not to look
            self.taps.forget(KEPT_TAPS)

    # what transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        """Not used: mixers call `attach`."""
        raise TypeError("a HyenaCacheLayer stores no keys and values; use the cache with a Hyena model")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Not used: mixers call `push`."""
        raise TypeError("a HyenaCacheLayer stores no keys and values; use the cache with a Hyena model")

    def get_seq_length(self) -> int:
        """Columns of the stream seen so far, padding included."""
        return self.length  # pyright: ignore (0-d tensor where static, as transformers' static layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that an attention mask must cover, and the first of them."""
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Capacity in tokens; -1 where the layer grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def activate_past_recording(self) -> None:
        """Keep the inputs to come pending so that `crop` can take them back."""
        if self.max_cache_len is not None:
            raise ValueError("a static cache cannot be rolled back; use the default (dynamic) cache")
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns of the stream and commit the rest of the pending ones."""
        if tokens_to_remove != int(tokens_to_remove):
            raise ValueError(f"crop takes a whole number of tokens to remove, got {tokens_to_remove}")
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands over a 0-d tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        remove = -tokens_to_remove
        if not self.record_past and all(history.keeps_all for history in self.histories):
            self._rewind(remove)
            return
        recorded = sum(part if isinstance(part, int) else part.shape[1] for part in self.recorded)
        removed = self._real_among_last(remove)
        if remove > recorded or not all(history.can_crop(removed) for history in self.histories):
            raise ValueError(
                f"crop({tokens_to_remove}) reaches beyond the tokens that can still be taken back ({recorded} were "
                f"fed since the last crop; of several calls only the last {self.max_pending} columns are kept); call "
                f"activate_past_recording() before the tokens are fed"
            )
        for history in self.histories:
            history.crop(removed)
        self.tokens = self.tokens - removed
        self.length = self.length - remove
        self.recorded = []
        self._forget_masks()

    def _rewind(self, remove: int) -> None:
        """Take back committed columns: transformers asks attention layers for it without announcing it."""
        if remove > int(self.length):
            raise ValueError(f"crop(-{remove}) reaches beyond the {int(self.length)} columns that the cache holds")
        removed: int | Tensor = remove
        if self.ragged:
            removed = self.real_columns()[:, int(self.length) - remove :].sum(dim=1)
        for history in self.histories:
            history.rewind(removed)
        self.tokens = self.tokens - removed
        self.length = self.length - remove
        self._forget_masks()

    def _forget_masks(self) -> None:
        end = int(self.length)
        self.ragged = [(start, mask[:, : end - start]) for start, mask in self.ragged if start < end]

    def _real_among_last(self, columns: int) -> int | Tensor:
        """Real tokens among the last recorded stream columns: an int, or (B,)."""
        total: int | Tensor = 0
        for part in reversed(self.recorded):
            width = min(columns, part if isinstance(part, int) else part.shape[1])
            if width:
                total = total + (width if isinstance(part, int) else part[:, -width:].sum(dim=1))
            columns -= width
        return total

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply function to every tensor with a batch dimension."""
        for history in self.histories:
            history.map(function)
        if isinstance(self.tokens, Tensor) and self.tokens.ndim:
            self.tokens = function(self.tokens)
        self.recorded = [part if isinstance(part, int) else function(part) for part in self.recorded]
        self.ragged = [(start, function(mask)) for start, mask in self.ragged]
        self.from_inference_mode |= _in_inference_mode()

    def real_columns(self) -> Tensor:
        """True for the columns of the stream seen so far that held tokens, (B, length)."""
        real = torch.ones(self.batch_size, int(self.length), dtype=torch.bool, device=self.device)
        for start, mask in self.ragged:
            real[:, start : start + mask.shape[1]] = mask
        return real

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[b] as row b."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))
        if self.is_initialized:
            self.batch_size = beam_idx.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))
        if self.is_initialized:
            self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map(lambda x: x[indices.to(x.device)])
        if self.is_initialized:
            self.batch_size = int(torch.arange(self.batch_size)[indices.cpu()].shape[0])

    def reset(self) -> None:
        """Forget everything."""
        self._forget()

    def offload(self) -> None:
        """Move the histories to the CPU; counts stay, because the next call reads them before any layer runs."""
        for history in self.histories:
            history.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the histories back to the device that they came from."""
        for history in self.histories:
            history.map(lambda x: x.to(self.device, non_blocking=True))

    def nbytes(self) -> int:
        """Bytes held by the histories and by the evaluated filter."""
        return self.taps.nbytes() + sum(history.nbytes() for history in self.histories)


for _name in ("hyena", "hedgehog"):
    DYNAMIC_LAYER_TYPE_MAPPING[_name] = STATIC_LAYER_TYPE_MAPPING[_name] = HyenaCacheLayer

_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def adopt_cache(
    cache: Cache, config: HyenaConfig, batch: int, owner: int, dtype: torch.dtype, capacity: int | None = None
) -> list[HyenaCacheLayer]:
    """Make a transformers cache fit for a Hyena model, in place, or refuse it.

    transformers gives attention layers its own cache layers, which keep columns of the stream: with unequal rows a
    sliding window would then count padding. Empty ones are replaced by ours.

    Args:
        cache: The cache that `forward` was given.
        config: Config of the model.
        batch: Rows of the batch.
        owner: Identity of the model.
        dtype: Dtype of the model's weights.
        capacity: Tokens that a new static cache must hold, where its sliding layers do not tell.

    Returns:
        The layers of the cache.

    Raises:
        ValueError: The cache belongs to another model, dtype or batch size, or cannot serve this model.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}; use DynamicCache")
    if not cache.layers and cache.layer_class_to_replicate is not None:
        cache.layers.extend(HyenaCacheLayer() for _ in range(config.num_hidden_layers))
        cache.layer_class_to_replicate = None
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers but the model {config.num_hidden_layers}; it belongs to "
            f"another model: build one with DynamicCache(config=model.config)"
        )
    if not all(isinstance(layer, HyenaCacheLayer) for layer in cache.layers):
        _replace_layers(cache, capacity)
    layers = cast("list[HyenaCacheLayer]", cache.layers)
    for layer in layers:
        if not layer.is_initialized:
            continue
        if layer.owner != owner:
            raise ValueError("the cache was filled by another model; start with an empty one for each model")
        if layer.dtype != dtype:
            raise ValueError(
                f"the cache was filled in {layer.dtype}, but the model's weights are {dtype}; start with an empty "
                f"cache after changing the model's dtype"
            )
        if layer.batch_size != batch:
            raise ValueError(
                f"the cache holds {layer.batch_size} sequences but the batch has {batch}; use "
                f"batch_select_indices or batch_repeat_interleave, or start with an empty cache"
            )
    return layers


def _replace_layers(cache: Cache, capacity: int | None) -> None:
    """Put our layers in the place of transformers' empty attention layers."""
    capacity = capacity or max(layer.get_max_length() for layer in cache.layers)
    # what `Cache.is_recording_past` says, which transformers 5.17 lacks
    recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, HyenaCacheLayer):
            ours = layer
        elif isinstance(layer, _REPLACEABLE) and type(layer) in _REPLACEABLE and not _holds_tokens(layer):
            ours = HyenaCacheLayer(capacity if isinstance(layer, StaticLayer) else None)
        else:
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__} that a Hyena model cannot use (filled by "
                f"another model, or quantized); pass an empty DynamicCache(config=model.config)"
            )
        ours.record_past = recording
        cache.layers[index] = ours


def in_turn(cache: Cache) -> Iterable[HyenaCacheLayer]:
    """The layers one after the other; those of an offloaded cache are on their device only while it is their turn."""
    layers = cast("list[HyenaCacheLayer]", cache.layers)
    return _offloading(cache, layers) if cache.offloading else layers


def _offloading(cache: Cache, layers: Sequence[HyenaCacheLayer]) -> Iterator[HyenaCacheLayer]:
    # transformers moves layers in `Cache.update`, which our mixers do not call. As there, the next layer travels on a
    # stream of its own while this one computes.
    layers[0].prefetch()
    for index, layer in enumerate(layers):
        following = layers[(index + 1) % len(layers)]
        if layer.is_initialized and layer.device.type != "cpu":
            # neither stream may read what the other one still writes
            current, transfers = torch.accelerator.current_stream(layer.device), cache.prefetch_stream
            current.wait_stream(transfers)
            transfers.wait_stream(current)
            with transfers:
                following.prefetch()
        else:
            following.prefetch()
        yield layer
        layer.offload()


def _holds_tokens(layer: CacheLayerMixin) -> bool:
    return layer.is_initialized and int(layer.get_seq_length()) > 0


__all__ = ["HyenaCacheLayer", "adopt_cache", "in_turn"]
