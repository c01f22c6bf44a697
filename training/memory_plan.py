"""What linearising a model takes in memory, before its weights are there: a dry run on shapes alone.

    python -m training.memory_plan MODEL --window 64 --length 1024 --devices 4
    python -m training.memory_plan config.json --lora 16 --device-memory 24

The model is made on the meta device from its configuration, converted, given its adapters, and its forward is run
there: counts of weights, maps and adapters, and the bytes that backward keeps, are those of the real run; what one
layer keeps in the transfer is bounded by its share of that. Working memory (a block of logits, of attention weights)
comes on top; it does not grow with the number of layers.

Per device, b bytes a weight, N devices:

    transfer           weights b      maps 16 (value, gradient, two moments)    activations of one layer
    LoRA, replicated   weights b      adapters and maps 16                      activations of the device's rows
    LoRA, FSDP2        weights b / N  adapters and maps 16 / N                  the same, and two layers gathered whole
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import hyena_hf  # noqa: F401  registers the Auto classes
from hyena_hf.feature_maps import FEATURE_MAPS
from hyena_hf.linear_attention import convert_attention
from hyena_hf.linear_attention.modes import linear_attentions
from training.adapters import add_lora
from training.linearize import DTYPES, RANK


TRAINED = 16  # bytes of a trained number in float32 with its gradient and AdamW's two moments


@dataclass(frozen=True)
class Plan:
    """Bytes, and numbers of parameters."""

    parameters: int
    maps: int
    adapters: int
    weights: int  # bytes of all weights but maps and adapters
    layer: int  # bytes of the weights of the largest layer
    kept: int  # bytes that backward keeps of one device's rows
    kept_of_a_layer: int
    devices: int

    @property
    def transfer(self) -> int:
        """Of attention transfer, on each device."""
        return self.weights + TRAINED * self.maps + self.kept_of_a_layer

    @property
    def replicated(self) -> int:
        """Of LoRA with a copy of everything on each device."""
        return self.weights + TRAINED * (self.maps + self.adapters) + self.kept

    @property
    def sharded(self) -> int:
        """Of LoRA with FSDP2, on each device."""
        shared = self.weights + TRAINED * (self.maps + self.adapters)
        return shared // self.devices + 2 * self.layer + self.kept


def make_plan(config: Any, options: argparse.Namespace) -> Plan:
    """Count what linearising a model of this configuration takes.

    Args:
        config: Of a model that `convert_attention` knows.
        options: The command line.

    Raises:
        ValueError: The model cannot be converted so.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
    converted: Any = convert_attention(
        model, feature_map=options.feature_map, feature_dim=options.feature_dim, window=options.window
    )
    layers = linear_attentions(converted).values()
    maps = sum(p.numel() for layer in layers for p in layer.parameters())
    weights = _bytes(converted) - sum(map(_bytes, layers))
    blocks: Any = converted.base_model.layers if hasattr(converted.base_model, "layers") else converted.base_model.h
    adapted = add_lora(converted, "lm", options.lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    kept = kept_by_backward(adapted, options.batch_size, options.length)
    return Plan(
        parameters=model.num_parameters(),
        maps=maps,
        adapters=trained - maps,
        weights=weights,
        layer=max(map(_bytes, blocks)),
        kept=kept,
        kept_of_a_layer=kept // len(blocks),
        devices=options.devices,
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def kept_by_backward(model: Any, rows: int, length: int) -> int:
    """Bytes of the tensors that a training step's forward keeps for backward, weights left out.

    Args:
        model: On the meta device.
        rows, length: Of the batch.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor  # held, so that no other gets its address
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, use_cache=False, logits_to_keep=1)
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in weights)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.memory_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a folder, a name of the Hub, or a config.json")
    add("--window", type=int, default=64)
    add("--feature-map", choices=FEATURE_MAPS, default="hedgehog_softmax")
    add("--feature-dim", type=int)
    add("--lora", type=int, metavar="RANK", default=RANK)
    add("--length", type=int, default=1024, help="tokens in a row (default %(default)s)")
    add("--batch-size", type=int, default=1, help="rows in a step on each device (default %(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default %(default)s)")
    add("--devices", type=int, default=1)
    add("--device-memory", type=float, default=80, help="GiB of a device (default %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.devices, options.batch_size, options.length, options.lora) < 1:
        parser.error("--devices, --batch-size, --length and --lora must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    plan = make_plan(AutoConfig.from_pretrained(options.model), options)
    print(describe(plan, options, Path(options.model).name))


def describe(plan: Plan, options: argparse.Namespace, name: str) -> str:
    """The plan in words."""
    trained = plan.maps + plan.adapters
    lines = [
        f"{name}: {plan.parameters:,} parameters, {plan.maps:,} in feature maps, {plan.adapters:,} in adapters "
        f"({100 * trained / plan.parameters:.2f}% trained)",
        f"rows of {options.length} tokens, {options.batch_size} on each of {options.devices} devices; backward keeps "
        f"{_gib(plan.kept)} of them, {_gib(plan.kept_of_a_layer)} a layer",
    ]
    for stage, need in (
        ("attention transfer", plan.transfer),
        ("LoRA, replicated", plan.replicated),
        (f"LoRA, FSDP2 over {plan.devices}", plan.sharded),
    ):
        fits = "fits" if need < 0.9 * options.device_memory * 2**30 else "does not fit"
        lines.append(
            f"{stage}: {_gib(need)} on each device, {fits} in {options.device_memory:g} GiB (a tenth left free)"
        )
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
