# SPDX-License-Identifier: Apache-2.0
"""Write a model in a published layout again, for programs that read only that: HyenaDNA's `-hf`, StripedHyena.

What a layout cannot say is refused, field by field. What it says in another way is computed: positional features,
which it stores, and residues, which begin at lag 0 in its form.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import ImplicitFilter, ModalFilter, filter_times
from hyena_hf.mixers.attention import rotary_formula
from hyena_hf.modeling_hyena import HyenaForCausalLM
from hyena_hf.ops.modal import NO_POLE, PI

from .striped import rows_of_projections
from .writing import check_output


# A pole without effect. Published code takes logarithms, so that 0 would give NaN.
_NO_EFFECT = 1e-8

_HYENADNA_CODE = "LongSafari/hyenadna-tiny-1k-seqlen-hf"


def export_checkpoint(model: Any, output: str | Path, layout: str) -> None:
    """Write a model in a published layout.

    Args:
        model: A `HyenaForCausalLM`.
        output: New or empty folder.
        layout: `"longsafari-hf"` (causal models of order 2 with implicit filters, as HyenaDNA) or `"stripedhyena"`
            (modal filters and full attention, as StripedHyena 7B and Evo 1).

    Raises:
        TypeError: The model is no `HyenaForCausalLM`.
        ValueError: The layout is not known, cannot say what this model is, or the folder holds something.
    """
    if layout not in EXPORTS:
        raise ValueError(f"layout {layout!r} cannot be written; choose from {', '.join(EXPORTS)}")
    if not isinstance(model, HyenaForCausalLM):
        raise TypeError(
            f"only a HyenaForCausalLM can be written, got {type(model).__name__}; merge adapters first, "
            f"model = model.merge_and_unload()"
        )
    if any("lora_" in name or ".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("the model holds adapters beside its weights; merge them first, model.merge_and_unload()")
    target = Path(output)
    check_output(target)
    required, describe, tensors = EXPORTS[layout]
    config = model.config
    _refuse(config, required(config), layout)
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        # clones: safetensors refuses tensors that share memory
        state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors(model)}
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(describe(config), indent=2) + "\n", encoding="utf-8")
    except BaseException:
        if existed:
            (target / "model.safetensors").unlink(missing_ok=True)
        else:
            shutil.rmtree(target)
        raise


def _refuse(config: HyenaConfig, required: dict[str, Any], layout: str) -> None:
    wrong = {name: getattr(config, name) for name, value in required.items() if getattr(config, name) != value}
    if wrong:
        listed = ", ".join(f"{name}={value!r} (must be {required[name]!r})" for name, value in wrong.items())
        raise ValueError(f"the layout {layout} has no place for {listed}")


# Parts that only other published models have.
_PLAIN = {
    "block_type": "pre_norm",
    "learned_positions": False,
    "type_vocab_size": 0,
    "mlp_blocks": 1,
    "residual_conv": False,
}


def _required_of_hyenadna(config: HyenaConfig) -> dict[str, Any]:
    """Fields that the published code of this layout fixes."""
    layers = config.num_hidden_layers
    return {
        "layer_types": ["hyena"] * layers,
        "filter_types": ["implicit"] * layers,
        "filter_length": None,
        "is_causal": True,
        "order": 2,
        "num_filters": config.hidden_size,
        "frequency_sparsity": 0.0,
        "modulation": True,
        "modulation_shift": 0.05,
        "short_conv_kernel": 3,
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "gated_mlp": False,
        "mlp_bias": True,
        "use_bias": True,
        **_PLAIN,
    }


def _describe_hyenadna(config: HyenaConfig) -> dict[str, Any]:
    code = {
        "AutoConfig": "configuration_hyena.HyenaConfig",
        "AutoModel": "modeling_hyena.HyenaDNAModel",
        "AutoModelForCausalLM": "modeling_hyena.HyenaDNAForCausalLM",
        "AutoModelForSequenceClassification": "modeling_hyena.HyenaDNAForSequenceClassification",
    }
    return {
        "architectures": ["HyenaDNAForCausalLM"],
        "auto_map": {name: f"{_HYENADNA_CODE}--{where}" for name, where in code.items()},
        "model_type": "hyenadna",
        # the published code rounds up to a multiple of 8: what is one already stays
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 1,
        "d_model": config.hidden_size,
        "d_inner": config.intermediate_size,
        "use_bias": True,
        "train_freq": True,
        "max_seq_len": config.max_position_embeddings,
        "emb_dim": 2 * config.filter_num_bands + 1,
        "n_layer": config.num_hidden_layers,
        "num_inner_mlps": config.filter_num_layers - 2,
        "hyena_order": 2,
        "short_filter_order": 3,
        "filter_order": config.filter_hidden_size,
        "activation_freq": config.sine_frequency,
        "embed_dropout": config.embed_dropout,
        "hyena_dropout": config.hyena_dropout,
        "hyena_filter_dropout": 0.0,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": False,
    }


def _hyenadna_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    length = model.config.max_position_embeddings
    yield "hyena.backbone.embeddings.word_embeddings.weight", model.model.embed_tokens.weight
    yield "lm_head.weight", model.lm_head.weight
    for kind in ("weight", "bias"):
        yield f"hyena.backbone.ln_f.{kind}", getattr(model.model.norm, kind)
    for number, layer in enumerate(model.model.layers):
        prefix = f"hyena.backbone.layers.{number}."
        modules = {
            "norm1": layer.mixer_norm,
            "norm2": layer.mlp_norm,
            "mlp.fc1": layer.mlp.up_proj,
            "mlp.fc2": layer.mlp.down_proj,
            "mixer.in_proj": layer.mixer.in_proj,
            "mixer.out_proj": layer.mixer.out_proj,
        }
        for name, module in modules.items():
            yield f"{prefix}{name}.weight", module.weight
            yield f"{prefix}{name}.bias", module.bias
        yield f"{prefix}mixer.short_filter.weight", layer.mixer.short_conv.weight.unsqueeze(1)
        yield f"{prefix}mixer.short_filter.bias", layer.mixer.short_conv.bias
        yield f"{prefix}mixer.filter_fn.bias", layer.mixer.skip[0]
        yield from _implicit_tensors(layer.mixer.filter, length, f"{prefix}mixer.filter_fn.")


def _implicit_tensors(long_filter: ImplicitFilter, length: int, prefix: str) -> Iterator[tuple[str, Tensor]]:
    features = long_filter.features
    yield f"{prefix}pos_emb.z", (long_filter.initial_features() if features is None else features).unsqueeze(0)
    yield f"{prefix}pos_emb.t", filter_times(length, length).view(1, -1, 1)
    assert long_filter.decay_rates is not None  # noqa: S101 (the layout requires modulation; narrows the type)
    yield f"{prefix}modulation.deltas", long_filter.decay_rates.view(1, 1, -1)
    for index, layer in enumerate(long_filter.layers):
        yield f"{prefix}implicit_filter.{2 * index}.weight", layer.weight  # pyright: ignore (a FilterLinear)
        yield f"{prefix}implicit_filter.{2 * index}.bias", layer.bias  # pyright: ignore (a FilterLinear)
    yield f"{prefix}implicit_filter.1.freq", long_filter.frequency.unsqueeze(0)
    yield f"{prefix}implicit_filter.{2 * len(long_filter.layers)}.weight", long_filter.output.weight


def _required_of_striped(config: HyenaConfig) -> dict[str, Any]:
    required: dict[str, Any] = {
        "is_causal": True,
        "order": 2,
        "num_filters": config.hidden_size,
        "gated_mlp": True,
        "mlp_bias": False,
        "rope_frequency_dtype": "float32",
        **_PLAIN,
        "head_dim": config.hidden_size // (config.num_attention_heads or 1),
        "layer_types": ["full_attention" if kind != "hyena" else kind for kind in config.layer_types],
        "filter_types": [
            "modal" if mixer == "hyena" else kind
            for mixer, kind in zip(config.layer_types, config.filter_types, strict=True)
        ],
    }
    if "hyena" not in config.layer_types:
        raise ValueError("the layout stripedhyena needs a Hyena layer, but all of this model are attention")
    for name, choices in (("norm_type", ("rms_norm_outer_eps", "rms_norm")), ("hidden_act", ("silu", "gelu"))):
        if getattr(config, name) not in choices:
            required[name] = choices[0]
    if config.has_attention and config.rope_parameters["rope_type"] not in ("default", "linear"):
        required["rope_parameters"] = {"rope_type": "default"}
    return required


def _describe_striped(config: HyenaConfig) -> dict[str, Any]:
    attention = [index for index, kind in enumerate(config.layer_types) if kind != "hyena"]
    rope = config.rope_parameters or {}
    factor = rope.get("factor", 1.0)
    return {
        "architectures": ["StripedHyenaModelForCausalLM"],
        "model_type": "stripedhyena",
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "hidden_size": config.hidden_size,
        "num_filters": config.hidden_size,
        "inner_mlp_size": config.intermediate_size,
        "attn_layer_idxs": attention,
        "hyena_layer_idxs": [index for index in range(config.num_hidden_layers) if index not in attention],
        "num_layers": config.num_hidden_layers,
        "tie_embeddings": config.tie_word_embeddings,
        "short_filter_length": config.short_conv_kernel,
        "short_filter_bias": True,
        "num_attention_heads": config.num_attention_heads,
        "proj_groups": config.num_attention_heads // config.num_key_value_heads,
        "hyena_filter_groups": 1,
        "column_split_hyena": True,
        "column_split": False,
        "split_k0": True,
        "model_parallel_size": 1,
        "pipe_parallel_size": 1,
        "mha_out_proj_bias": config.has_bias("attention_out_proj"),
        "qkv_proj_bias": config.has_bias("qkv_proj"),
        "final_norm": True,
        "smeared_gqa": False,
        "use_flash_attn": True,
        "use_flash_rmsnorm": config.norm_type == "rms_norm",
        "use_flash_depthwise": False,
        "use_flashfft": False,
        "use_laughing_hyena": False,
        "inference_mode": False,
        "prefill_style": "fft",
        "max_seqlen": config.max_position_embeddings,
        "eps": config.norm_eps,
        "state_size": _largest_count(config),
        "mlp_activation": config.hidden_act,
        "rotary_emb_base": rope.get("rope_theta", 10000.0),
        "use_interpolated_rotary_pos_emb": factor != 1.0,
        "rotary_emb_scaling_factor": factor,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _largest_count(config: HyenaConfig) -> int:
    """Poles that every filter of the file holds; shorter ones are filled up."""
    return max(config.pole_count(layer) for layer, kind in enumerate(config.layer_types) if kind == "hyena")


def _striped_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    config = model.config
    yield "backbone.embedding_layer.weight", model.model.embed_tokens.weight
    yield "backbone.norm.scale", model.model.norm.weight
    if not config.tie_word_embeddings:
        yield "backbone.unembed.weight", model.lm_head.weight
    split = {"column_split_hyena": True, "num_attention_heads": config.num_attention_heads}
    # ours to theirs is the inverse of theirs to ours
    rows = torch.argsort(rows_of_projections(split, config.hidden_size))
    for number, layer in enumerate(model.model.layers):
        prefix = f"backbone.blocks.{number}."
        yield f"{prefix}pre_norm.scale", layer.mixer_norm.weight
        yield f"{prefix}post_norm.scale", layer.mlp_norm.weight
        for theirs, module in zip(
            ("l1", "l2", "l3"), (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj), strict=True
        ):
            yield f"{prefix}mlp.{theirs}.weight", module.weight
        if config.layer_types[number] == "hyena":
            yield from _striped_hyena(layer.mixer, rows, prefix, _largest_count(config))
        else:
            yield from _striped_attention(layer.mixer, f"{prefix}inner_mha_cls.")
            # computed by the published code too, from bfloat16 ones: but it refuses a file without
            yield f"{prefix}inner_mha_cls.rotary_emb.inv_freq", rotary_formula(config).bfloat16()


def _striped_hyena(mixer: Any, rows: Tensor, prefix: str, count: int) -> Iterator[tuple[str, Tensor]]:
    def bias(module: Any) -> Tensor:
        """The published code cannot do without."""
        return module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias

    yield f"{prefix}projections.weight", mixer.in_proj.weight[rows]
    yield f"{prefix}projections.bias", bias(mixer.in_proj)[rows]
    yield f"{prefix}filter.short_filter_weight", mixer.short_conv.weight[rows].unsqueeze(1)
    yield f"{prefix}filter.short_filter_bias", bias(mixer.short_conv)[rows]
    yield f"{prefix}out_filter_dense.weight", mixer.out_proj.weight
    yield f"{prefix}out_filter_dense.bias", bias(mixer.out_proj)
    poles, residues, excess = published_poles(mixer.filter)
    missing = count - poles.shape[1]
    poles = torch.nn.functional.pad(torch.view_as_real(poles), (0, 0, 0, missing))
    poles[:, poles.shape[1] - missing :, 0] = _NO_EFFECT
    residues = torch.nn.functional.pad(torch.view_as_real(residues), (0, 0, 0, missing))
    yield f"{prefix}filter.poles", poles.float().unsqueeze(2)
    yield f"{prefix}filter.residues", residues.float().unsqueeze(2)
    yield f"{prefix}filter.D", (mixer.skip[0].double() + excess).to(mixer.skip.dtype)


def published_poles(long_filter: ModalFilter) -> tuple[Tensor, Tensor, Tensor]:
    """Poles and residues of h_t = Re sum R p^t from lag 0 on, and what their sum lacks of our tap at lag 0.

    Returns:
        (D, N) and (D, N), complex128; (D,), float64.
    """
    parts = (long_filter.log_radius, long_filter.angle, long_filter.residue_re, long_filter.residue_im)
    log_radius, angle, re, im = (part[0].double() for part in parts)
    used = log_radius > NO_POLE
    real = (angle == 0) | (angle.abs() == PI)
    turn = torch.where(angle.abs() == PI, torch.pi, angle)
    p = torch.polar(torch.where(used, log_radius.exp(), _NO_EFFECT), torch.where(used, turn, 0.0))
    p = torch.where(real, torch.complex(p.real, torch.zeros_like(p.real)), p)
    after = torch.complex(torch.where(used, re, 0.0), torch.where(used & ~real, im, 0.0))
    r = after / p
    return p, r, long_filter.direct[0].double() - r.real.sum(-1)


def _striped_attention(mixer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    projections = mixer.q_proj, mixer.k_proj, mixer.v_proj
    yield f"{prefix}Wqkv.weight", torch.cat([module.weight for module in projections])
    if mixer.q_proj.bias is not None:
        yield f"{prefix}Wqkv.bias", torch.cat([module.bias for module in projections])
    yield f"{prefix}out_proj.weight", mixer.out_proj.weight
    if mixer.out_proj.bias is not None:
        yield f"{prefix}out_proj.bias", mixer.out_proj.bias


_Describe = Callable[[HyenaConfig], dict[str, Any]]
EXPORTS: dict[str, tuple[_Describe, _Describe, Callable[[Any], Iterator[tuple[str, Tensor]]]]] = {
    "longsafari-hf": (_required_of_hyenadna, _describe_hyenadna, _hyenadna_tensors),
    "stripedhyena": (_required_of_striped, _describe_striped, _striped_tensors),
}

__all__ = ["EXPORTS", "export_checkpoint"]
