# SPDX-License-Identifier: Apache-2.0
"""Read M2-BERT: `m2-bert` (Fu et al. 2023, arXiv 2310.12109, and 2024, arXiv 2402.07440; HazyResearch/m2).

Bidirectional Hyena operators and block-diagonal MLPs in the frame of BERT. Published are 80M (trained at 128, 2k, 8k
and 32k tokens, the long ones also tuned for retrieval), 110M, 260M and 341M, all with the tokens of
`bert-base-uncased` and its vocabulary rounded up to 30,528. What needs care:

- a layer is y = mixer(x), norm(y + mlp(y)): no residual passes the mixer;
- the first block of projections gates before the convolution, the second after it; ours stand the other way round;
- `filter_fn2` convolves the mixer's input, and is added to the gated output;
- one block-diagonal weight gives first what gates in the MLP, then what is gated, so with four blocks the first half
  of the inputs gates what comes from the second;
- `hyena_training_additions`, of the first 80M, is a norm before the mixer, with torch's epsilon 1e-5; all other norms
  have 1e-12;
- one sine frequency serves both nets of a filter: files hold it under six names, or under any of them;
- positional features were trained, and position embeddings have a row a token: no model takes more tokens than it was
  trained on;
- nothing masks padding: the published convolutions read it like text, and the models were trained on inputs padded to
  their full length, so their vectors change with the amount of padding (HazyResearch/m2, issues 19 and 43). Masked
  tokens do not exist here. Padded to the full length and without a mask (or with one of ones) a model gives the
  published vectors; with a mask, those of each text alone, the same in any batch but others than published.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import filter_times
from hyena_hf.heads import HyenaForMaskedLM, HyenaForTextEncoding

from .files import Source
from .layout import WRAPPERS, Conversion, Read, Reader, refuse_settings


# Largest difference between stored and computed times that rounding explains.
_ROUNDING = 1e-5

# Index tables, buffers of fast convolutions, and the classifier beside a pooler that was tuned for retrieval.
_BESIDES = re.compile(r"(^|\.)(position_ids|token_type_ids)$|(^|\.)flashfft\.|^classifier\.")

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "model.embed_tokens.weight",
    "embeddings.position_embeddings.weight": "model.embed_positions.weight",
    "embeddings.token_type_embeddings.weight": "model.embed_token_types.weight",
    "embeddings.LayerNorm.weight": "model.embed_norm.weight",
    "embeddings.LayerNorm.bias": "model.embed_norm.bias",
}
_MASKED_LM = {
    "cls.predictions.transform.dense.weight": "lm_transform.dense.weight",
    "cls.predictions.transform.dense.bias": "lm_transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "lm_transform.norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "lm_transform.norm.bias",
    "cls.predictions.decoder.bias": "lm_head.bias",
}
_DECODER = "cls.predictions.decoder.weight"
_POOLER = {"pooler.dense.weight": "pooler.weight", "pooler.dense.bias": "pooler.bias"}
_LAYER = {
    "attention.out_linear.weight": "mixer.out_proj.weight",
    "attention.out_linear.bias": "mixer.out_proj.bias",
    "mlp.wo.bias": "mlp.down_proj.bias",
    "mlp.layernorm.weight": "mlp_norm.weight",
    "mlp.layernorm.bias": "mlp_norm.bias",
}
_PROJECTIONS = {
    "attention.in_linear.weight": "mixer.in_proj.weight",
    "attention.in_linear.bias": "mixer.in_proj.bias",
    "attention.short_filter.weight": "mixer.short_conv.weight",
    "attention.short_filter.bias": "mixer.short_conv.bias",
}
_FIRST = "encoder.layer.0."
_LINEAR = re.compile(r"encoder\.layer\.0\.attention\.filter_fn\.implicit_filter\.\d+\.weight")


def canonical_name(published: str) -> str | None:
    """The name inside BERT, without what trainers and heads put before it; None for what is no weight."""
    name = WRAPPERS.sub("", published).removeprefix("model.").removeprefix("bert.")
    return None if _BESIDES.search(name) else name


def layout_of(source: Source) -> str | None:
    """`m2-bert`, or None for another layout."""
    names = {canonical_name(name) for name in source.tensors.names()}
    return "m2-bert" if f"{_FIRST}attention.in_linear.weight" in names else None


def read(source: Source, layout: str) -> Conversion:
    """The conversion of a checkpoint: a `HyenaForTextEncoding` where it has a pooler, else a `HyenaForMaskedLM`."""
    reader = Reader(source, canonical_name)
    if f"{_FIRST}attention.in_linear.weight" not in reader:
        raise ValueError(f"{source.name} has no {_FIRST}attention.in_linear.weight: it is no {layout} checkpoint")
    config = _config(source, reader)
    tensors = {ours: reader.lazily(theirs) for theirs, ours in _EMBEDDINGS.items() if theirs in reader}
    for index in range(config.num_hidden_layers):
        tensors |= _layer_tensors(reader, config, f"encoder.layer.{index}.", f"model.layers.{index}.")
    notes = [
        f"Positional features and position embeddings are trained tables: the model takes at most "
        f"{config.max_position_embeddings} tokens."
    ]
    warnings = [
        f"The published code reads padding like text. It gives the published outputs for inputs padded to "
        f"{config.max_position_embeddings} tokens without an attention mask; with a mask, a text has the same outputs "
        f"in any batch, but others than published."
    ]
    pooled = "pooler.dense.weight" in reader
    if pooled:
        tensors |= {ours: reader.lazily(theirs) for theirs, ours in _POOLER.items()}
        if any(name in reader for name in _MASKED_LM):
            notes.append("The head for masked tokens beside the pooler is left out.")
        if any("classifier." in name for name in source.tensors.names()):
            notes.append("The classifier beside the pooler is left out.")
        for name in (*_MASKED_LM, _DECODER):
            reader.drop(name)
    else:
        tensors |= {ours: reader.lazily(theirs) for theirs, ours in _MASKED_LM.items()}
        if not config.tie_word_embeddings:
            tensors["lm_head.weight"] = reader.lazily(_DECODER)
        reader.drop(_DECODER)
    reader.refuse_leftovers()
    tokenizer = None
    if (source.folder / "vocab.txt").is_file():
        tokenizer = partial(_bert_tokenizer, source.folder, config.max_position_embeddings)
    else:
        notes.append("The tokens are those of `bert-base-uncased`, whose files do not lie beside the weights.")
    return Conversion(
        layout,
        config,
        tensors,
        HyenaForTextEncoding if pooled else HyenaForMaskedLM,
        tokenizer,
        notes,
        warnings,
        dtype=reader.dtype("embeddings.word_embeddings.weight"),
    )


def _bert_tokenizer(folder: Path, longest: int) -> Any:
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(folder, model_max_length=longest)


def _config(source: Source, reader: Reader) -> HyenaConfig:
    """Sizes from tensors, the rest from the configuration, which may say as little as its `model_type`."""
    raw = source.config
    refuse_settings(
        raw,
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "bidirectional": True,
            "monarch_mixer_sequence_mixing": True,
            "use_flash_mm": False,
            "attention_pooling": False,
            "sequence_token_planting": False,
        },
        source.name,
    )
    hidden, features = reader.shape(f"{_FIRST}attention.filter_fn.implicit_filter.0.weight")
    up, down = (reader.shape(f"{_FIRST}mlp.{name}.weight") for name in ("gated_layers", "wo"))
    vocab, width = reader.shape("embeddings.word_embeddings.weight")
    inner = down[0] * down[2] if len(down) == 3 else down[1]
    outputs = up[0] * up[1] if len(up) == 3 else up[0]
    dropout = raw.get("hidden_dropout_prob", 0.1)
    config = HyenaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in reader.names() if name.startswith("encoder.layer.")}),
        intermediate_size=inner,
        max_position_embeddings=reader.shape(f"{_FIRST}attention.filter_fn.pos_emb.z")[1],
        is_causal=False,
        filter_hidden_size=hidden,
        filter_num_bands=(features - 1) // 2,
        filter_num_layers=sum(bool(_LINEAR.fullmatch(name)) for name in reader.names()),
        trainable_positional_features=True,
        sine_frequency=raw.get("hyena_w", 10) * raw.get("hyena_w_mod", 1),
        short_conv_kernel=reader.shape(f"{_FIRST}attention.short_filter.weight")[2],
        residual_conv=f"{_FIRST}attention.filter_fn2.bias" in reader,
        block_type="monarch_mixer_norm" if f"{_FIRST}attention.layernorm.weight" in reader else "monarch_mixer",
        learned_positions="embeddings.position_embeddings.weight" in reader,
        type_vocab_size=reader.shape("embeddings.token_type_embeddings.weight")[0],
        norm_eps=1e-12,
        hidden_act="gelu",
        gated_mlp=outputs == 2 * inner,
        mlp_bias=["down_proj"],
        mlp_blocks=up[0] if len(up) == 3 else 1,
        initializer_range=raw.get("initializer_range", 0.02),
        embed_dropout=dropout,
        mlp_dropout=dropout,
        classifier_pooling="mean" if raw.get("pool_all", False) else "first",
        lm_head_transform=True,
        tie_word_embeddings=_is_tied(reader),
        pad_token_id=raw.get("pad_token_id", 0),
    )
    _check_claims(source, config)
    return config


def _check_claims(source: Source, config: HyenaConfig) -> None:
    """Raise where a configuration contradicts its weights."""
    raw = source.config
    # the published code rounds the number of rows up to a multiple of 8
    if raw.get("vocab_size") is not None and -(-raw["vocab_size"] // 8) * 8 != -(-config.vocab_size // 8) * 8:
        raise ValueError(
            f"{source.name}: its configuration says vocab_size={raw['vocab_size']}, but its weights "
            f"{config.vocab_size}; check that both come from the same model"
        )
    claims = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "long_conv_l_max": config.max_position_embeddings,
        "hyena_filter_order": config.filter_hidden_size,
        "hyena_emb_dim": 2 * config.filter_num_bands + 1,
        "residual_long_conv": config.residual_conv,
        "hyena_training_additions": config.block_type == "monarch_mixer_norm",
        "use_positional_encodings": config.learned_positions,
        "use_glu_mlp": config.gated_mlp,
    }
    for name, found in claims.items():
        if raw.get(name, found) != found:
            raise ValueError(
                f"{source.name}: its configuration says {name}={raw[name]}, but its weights {found}; check "
                f"that both come from the same model"
            )


def _is_tied(reader: Reader) -> bool:
    """Whether the head is the embedding: all of these models were trained so, but files may hold it twice."""
    if _DECODER not in reader or "pooler.dense.weight" in reader:
        return True
    head, embedding = reader.take(_DECODER), reader.take("embeddings.word_embeddings.weight")
    return head.shape == embedding.shape and torch.equal(head, embedding)


def _layer_tensors(reader: Reader, config: HyenaConfig, theirs: str, ours: str) -> dict[str, Read]:
    found = {f"{ours}{new}": reader.lazily(f"{theirs}{old}") for old, new in _LAYER.items()}
    found |= {f"{ours}{new}": reader.lazily(f"{theirs}{old}", _in_our_order) for old, new in _PROJECTIONS.items()}
    if config.block_type == "monarch_mixer_norm":
        for kind in ("weight", "bias"):
            found[f"{ours}mixer_norm.{kind}"] = reader.lazily(f"{theirs}attention.layernorm.{kind}")
    found |= _mlp_weights(reader, config, theirs, ours)
    found |= _filter_tensors(reader, config, f"{theirs}attention.filter_fn.", f"{ours}mixer.")
    if config.residual_conv:
        found |= _filter_tensors(reader, config, f"{theirs}attention.filter_fn2.", f"{ours}mixer.residual.")
    return found


def _in_our_order(rows: Tensor) -> Tensor:
    """Rows of gate before, gate after, value as gate after, gate before, value; a Conv1d's without its middle axis."""
    before, after, value = (rows.squeeze(1) if rows.ndim == 3 else rows).chunk(3)
    return torch.cat([after, before, value])


def _mlp_weights(reader: Reader, config: HyenaConfig, theirs: str, ours: str) -> dict[str, Read]:
    up, down = f"{theirs}mlp.gated_layers.weight", f"{theirs}mlp.wo.weight"
    if config.mlp_blocks > 1:
        return {f"{ours}mlp.up_proj.weight": reader.lazily(up), f"{ours}mlp.down_proj.weight": reader.lazily(down)}
    # one block is a dense weight
    found = {f"{ours}mlp.down_proj.weight": reader.lazily(down, lambda weight: weight.squeeze(0))}
    if not config.gated_mlp:
        return {**found, f"{ours}mlp.up_proj.weight": reader.lazily(up, lambda weight: weight.squeeze(0))}
    found[f"{ours}mlp.gate_proj.weight"] = reader.lazily(up, lambda weight: weight.squeeze(0).chunk(2)[0])
    found[f"{ours}mlp.up_proj.weight"] = reader.lazily(up, lambda weight: weight.squeeze(0).chunk(2)[1])
    return found


def _filter_tensors(reader: Reader, config: HyenaConfig, theirs: str, ours: str) -> dict[str, Read]:
    """Tensors of one long convolution: its skip and its filter."""
    found = {
        f"{ours}skip": reader.lazily(f"{theirs}bias", lambda skip: skip.reshape(1, -1)),
        f"{ours}filter.features": reader.lazily(f"{theirs}pos_emb.z", lambda table: table[0]),
        f"{ours}filter.decay_rates": reader.lazily(f"{theirs}modulation.deltas", lambda rates: rates.reshape(1, -1)),
        f"{ours}filter.frequency": _frequency(reader, theirs),
    }
    for net, kind in (("implicit_filter.", ""), ("implicit_filter_rev.", "reverse_")):
        last = config.filter_num_layers - 1  # a sine stands behind every other
        for index in range(last):
            for part in ("weight", "bias"):
                layer = f"{ours}filter.{kind}layers.{index}.{part}"
                found[layer] = reader.lazily(f"{theirs}{net}{2 * index}.{part}")
        found[f"{ours}filter.{kind}output.weight"] = reader.lazily(f"{theirs}{net}{2 * last}.weight")
    _check_times(reader, f"{theirs}pos_emb.t", config.max_position_embeddings)
    return found


def _frequency(reader: Reader, prefix: str) -> Read:
    """The one sine frequency of both nets, after checking that all its copies are equal."""
    copies = [
        name for name in reader.names() if re.fullmatch(rf"{re.escape(prefix)}implicit_filter\w*\.\d+\.freq", name)
    ]
    first, *others = copies or [f"{prefix}implicit_filter.1.freq"]
    for other in others:
        if not torch.equal(reader.take(first), reader.take(other)):
            raise ValueError(
                f"{reader.source.name}: {first} and {other} differ, but one frequency serves all layers of a filter"
            )
    factor = reader.source.config.get("hyena_w_mod", 1)
    return reader.lazily(first, lambda frequency: frequency.flatten() * factor)


def _check_times(reader: Reader, name: str, length: int) -> None:
    times = reader.take(name).flatten().float()
    if times.shape != (length,) or (times - filter_times(length, length)).abs().max() > _ROUNDING:
        raise ValueError(
            f"{reader.source.name}: {name} is no {length} steps from 0 to 1; it is no checkpoint of this kind"
        )


__all__ = ["layout_of", "read"]
