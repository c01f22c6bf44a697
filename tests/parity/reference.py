# SPDX-License-Identifier: Apache-2.0
"""Runs a published implementation on random weights, writes them as they are published, and the logits beside them.

    python reference.py REQUEST.json

The request names the folder with the installed references, the family ("stripedhyena", "evo1", "evo2"), its config in
the published form, the published file form, the input ids, and the folder to fill; or, with the form "given", the
folder with files to run. Started by conftest.py in a process of its own: the stand-ins of stand_ins.py must not reach
the tests' own process.
"""

import contextlib
import copy
import importlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stand_ins import InFloat64, install  # beside this file
from torch import Tensor


FLOAT32 = ("poles", "residues", "inv_freq")  # in the published files, whatever the rest is


def build(request: dict) -> Any:
    """The reference model on the CPU in eval mode, its weights in float32."""
    torch.manual_seed(0)
    package, config = "stripedhyena", request["config"]
    if request["family"] == "evo2":
        package, config = "vortex.model", {**config, "use_flash_attn": False, "use_fp8_input_projections": False}
    model_class = importlib.import_module(f"{package}.model").StripedHyena
    model = model_class(importlib.import_module(f"{package}.utils").dotdict(config)).eval().float()
    for module in rotary_modules(model):
        exact = module._compute_inv_freq()
        if request["family"] != "evo2":
            module.inv_freq = exact.bfloat16()  # which makes flash_attn compute them again
        else:
            module.inv_freq = exact.bfloat16().float() if request["rounded_frequencies"] else exact
    return model


def rotary_modules(model: Any) -> list[Any]:
    """Modules with rotary frequencies."""
    return [module for module in model.modules() if hasattr(module, "inv_freq")]


def weights_like(name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Weights at which every path counts: norms away from 1, biases away from 0, poles of modulus 0.3 to 0.99."""
    values = torch.randn(shape, generator=draw)
    if name.endswith("log_poles"):
        return -0.3 * values.exp()
    if name.endswith("poles"):
        radius, angle = values[..., 0].sigmoid() * 0.69 + 0.3, values[..., 1]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    if name.endswith("scale"):
        return 1 + 0.3 * values
    if name.endswith("residues"):
        return values / (4 * shape[1] ** 0.5)
    width = shape[-1] ** -0.5
    factors = {
        ".D": 0.3,
        "bias": 0.3,
        "filter.h": width,
        "short_filter_weight": 0.6,
        "projections.weight": 0.5 * width,
    }
    factors |= {"embedding_layer.weight": 0.4, "unembed.weight": 0.4}
    return values * next((factor for part, factor in factors.items() if name.endswith(part)), 0.7 * width)


def randomise(model: Any, residues: float) -> None:
    """Draw all weights; the residues of modal filters are multiplied by a number."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = weights_like(name, parameter.shape, draw)
        parameter.data.copy_(values * residues if name.endswith("residues") else values)


def published_state(model: Any, request: dict) -> dict[str, Any]:
    """The state dict as it is published: names, dtypes, copies that are left out and extras that are left in."""
    stored = getattr(torch, request["dtype"])
    state = {n: v if n.endswith(FLOAT32) else v.to(stored) for n, v in model.state_dict().items()}
    if request["family"] == "evo2":
        return {**state, **evo2_extras(request, state)}
    if request["config"].get("tie_embeddings"):
        state.pop("unembed.weight")
    prefix = "backbone." if request["prefix"] else ""
    return {prefix + name: value.clone().contiguous() for name, value in state.items()}


def evo2_extras(request: dict, state: dict) -> dict[str, Any]:
    """What Evo 2 files hold besides weights: the tied head, FP8 metadata of linear layers, time axes of filters."""
    extras: dict[str, Any] = {"unembed.weight": state["embedding_layer.weight"].clone()}
    metadata = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3)}, metadata)
    for layer in range(request["config"]["num_layers"]):
        extras[f"blocks.{layer}.mlp.l3._extra_state"] = metadata
        extras[f"blocks.{layer}.mixer.dense._extra_state"] = None
    for layer in request["config"]["hcl_layer_idxs"]:
        extras[f"blocks.{layer}.mixer.mixer.filter.t"] = torch.arange(8.0)[None, None]
    return extras


def write_shards(state: dict[str, Tensor], folder: Path) -> None:
    """Three safetensors files and their index; neighbouring weights lie in different files."""
    save_file = importlib.import_module("safetensors.torch").save_file
    names, where = list(state), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[i::3]}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names[i::3], file))
    size = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_weights(state: dict[str, Any], request: dict, folder: Path) -> None:
    """Write the state in the published file form: safetensors in one file or three, a .pt file, or its byte parts."""
    file = folder / request["file"]
    if request["form"] == "shards":
        write_shards(state, folder)
    elif request["form"] == "safetensors":
        importlib.import_module("safetensors.torch").save_file(state, file, metadata={"format": "pt"})
    elif request["form"] == "pt":
        torch.save(state, file)
    else:
        content = io.BytesIO()
        torch.save(state, content)
        parts = np.array_split(np.frombuffer(content.getvalue(), dtype=np.uint8), 2)
        for i, part in enumerate(parts):
            file.with_name(f"{file.name}.part{i}").write_bytes(part.tobytes())


def load_published(model: Any, state: dict[str, Any], family: str) -> None:
    """Let the reference read the state dict with its own code: vortex rearranges rows there."""
    if family == "evo2":
        with contextlib.redirect_stdout(io.StringIO()):
            model.custom_load_state_dict(state)
        model.float()  # it leaves rearranged rows in the type of the file
        return
    bare = {name.removeprefix("backbone."): value for name, value in state.items()}
    bare.setdefault("unembed.weight", bare["embedding_layer.weight"])  # as evo-model does
    model.load_state_dict(bare, strict=True)


@torch.no_grad()
def traced(model: Any, ids: Tensor) -> dict[str, np.ndarray]:
    """Logits (B, L, V) of the reference and the output of every block (B, L, D), which localise a difference."""
    found: dict[str, np.ndarray] = {}
    exact = torch.promote_types(model.norm.scale.dtype, torch.float32)

    def keep(name: str):
        def hook(_module, _inputs, output) -> None:
            found[name] = output[0].to(exact).numpy()

        return hook

    hooks = [block.register_forward_hook(keep(f"block{i}")) for i, block in enumerate(model.blocks)]
    found["logits"] = model(ids)[0].to(exact).numpy()
    for hook in hooks:
        hook.remove()
    return found


def in_bfloat16(model: Any, family: str) -> Any:
    """A copy of the model as its package runs it: in bfloat16, but for poles, residues and rotary frequencies."""
    model = copy.deepcopy(model)
    if family != "evo2":
        model.to_bfloat16_except_poles_residues()
        return model
    for name, parameter in model.named_parameters():
        if "projections" in name:  # in bfloat16 from the start there, and left alone
            parameter.data = parameter.data.bfloat16()
    model.to_bfloat16_except_pr_lc()
    return model


def in_float64(model: Any) -> Any:
    """The model in float64, its code's casts to lower types made void; only rotary frequencies keep float32 values."""
    rotary = rotary_modules(model)
    frequencies = [m.inv_freq if m.inv_freq.dtype == torch.float32 else m._compute_inv_freq() for m in rotary]
    model = model.double()
    for module, values in zip(rotary, frequencies, strict=True):
        module.inv_freq = values.double()
    for name, module in list(sys.modules.items()):
        if name.startswith(("stripedhyena.", "vortex.")) and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = InFloat64()
    return model


def main(path: Path) -> None:
    """Fill the folder of the request if it is not given, and write the arrays to a .npz file beside it."""
    request = json.loads(path.read_text())
    sys.path.insert(0, request["site"])
    install()
    logging.disable(logging.WARNING)
    folder, ids = Path(request["folder"]), torch.tensor(request["input_ids"])
    model = build(request)
    if request["form"] == "given":
        state = importlib.import_module("safetensors.torch").load_file(folder / request["file"])
    else:
        randomise(model, request["residues"])
        state = published_state(model, request)
        write_weights(state, request, folder)
    load_published(model, state, request["family"])
    arrays = {"input_ids": ids.numpy(), **traced(model, ids)}
    arrays.update(
        {f"{name}_16": values for name, values in traced(in_bfloat16(model, request["family"]), ids).items()}
    )
    arrays.update({f"{name}_64": values for name, values in traced(in_float64(model), ids).items()})
    np.savez(folder.with_suffix(".npz"), **arrays)  # pyright: ignore[reportArgumentType] (arrays by name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
