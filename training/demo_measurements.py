"""What the demo measures of a trained model beside its loss: samples, decoding speed, bytes of the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedTokenizerBase, set_seed
from transformers.cache_utils import DynamicLayer

from hyena_hf.cache import HyenaCacheLayer


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding of one sequence with a cache."""

    tokens_per_second: float
    cache_bytes: int  # after the last token
    context: int  # tokens in the sequence then


def measure_decoding(model: Any, prompt: torch.Tensor, *, new_tokens: int) -> Decoding:
    """Time greedy generation of `new_tokens` tokens after a prompt (L,); prefill and generate()'s own work count."""
    model.eval()
    prompt = prompt.to(model.device)
    arguments = dict(do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    model.generate(prompt[None], max_new_tokens=4, min_new_tokens=4, **arguments)  # first-use costs stay out
    begin = time.perf_counter()
    output = model.generate(prompt[None], max_new_tokens=new_tokens, min_new_tokens=new_tokens, **arguments)
    seconds = time.perf_counter() - begin
    return Decoding(new_tokens / seconds, cache_bytes(output.past_key_values), output.sequences.shape[1])


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, HyenaCacheLayer):
            total += layer.nbytes()
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            total += layer.keys.nbytes + layer.values.nbytes
        else:
            raise TypeError(f"cannot count the bytes of a {type(layer).__name__}; expected a Hyena or a dynamic layer")
    return total


def sample_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    seed: int,
) -> list[dict[str, str]]:
    """Continue prompts by sampling at temperature 0.8; the same seed for every model."""
    model.eval()
    samples = []
    for prompt in prompts:
        set_seed(seed)
        ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
        output = model.generate(ids, max_new_tokens=new_tokens, do_sample=True, temperature=0.8, pad_token_id=0)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
    return samples
