# SPDX-License-Identifier: Apache-2.0
"""Read safari's language models and HyenaDNA: `safari-lm`, `longsafari-seqlen`, `longsafari-hf`.

All three name tensors alike. What differs, and what these files do not say, is here (Poli et al. 2023, arXiv
2302.10866; Nguyen et al. 2023, arXiv 2306.15794; their repositories):

- safari packs filter channels (channel, order), HyenaDNA (order, channel), which matters from order 3 on;
- the windows of HyenaDNA are shifted by 0.05 in all code that runs its published weights, those of safari by 0;
- the released 153M language model was trained with modulation in its configuration but evaluated without, and its
  published results are those without;
- positional features are stored in every file. Where they are the formula's, as in all DNA models (48 million numbers
  at a length of a million, seven times the weights), they are left to the formula; where they were trained, kept;
- one sine frequency a unit serves all layers of a filter: files hold it once or several times over;
- sizes are read from tensors, since configurations name options that the published code ignores.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import filter_times, positional_features
from hyena_hf.heads import HyenaForSequenceClassification
from hyena_hf.modeling_hyena import HyenaForCausalLM

from .files import Source
from .layout import WRAPPERS, Conversion, Read, Reader, refuse_settings


# Rows of positional features that are compared with the formula at once.
_ROWS = 65536

# Largest difference between stored and computed positional features that rounding explains; training moves them more.
_ROUNDING = 1e-5

# Released checkpoints whose configuration lies elsewhere: title and whether their filters are modulated.
_MODULATED = {"hyena-small-150b-tok": False, "hyena_small_150b_tok": False}

# What trainers keep beside the weights.
_BESIDES = re.compile(r"^(train|val|test)?_?(torch)?metrics\.|^(loss|loss_val)\.|num_tokens\.count$")

_FILTER = "mixer.filter_fn."

# Rows of a DNA model's embedding: twelve tokens, or padded to a multiple of eight.
_DNA_ROWS = (12, 16)


def canonical_name(published: str) -> str | None:
    """The name inside the backbone's owner, without what wrappers put around it; None for what is no weight."""
    if _BESIDES.search(published):
        return None
    name = WRAPPERS.sub("", published)
    for prefix in ("model.", "hyena."):
        name = name.removeprefix(prefix)
    # modules that recompute activations (`checkpoint_mixer`, `checkpoint_mlp`) wrap the one they hold
    return name.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")


def is_safari(source: Source) -> bool:
    """Whether the weights are named as safari names them."""
    return any("mixer.filter_fn." in name.replace(".layer.", ".") for name in source.tensors.names())


def layout_of(source: Source) -> str | None:
    """Which of the three layouts a checkpoint has; None for another."""
    if not is_safari(source):
        return None
    names = source.tensors.names()
    if source.config.get("model_type") == "hyenadna" or any(name.startswith("hyena.backbone.") for name in names):
        return "longsafari-hf"
    # safari's own trainer puts "model." before its names too
    in_trainer = any(WRAPPERS.sub("", name).startswith("model.backbone.") for name in names)
    return "longsafari-seqlen" if in_trainer and _has_dna_rows(source) else "safari-lm"


def _has_dna_rows(source: Source) -> bool:
    table = [name for name in source.tensors.names() if name.endswith("embeddings.word_embeddings.weight")]
    return bool(table) and source.tensors.shape(table[0])[0] in _DNA_ROWS


def read(source: Source, layout: str) -> Conversion:
    """The conversion of a checkpoint in one of the three layouts."""
    reader = Reader(source, canonical_name)
    if not any(name.startswith("backbone.layers.") for name in reader.names()):
        raise ValueError(f"{source.name} has no backbone.layers.*: it is no {layout} checkpoint")
    settings = _settings(source, layout)
    dna = layout != "safari-lm"
    notes: list[str] = []
    warnings: list[str] = []
    if not dna and _has_dna_rows(source):
        warnings.append(
            "The vocabulary is as small as that of DNA models; if this is a HyenaDNA, name its layout, "
            "longsafari-seqlen, whose windows are shifted."
        )
    if not settings["modulation"] and source.config.get("layer", {}).get("modulate"):
        warnings.append("Its configuration asks for modulation, but the released results are those without.")
    config = _config(source, reader, settings, layout, notes)
    tensors = _tensors(reader, config, channel_major=not dna)
    model_class: Any = HyenaForCausalLM
    if "score.weight" in reader:
        model_class = HyenaForSequenceClassification
        tensors["score.weight"] = reader.lazily("score.weight")
        config.num_labels = reader.shape("score.weight")[0]
        _keep_labels(source, config)
        reader.drop("lm_head.weight")
        config.tie_word_embeddings = True
    elif not config.tie_word_embeddings:
        tensors["lm_head.weight"] = reader.lazily("lm_head.weight")
    reader.refuse_leftovers()
    return Conversion(
        layout,
        config,
        tensors,
        model_class,
        partial(_nucleotide_tokenizer, config.max_position_embeddings) if dna else None,
        notes,
        warnings,
        dtype=reader.dtype("backbone.embeddings.word_embeddings.weight"),
    )


def _keep_labels(source: Source, config: HyenaConfig) -> None:
    """Names of classes and kind of problem of a classifier."""
    names = source.config.get("id2label")
    if isinstance(names, dict) and len(names) == config.num_labels:
        config.id2label = {int(label): name for label, name in names.items()}
        config.label2id = {name: label for label, name in config.id2label.items()}
    config.problem_type = source.config.get("problem_type")


def _nucleotide_tokenizer(longest: int) -> Any:
    from hyena_hf.tokenization_nucleotide import HyenaNucleotideTokenizer

    return HyenaNucleotideTokenizer(model_max_length=longest)


def _settings(source: Source, layout: str) -> dict[str, Any]:
    """What only the configuration knows, by our names of it."""
    raw = source.config
    if layout == "longsafari-hf":
        # the published code reads it for the last norm only
        refuse_settings(raw, {"layer_norm_epsilon": 1e-5}, f"{source.name}: its configuration")
        return {
            "modulation": True,
            "shift": 0.05,
            "frequency": raw.get("activation_freq", 10),
            "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
            "embed_dropout": raw.get("embed_dropout", 0.1),
            "hyena_dropout": raw.get("hyena_dropout", 0.0),
            "resid_dropout": 0.0,
            "residual_in_fp32": True,
            "initializer_range": raw.get("initializer_range", 0.02),
        }
    layer = raw.get("layer", {})
    if not isinstance(layer, dict):
        raise ValueError(f"{source.name}: 'layer' in its configuration must be an object, got {layer!r}")
    ignored = {"num_blocks": 1, "num_heads": 1, "inner_factor": 1, "bidirectional": False, "normalized": False}
    refuse_settings(
        layer, {**ignored, "activation": "id", "post_order_ffn": False, "bias": True}, f"{source.name}: layer"
    )
    if raw.get("attn_layer_idx"):
        raise ValueError(
            f"{source.name} has attention layers {raw['attn_layer_idx']}; no such checkpoint is published"
        )
    return {
        "modulation": _is_modulated(source, layout, layer),
        "shift": layer.get("shift", 0.0 if layout == "safari-lm" else 0.05),
        "frequency": layer.get("w", 10 if layout != "safari-lm" else 14),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "embed_dropout": raw.get("embed_dropout", 0.1),
        "hyena_dropout": layer.get("dropout", 0.0),
        "resid_dropout": raw.get("resid_dropout", 0.0),
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "initializer_range": 0.02,
        "fast_decay": layer.get("fast_decay_pct", 0.3),
        "slow_decay": layer.get("slow_decay_pct", 1.5),
        "modulation_target": layer.get("target", 1e-2),
    }


def _is_modulated(source: Source, layout: str, layer: dict[str, Any]) -> bool:
    """Whether filters are multiplied by windows: files hold the windows' rates either way."""
    for known, modulated in _MODULATED.items():
        if layout == "safari-lm" and known in [Path(part).stem for part in source.title.split("/")]:
            return modulated  # whatever its training configuration says, see the top of this file
    if "modulate" in layer or layout != "safari-lm":
        return layer.get("modulate", True)
    if layer or "d_model" in source.config:
        return True  # the published default
    raise ValueError(
        f"{source.name}: whether filters are modulated stands in no weight, and there is no configuration; put a "
        f'config.json beside the weights with {{"d_model": ..., "layer": {{"modulate": true}}}} (or false), as the '
        f"model was trained"
    )


def _config(source: Source, reader: Reader, settings: dict[str, Any], layout: str, notes: list[str]) -> HyenaConfig:
    """Sizes from tensors, the rest from the configuration."""
    first = "backbone.layers.0."
    vocab, width = reader.shape("backbone.embeddings.word_embeddings.weight")
    layers = {int(name.split(".")[2]) for name in reader.names() if name.startswith("backbone.layers.")}
    rows = reader.shape(f"{first}mixer.in_proj.weight")[0]
    hidden, features = reader.shape(f"{first}{_FILTER}implicit_filter.0.weight")
    linears = [name for name in reader.names() if re.fullmatch(rf"{first}{_FILTER}implicit_filter\.\d+\.weight", name)]
    length = reader.shape(f"{first}{_FILTER}pos_emb.t")[1]
    trained = _trained_features(reader, len(layers), length, (features - 1) // 2, notes)
    dna = layout != "safari-lm"
    shape = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "intermediate_size": reader.shape(f"{first}mlp.fc1.weight")[0],
        "max_position_embeddings": length,
        "order": rows // width - 1,
        "filter_hidden_size": hidden,
        "filter_num_layers": len(linears),
        "filter_num_bands": (features - 1) // 2,
        "short_conv_kernel": reader.shape(f"{first}mixer.short_filter.weight")[2],
        "trainable_positional_features": trained,
        "use_bias": f"{first}mixer.in_proj.bias" in reader,
        "tie_word_embeddings": _is_tied(reader),
    }
    if dna:
        shape |= {"pad_token_id": 4, "bos_token_id": 0, "eos_token_id": 1}
    elif vocab >= 50257:  # GPT-2's tokens
        shape |= {"bos_token_id": 50256, "eos_token_id": 50256}
    given = dict(settings)
    renamed = {"modulation_shift": given.pop("shift"), "sine_frequency": given.pop("frequency")}
    _check_claims(source, shape)
    return HyenaConfig(**shape, **renamed, **given)


def _check_claims(source: Source, shape: dict[str, Any]) -> None:
    """Raise where a configuration contradicts its weights."""
    raw = source.config
    claims = {
        "d_model": shape["hidden_size"],
        "n_layer": shape["num_hidden_layers"],
        "d_inner": shape["intermediate_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "hyena_order": shape["order"],
    }
    for name, found in claims.items():
        if raw.get(name) is not None and raw[name] != found:
            raise ValueError(
                f"{source.name}: its configuration says {name}={raw[name]}, but its weights {found}; check that both "
                f"come from the same model"
            )


def _is_tied(reader: Reader) -> bool:
    """Whether the head is the embedding: all of these models were trained so, but files may hold it twice."""
    if "lm_head.weight" not in reader:
        return True
    head, embedding = reader.take("lm_head.weight"), reader.take("backbone.embeddings.word_embeddings.weight")
    return head.shape == embedding.shape and torch.equal(head, embedding)


def _trained_features(reader: Reader, layers: int, length: int, bands: int, notes: list[str]) -> bool:
    """Whether positional features differ from the formula; times must not."""
    worst = 0.0
    for layer in range(layers):
        times = reader.take(f"backbone.layers.{layer}.{_FILTER}pos_emb.t").flatten().float()
        if times.shape != (length,) or (times - filter_times(length, length)).abs().max() > _ROUNDING:
            raise ValueError(
                f"{reader.source.name}: filter times of layer {layer} are no {length} steps from 0 to 1; it is no "
                f"checkpoint of this kind"
            )
        stored = reader.take(f"backbone.layers.{layer}.{_FILTER}pos_emb.z")[0]
        if stored.shape != (length, 2 * bands + 1):
            raise ValueError(
                f"{reader.source.name}: positional features of layer {layer} have shape {tuple(stored.shape)}, "
                f"expected {(length, 2 * bands + 1)}"
            )
        worst = max(worst, _distance_from_formula(stored, length, bands))
    if worst > _ROUNDING:
        notes.append(
            f"Positional features were trained (up to {worst:.2g} from the formula) and are kept; the model takes no "
            f"more than {length} tokens."
        )
        return True
    notes.append("Positional features are those of the formula and are computed, not stored.")
    return False


def _distance_from_formula(stored: Tensor, length: int, bands: int) -> float:
    # in blocks: the table of a million rows is as large as the model several times over
    distances = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        computed = positional_features(stop, length, bands, start=start)
        distances.append((stored[start:stop].float() - computed).abs().max().item())
    return max(distances)


def _tensors(reader: Reader, config: HyenaConfig, *, channel_major: bool) -> dict[str, Read]:
    """Our names and how to get them."""
    found = {
        "model.embed_tokens.weight": reader.lazily("backbone.embeddings.word_embeddings.weight"),
        "model.norm.weight": reader.lazily("backbone.ln_f.weight"),
        "model.norm.bias": reader.lazily("backbone.ln_f.bias"),
    }
    if config.tie_word_embeddings:
        reader.drop("lm_head.weight")
    renamed = {
        "norm1": "mixer_norm",
        "norm2": "mlp_norm",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "mixer.in_proj": "mixer.in_proj",
        "mixer.out_proj": "mixer.out_proj",
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"backbone.layers.{layer}.", f"model.layers.{layer}."
        for old, new in renamed.items():
            for kind in ("weight", "bias"):
                if f"{theirs}{old}.{kind}" in reader:
                    found[f"{ours}{new}.{kind}"] = reader.lazily(f"{theirs}{old}.{kind}")
        found[f"{ours}mixer.short_conv.weight"] = reader.lazily(
            f"{theirs}mixer.short_filter.weight", lambda weight: weight.squeeze(1)
        )
        if f"{theirs}mixer.short_filter.bias" in reader:
            found[f"{ours}mixer.short_conv.bias"] = reader.lazily(f"{theirs}mixer.short_filter.bias")
        found |= _filter_tensors(reader, config, layer, channel_major)
    return found


def _filter_tensors(reader: Reader, config: HyenaConfig, layer: int, channel_major: bool) -> dict[str, Read]:
    theirs, ours = f"backbone.layers.{layer}.{_FILTER}", f"model.layers.{layer}.mixer."
    steps, width = config.order - 1, config.hidden_size

    def unpacked(packed: Tensor) -> Tensor:
        """Filters (steps D, ...) in our order, step by step, as (steps, D, ...)."""
        if channel_major:
            return packed.unflatten(0, (width, steps)).transpose(0, 1).contiguous()
        return packed.unflatten(0, (steps, width))

    last = 2 * (config.filter_num_layers - 1)
    found = {
        f"{ours}skip": reader.lazily(f"{theirs}bias", unpacked),
        f"{ours}filter.output.weight": reader.lazily(
            f"{theirs}implicit_filter.{last}.weight", lambda weight: unpacked(weight).flatten(0, 1)
        ),
        f"{ours}filter.frequency": _frequency(reader, theirs),
    }
    for index in range(config.filter_num_layers - 1):
        for kind in ("weight", "bias"):
            found[f"{ours}filter.layers.{index}.{kind}"] = reader.lazily(f"{theirs}implicit_filter.{2 * index}.{kind}")
    if config.modulation:
        found[f"{ours}filter.decay_rates"] = reader.lazily(
            f"{theirs}modulation.deltas", lambda rates: unpacked(rates.flatten())
        )
    reader.drop(f"{theirs}modulation.deltas")
    if config.trainable_positional_features:
        found[f"{ours}filter.features"] = reader.lazily(f"{theirs}pos_emb.z", lambda table: table[0])
    for table in ("z", "t"):
        reader.drop(f"{theirs}pos_emb.{table}")
    return found


def _frequency(reader: Reader, prefix: str) -> Read:
    """The one sine frequency of a filter, after checking that all its copies are equal."""
    copies = [name for name in reader.names() if re.fullmatch(rf"{prefix}implicit_filter\.\d+\.freq", name)]
    first, *others = copies or [f"{prefix}implicit_filter.1.freq"]
    for other in others:
        if not torch.equal(reader.take(first), reader.take(other)):
            raise ValueError(
                f"{reader.source.name}: {first} and {other} differ, but one frequency serves all layers of a filter"
            )
    return reader.lazily(first, lambda frequency: frequency.flatten())


__all__ = ["layout_of", "read"]
