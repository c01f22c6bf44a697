# SPDX-License-Identifier: Apache-2.0
"""Read StripedHyena 7B, Evo 1 and 1.5, Evo 2: `stripedhyena`, `evo1`, `evo2`.

Sources: stripedhyena 0.2.2 and Poli et al. 2023 (together.ai, "StripedHyena"); evo-model 0.5 and Nguyen et al. 2024,
"Sequence modeling and design from molecular to genome scale with Evo"; vtx 1.1.0 and Ku et al. 2025, arXiv 2503.01868
(StripedHyena 2). What needs care:

- rows of the projections: x_2, x_1, v by turns of a head (StripedHyena, Evo 1) or of single rows (Evo 2); ours stand
  one after the other. The short convolution acts on each row alone, so its rows move along;
- published residues begin at lag 0, h_t = Re sum R p^t; ours behind it, h_0 = direct, h_t = Re sum (R p) p^(t-1);
- real filters (Evo 2) are logarithms of poles; those of 128 taps and more convolve, tap 0 for the current token, and
  have a skip; shorter ones correlate, the last tap for the current token, and have none;
- the epsilon of the norm stands outside the root, unless `use_flash_rmsnorm` is set, as in StripedHyena 7B;
- Evo 2's MLPs have an activation in the first block only; its files hold rotary frequencies rounded to bfloat16, which
  the published code uses, where StripedHyena and Evo 1 compute them;
- Evo's tokens are bytes, its end-of-document token is 0 and its padding 1, whatever the file says.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.ops.modal import NO_POLE

from .files import Source
from .layout import WRAPPERS, Conversion, Read, Reader, refuse_settings


# Rows of Evo's embedding, of which bytes use the first half.
_BYTE_VOCABULARY = 512

# Taps from which Evo 2's explicit filters convolve and have a skip.
_CONVOLVED = 128

# What the repositories of Evo 2 leave to the package that runs them: by the name of their file of weights, the longest
# input, rotary base, factor on positions, and whether the published code projects in FP8.
_EVO2: dict[str, tuple[int, float, float, bool]] = {
    "evo2_7b_262k": (262144, 1e4, 32, False),
    "evo2_7b_base": (32768, 1e4, 1, False),
    "evo2_7b_microviridae": (32768, 1e4, 1, False),
    "evo2_7b": (1048576, 1e4, 128, False),
    "evo2_1b_base": (8192, 1e4, 1, True),
    "evo2_20b": (1048576, 1e6, 128, True),
    "evo2_40b_base": (8192, 1e6, 1, True),
    "evo2_40b": (1048576, 1e6, 128, True),
}
_MLP = {"l1": "gate", "l2": "up", "l3": "down"}

# Kept beside the weights: state of FP8 kernels, tables that are computed.
_BESIDES = re.compile(r"(\._extra_state|\.filter\.t)$|fftconv|twiddle_factors|^blocks\.\d+\.mixer\.")


def canonical_name(published: str) -> str | None:
    """The name inside the model that owns the blocks; None for what is no weight."""
    name = WRAPPERS.sub("", published).removeprefix("sh.").removeprefix("backbone.")
    return None if _BESIDES.search(name) else name


def layout_of(source: Source) -> str | None:
    """Which of the three layouts a checkpoint has; None for another."""
    names = [canonical_name(name) for name in source.tensors.names()]
    found = {name.partition(".filter.")[2] for name in names if name is not None and ".filter." in name}
    if {"log_poles", "h"} & found:
        return "evo2"
    if "poles" not in found:
        return None
    kind = source.config.get("tokenizer_type")
    table = next((name for name in source.tensors.names() if canonical_name(name) == "embedding_layer.weight"), None)
    rows = None if table is None else source.tensors.shape(table)[0]
    return "evo1" if kind == "CharLevelTokenizer" or (kind is None and rows == _BYTE_VOCABULARY) else "stripedhyena"


def read(source: Source, layout: str) -> Conversion:
    """The conversion of a checkpoint in one of the three layouts."""
    reader = Reader(source, canonical_name)
    if "embedding_layer.weight" not in reader:
        raise ValueError(f"{source.name} has no embedding_layer.weight: it is no {layout} checkpoint")
    warnings: list[str] = []
    raw = _settings(source, reader, layout, warnings)
    _check_claims(reader, raw)
    config = _config(reader, raw, layout)
    conversion = Conversion(layout, config, _tensors(reader, raw, config, warnings), warnings=warnings)
    conversion.dtype = reader.dtype("embedding_layer.weight")
    conversion.tokenizer = _byte_tokenizer if layout != "stripedhyena" else _stored_tokenizer(source, conversion.notes)
    reader.refuse_leftovers()
    return conversion


def _byte_tokenizer() -> Any:
    from hyena_hf.tokenization_byte import HyenaByteTokenizer, byte_token

    # bytes 0 and 1 are Evo's special tokens
    end, pad = byte_token(0), byte_token(1)
    return HyenaByteTokenizer(eos_token=end, bos_token=end, pad_token=pad, mask_token=None, add_bos_token=False)


def _stored_tokenizer(source: Source, notes: list[str]) -> Callable[[], Any] | None:
    if not (source.folder / "tokenizer.json").is_file():
        notes.append("The published files hold no tokenizer.json; add that of the model to this folder.")
        return None

    def load() -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(source.folder)

    return load


def _settings(source: Source, reader: Reader, layout: str, warnings: list[str]) -> dict[str, Any]:
    """The published configuration, completed by what stands in the code that runs it."""
    raw = dict(source.config)
    if layout == "evo2":
        raw = _completed_evo2(source, reader, raw, warnings)
    if not isinstance(raw.get("num_attention_heads"), int):
        raise ValueError(
            f"{source.name}: its configuration has no num_attention_heads; put the published config.json (or .yml) "
            f"beside the weights"
        )
    if layout == "stripedhyena" and raw.get("model_type") == "stripedhyena":
        silent = [name for name in ("rotary_emb_base", "use_flash_rmsnorm", "eps", "proj_groups") if name not in raw]
        if silent:
            warnings.append(
                f"The configuration says nothing of {', '.join(silent)}: taken as the package stripedhyena does, not "
                f"as the configuration class of its repository."
            )
    expected: dict[str, Any] = {"final_norm": True, "smeared_gqa": False, "hyena_filter_groups": 1}
    refuse_settings(raw, expected, f"{source.name}: its configuration")
    return raw


def _check_claims(reader: Reader, raw: dict[str, Any]) -> None:
    """Raise where a configuration contradicts its weights."""
    vocab, width = reader.shape("embedding_layer.weight")
    heads, groups = raw["num_attention_heads"], raw.get("proj_groups", 1)
    found: dict[str, Any] = {"hidden_size": width, "inner_mlp_size": reader.shape("blocks.0.mlp.l1.weight")[0]}
    blocks = {int(name.split(".")[1]) for name in reader.names() if name.startswith("blocks.")}
    found["num_layers"] = len(blocks)
    attention = [block for block in sorted(blocks) if f"blocks.{block}.inner_mha_cls.Wqkv.weight" in reader]
    found["attn_layer_idxs"] = attention
    for name, value in found.items():
        if raw.get(name) is not None and raw[name] != value:
            raise ValueError(
                f"{reader.source.name}: its configuration says {name}={raw[name]}, but its weights {value}; check "
                f"that both come from the same model"
            )
    if raw.get("vocab_size") is not None and raw["vocab_size"] > vocab:
        raise ValueError(f"{reader.source.name}: vocab_size={raw['vocab_size']}, but its embedding has {vocab} rows")
    if width % heads or heads % groups:
        raise ValueError(f"{reader.source.name}: {heads} heads in {groups} groups do not divide a width of {width}")
    head = width // heads
    for block in attention:
        prefix = f"blocks.{block}.inner_mha_cls."
        rows, expected = reader.shape(f"{prefix}Wqkv.weight")[0], (heads + 2 * heads // groups) * head
        frequencies = f"{prefix}rotary_emb.inv_freq"
        pairs = reader.shape(frequencies)[0] if frequencies in reader else head // 2
        if rows != expected or pairs != head // 2:
            raise ValueError(
                f"{reader.source.name}: block {block} has {rows} rows of queries, keys and values and {pairs} rotary "
                f"frequencies, but num_attention_heads={heads} and proj_groups={groups} ask for {expected} and "
                f"{head // 2}; check the configuration"
            )


def _completed_evo2(source: Source, reader: Reader, raw: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    known = next((name for name in _names_of(source) if name in _EVO2), None)
    width = reader.shape("embedding_layer.weight")[1]
    # files of 7B models of all lengths ask for FP8 too, but their publishers run them without
    asked = bool(raw.get("use_fp8_input_projections")) and width != 4096
    fp8 = asked if known is None else _EVO2[known][3]
    if "rotary_emb_base" not in raw:
        if known is None:
            raise ValueError(
                f"{source.name}: its rotary base and longest input stand in no weight, and there is no configuration; "
                f"put the published .yml beside the weights, or keep the published file name ({', '.join(_EVO2)})"
            )
        longest, base, factor, _ = _EVO2[known]
        raw = {
            "max_seqlen": longest,
            "rotary_emb_base": base,
            "rotary_emb_scaling_factor": factor,
            "use_interpolated_rotary_pos_emb": factor != 1,
            "num_attention_heads": width // (2 * _first(reader, ".rotary_emb.inv_freq")[0]),
            "evo2_style_activations": True,
            "interleave": True,
            "column_split_hyena": False,
            **raw,
        }
    if fp8:
        warnings.append(
            "The published code runs the input projections of this model in FP8 and its weights are trained for that; "
            "here they run in the model's dtype, and logits differ from the published ones."
        )
    return {"mlp_activation": "gelu", "column_split": True, "eps": 1e-6, **raw}


def _names_of(source: Source) -> list[str]:
    """What the checkpoint is called, without endings: its files, then its folder or repository."""
    files = sorted({path.name for path in source.tensors.files.values()})
    return [name.partition(".")[0] for name in (*files, *source.title.split("/"))]


def _config(reader: Reader, raw: dict[str, Any], layout: str) -> HyenaConfig:
    vocab, width = reader.shape("embedding_layer.weight")
    layers = range(1 + max(int(name.split(".")[1]) for name in reader.names() if name.startswith("blocks.")))
    kinds = [_kind(reader, layer) for layer in layers]
    heads = raw["num_attention_heads"]
    longest = raw.get("max_seqlen") or raw.get("max_sequence_len") or 8192
    act = raw.get("mlp_activation", "silu")
    return HyenaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=len(kinds),
        intermediate_size=reader.shape("blocks.0.mlp.l1.weight")[0],
        max_position_embeddings=longest,
        layer_types=["full_attention" if kind == "attention" else "hyena" for kind in kinds],
        filter_types=["explicit" if kind == "explicit" else "modal" for kind in kinds],
        **_filter_sizes(reader, kinds, width, longest),
        short_conv_kernel=_first(reader, ".filter.short_filter_weight")[-1],
        norm_type="rms_norm" if raw.get("use_flash_rmsnorm", False) else "rms_norm_outer_eps",
        norm_eps=float(raw.get("eps", 1e-6)),
        hidden_act=[act, *["linear"] * (len(kinds) - 1)] if raw.get("evo2_style_activations") else act,
        gated_mlp=True,
        mlp_bias=False,
        use_bias=_biases(reader),
        num_attention_heads=heads,
        num_key_value_heads=heads // raw.get("proj_groups", 1),
        rope_parameters=_rope(raw, layout),
        rope_frequency_dtype=_frequency_dtype(reader, raw, width // heads) if layout == "evo2" else "float32",
        tie_word_embeddings=bool(raw.get("tie_embeddings", False)) or "unembed.weight" not in reader,
        **_special_tokens(raw, layout),
    )


def _kind(reader: Reader, layer: int) -> str:
    """What mixes in a block: `attention`, `explicit`, `complex` or `real`."""
    of = {"inner_mha_cls.Wqkv.weight": "attention", "filter.h": "explicit", "filter.poles": "complex"}
    for name, kind in {**of, "filter.log_poles": "real"}.items():
        if f"blocks.{layer}.{name}" in reader:
            return kind
    raise ValueError(f"{reader.source.name}: block {layer} has neither attention nor a filter; the file is incomplete")


def _first(reader: Reader, ending: str) -> tuple[int, ...]:
    return next((reader.shape(name) for name in reader.names() if name.endswith(ending)), (1,))


def _filter_sizes(reader: Reader, kinds: list[str], width: int, longest: int) -> dict[str, Any]:
    """Taps, groups, states and poles of every layer; values of other kinds of layers have no meaning."""
    lengths, groups, states, poles = [], [], [], []
    for layer, kind in enumerate(kinds):
        explicit = reader.shape(f"blocks.{layer}.filter.h") if kind == "explicit" else (width, 1, longest)
        lengths.append(explicit[2])
        groups.append(explicit[0])
        count = reader.shape(f"blocks.{layer}.filter.residues")[1] if kind in ("complex", "real") else 1
        states.append(2 * count if kind == "complex" else count)
        poles.append(count)
    sizes: dict[str, Any] = {"state_size": states, "num_poles": poles}
    if "explicit" in kinds:
        sizes |= {"filter_length": lengths, "filter_groups": groups}
    return sizes


def _biases(reader: Reader) -> list[str]:
    """Names of the projections that have a bias, in the words of `HyenaConfig.use_bias`."""
    published = {
        "in_proj": ".projections.bias",
        "short_conv": ".filter.short_filter_bias",
        "out_proj": ".out_filter_dense.bias",
        "qkv_proj": ".inner_mha_cls.Wqkv.bias",
        "attention_out_proj": ".inner_mha_cls.out_proj.bias",
    }
    return [ours for ours, ending in published.items() if any(name.endswith(ending) for name in reader.names())]


def _rope(raw: dict[str, Any], layout: str) -> dict[str, Any]:
    theta = float(raw.get("rotary_emb_base", 1e6 if layout == "evo2" else 1e4))
    if raw.get("use_interpolated_rotary_pos_emb"):
        factor = float(raw.get("rotary_emb_scaling_factor", 1.0))
        return {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    return {"rope_type": "default", "rope_theta": theta}


def _frequency_dtype(reader: Reader, raw: dict[str, Any], head: int) -> Any:
    """Whether stored rotary frequencies are those of the formula, or these rounded to bfloat16."""
    theta = float(raw.get("rotary_emb_base", 1e6))
    exact = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    rounded = exact.bfloat16().float()
    stored = [name for name in reader.names() if name.endswith("rotary_emb.inv_freq")]
    kinds = set()
    for name in stored:
        found = reader.take(name)
        if found.dtype != torch.float32 or torch.allclose(found, exact, rtol=1e-6, atol=0):
            kinds.add("float32")  # others are computed anew by the published code
        elif torch.equal(found, rounded) or torch.allclose(found, rounded, rtol=1e-6, atol=0):
            kinds.add("bfloat16")
        else:
            raise ValueError(
                f"{reader.source.name}: {name} is not the rotary frequencies of base {theta:g}, rounded or not; check "
                f"rotary_emb_base in its configuration"
            )
    if len(kinds) > 1:
        raise ValueError(f"{reader.source.name}: rotary frequencies are rounded in some layers only")
    return kinds.pop() if kinds else "float32"


def _special_tokens(raw: dict[str, Any], layout: str) -> dict[str, Any]:
    if layout == "stripedhyena":
        return {"bos_token_id": raw.get("bos_token_id", 1), "eos_token_id": raw.get("eos_token_id", 2)}
    return {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def _tensors(reader: Reader, raw: dict[str, Any], config: HyenaConfig, warnings: list[str]) -> dict[str, Read]:
    found = {
        "model.embed_tokens.weight": reader.lazily("embedding_layer.weight"),
        "model.norm.weight": reader.lazily("norm.scale"),
    }
    if config.tie_word_embeddings:
        reader.drop("unembed.weight")
    else:
        found["lm_head.weight"] = reader.lazily("unembed.weight")
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{layer}.", f"model.layers.{layer}."
        renamed = {"pre_norm.scale": "mixer_norm.weight", "post_norm.scale": "mlp_norm.weight"}
        renamed |= {f"mlp.{old}.weight": f"mlp.{new}_proj.weight" for old, new in _MLP.items()}
        found |= {ours + new: reader.lazily(theirs + old) for old, new in renamed.items()}
        if config.layer_types[layer] == "hyena":
            found |= _hyena_tensors(reader, raw, config, layer, warnings)
        else:
            found |= _attention_tensors(reader, raw, config, layer)
    return found


def rows_of_projections(raw: dict[str, Any], width: int) -> Tensor:
    """Published row of each of ours, x_0 then x_1 then v, (3 D,)."""
    rows = torch.arange(3 * width)
    if raw.get("interleave", False):
        rows = torch.cat([rows[first::3] for first in range(3)])
    if raw.get("column_split_hyena", True):
        heads = raw["num_attention_heads"]
        rows = rows.view(heads, 3, width // heads).transpose(0, 1).flatten()
    if raw.get("hyena_flip_x1x2", False):
        rows = torch.cat([rows[width : 2 * width], rows[:width], rows[2 * width :]])
    return rows


def _hyena_tensors(
    reader: Reader, raw: dict[str, Any], config: HyenaConfig, layer: int, warnings: list[str]
) -> dict[str, Read]:
    theirs, ours = f"blocks.{layer}.", f"model.layers.{layer}.mixer."
    rows = rows_of_projections(raw, config.hidden_size)
    found = {
        f"{ours}in_proj.weight": reader.lazily(f"{theirs}projections.weight", lambda weight: weight[rows]),
        f"{ours}short_conv.weight": reader.lazily(
            f"{theirs}filter.short_filter_weight", lambda weight: weight.squeeze(1)[rows]
        ),
        f"{ours}out_proj.weight": reader.lazily(f"{theirs}out_filter_dense.weight"),
    }
    if config.has_bias("in_proj"):
        found[f"{ours}in_proj.bias"] = reader.lazily(f"{theirs}projections.bias", lambda bias: bias[rows])
    if config.has_bias("short_conv"):
        found[f"{ours}short_conv.bias"] = reader.lazily(f"{theirs}filter.short_filter_bias", lambda bias: bias[rows])
    if config.has_bias("out_proj"):
        found[f"{ours}out_proj.bias"] = reader.lazily(f"{theirs}out_filter_dense.bias")
    kind = _kind(reader, layer)
    if f"{theirs}filter.D" in reader:
        found[f"{ours}skip"] = reader.lazily(f"{theirs}filter.D", lambda skip: skip.unsqueeze(0))
    else:
        width, dtype = config.hidden_size, reader.dtype("embedding_layer.weight")
        found[f"{ours}skip"] = lambda: torch.zeros(1, width, dtype=dtype)
    if kind == "explicit":
        found[f"{ours}filter.weight"] = reader.lazily(f"{theirs}filter.h", _taps)
    else:
        found |= _modal_tensors(reader, layer, kind, warnings)
    return found


def _taps(h: Tensor) -> Tensor:
    """Explicit taps (G, 1, K) in the order of lags, (1, G, K)."""
    return h.transpose(0, 1) if h.shape[-1] >= _CONVOLVED else h.transpose(0, 1).flip(-1)


def _modal_tensors(reader: Reader, layer: int, kind: str, warnings: list[str]) -> dict[str, Read]:
    theirs, ours = f"blocks.{layer}.filter.", f"model.layers.{layer}.mixer.filter."
    poles = f"{theirs}poles" if kind == "complex" else f"{theirs}log_poles"

    reader.drop(poles)
    reader.drop(f"{theirs}residues")
    parameters = modal_parameters(reader.take(poles), reader.take(f"{theirs}residues"))
    growing = (parameters["log_radius"] >= 0).any(dim=-1).nonzero().flatten().tolist()
    if growing:
        warnings.append(
            f"Filters of layer {layer} do not decay in {len(growing)} channels (first {growing[:5]}): long inputs can "
            f"overflow there, in the published model too."
        )
    return {f"{ours}{name}": (lambda name=name: parameters[name].unsqueeze(0)) for name in parameters}


def modal_parameters(poles: Tensor, residues: Tensor) -> dict[str, Tensor]:
    """Parameters of a modal filter for published ones.

    Args:
        poles: Complex poles (D, N, 1, 2), or logarithms of real ones (D, N, 1).
        residues: (D, N, 1, 2) or (D, N).

    Returns:
        log_radius, angle, residue_re, residue_im (D, N) and direct (D,), float32, computed in float64. Of a conjugate
        pair the pole above the real axis is taken.
    """
    if poles.ndim == 4:
        p = torch.view_as_complex(poles.double().squeeze(2).contiguous())
        r = torch.view_as_complex(residues.double().squeeze(2).contiguous())
        below = p.imag < 0
        p, r = torch.where(below, p.conj(), p), torch.where(below, r.conj(), r)
        nothing = p == 0
        log_radius = torch.where(nothing, NO_POLE, p.abs().clamp(min=1e-300).log())
        angle = torch.where(nothing, 0.0, p.angle())
    else:
        log_radius = poles.double().squeeze(-1)
        angle = torch.zeros_like(log_radius)
        p = torch.complex(log_radius.exp(), angle)
        r = torch.complex(residues.double(), angle)
    after = r * p
    parts = {"log_radius": log_radius, "angle": angle, "residue_re": after.real, "residue_im": after.imag}
    return {**{name: value.float() for name, value in parts.items()}, "direct": r.real.sum(-1).float()}


def _attention_tensors(reader: Reader, raw: dict[str, Any], config: HyenaConfig, layer: int) -> dict[str, Read]:
    theirs, ours = f"blocks.{layer}.inner_mha_cls.", f"model.layers.{layer}.mixer."
    head = config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads * head, *[config.num_key_value_heads * head] * 2]
    turns = _by_turns(raw, reader)
    if turns and sizes[0] != sizes[1]:
        raise ValueError(
            f"{reader.source.name}: column_split with fewer key-value heads (proj_groups={raw.get('proj_groups')}) is "
            f"in no published checkpoint"
        )

    def rows(packed: Tensor, part: int) -> Tensor:
        """The rows of queries, keys or values."""
        if turns:
            return packed.unflatten(0, (config.num_attention_heads, 3, head))[:, part].flatten(0, 1)
        return packed.split(sizes)[part]

    found = {}
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias") if config.has_bias("qkv_proj") else ("weight",):
            found[f"{ours}{name}.{kind}"] = reader.lazily(
                f"{theirs}Wqkv.{kind}", lambda packed, part=part: rows(packed, part)
            )
    for kind in ("weight", "bias") if config.has_bias("attention_out_proj") else ("weight",):
        found[f"{ours}out_proj.{kind}"] = reader.lazily(f"{theirs}out_proj.{kind}")
    reader.drop(f"{theirs}rotary_emb.inv_freq")
    return found


def _by_turns(raw: dict[str, Any], reader: Reader) -> bool:
    """Whether rows of queries, keys and values take turns by heads: read by Evo 2's code only."""
    evo2 = any(name.endswith((".filter.h", ".filter.log_poles")) for name in reader.names())
    return evo2 and bool(raw.get("column_split", True))


__all__ = ["layout_of", "modal_parameters", "read", "rows_of_projections"]
