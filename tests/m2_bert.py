"""Tiny M2-BERT checkpoints in the published layout, and their outputs by `tests/oracles.py`.

Names and shapes are those of HazyResearch/m2 (`bert/src`); what is computed from them is written from the formulas.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests import oracles


LENGTH = 24
RAW = {  # a published config.json, made small
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.0,
    "bidirectional": True,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 16,
    "hyena_emb_dim": 5,
    "hyena_filter_order": 8,
    "hyena_training_additions": False,
    "hyena_w": 10,
    "hyena_w_mod": 1,
    "intermediate_size": 32,
    "layer_norm_eps": 1e-12,
    "long_conv_l_max": LENGTH,
    "max_position_embeddings": LENGTH,
    "model_type": "bert",
    "monarch_mlp_nblocks": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "pool_all": False,
    "residual_long_conv": True,
    "type_vocab_size": 2,
    "use_glu_mlp": True,
    "use_monarch_mlp": True,
    "use_positional_encodings": True,
    "vocab_size": 40,
}
VARIANTS = {
    "published": {},
    "with a norm before mixers": {"hyena_training_additions": True},
    "two blocks, mean pooling, scaled frequencies": {"monarch_mlp_nblocks": 2, "pool_all": True, "hyena_w_mod": 2},
    "gated dense MLP": {"use_monarch_mlp": False},
    "block-diagonal MLP without gates": {"use_glu_mlp": False},
    "plain MLP, no positions, no residual convolution": {
        "use_glu_mlp": False,
        "use_monarch_mlp": False,
        "use_positional_encodings": False,
        "residual_long_conv": False,
    },
}


class Writer:
    """Draws tensors of a checkpoint with a given config, by their published names."""

    def __init__(self, raw: dict, seed: int) -> None:
        self.raw, self.width = raw, raw["hidden_size"]
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int, std: float = 0.3, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, out: int, inputs: int, bias: bool = True) -> dict[str, torch.Tensor]:
        state = {f"{name}.weight": self.draw(out, inputs)}
        return state | {f"{name}.bias": self.draw(out, std=0.1)} if bias else state

    def norm(self, name: str) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": self.draw(self.width, std=0.1, mean=1.0),
            f"{name}.bias": self.draw(self.width, std=0.1),
        }

    def mlp_linear(self, name: str, out: int, inputs: int, bias: bool) -> dict[str, torch.Tensor]:
        state = self.linear(name, out, inputs, bias)
        if self.raw["use_monarch_mlp"]:
            blocks = self.raw["monarch_mlp_nblocks"]
            state[f"{name}.weight"] = self.draw(blocks, out // blocks, inputs // blocks)
        return state

    def long_filter(self, name: str) -> dict[str, torch.Tensor]:
        features, hidden = self.raw["hyena_emb_dim"], self.raw["hyena_filter_order"]
        table = torch.from_numpy(oracles.positional_features(LENGTH, (features - 1) // 2)).float()
        state = {
            f"{name}.bias": self.draw(self.width, std=1.0),
            f"{name}.pos_emb.z": table[None] + self.draw(1, LENGTH, features, std=0.05),
            f"{name}.pos_emb.t": torch.from_numpy(oracles.filter_times(LENGTH)).float()[None, :, None],
            f"{name}.modulation.deltas": torch.from_numpy(oracles.decay_rates(self.width)).float()[None, None],
        }
        frequency = self.draw(1, hidden, std=0.1, mean=1.0)
        for net in ("implicit_filter", "implicit_filter_rev"):
            for place in (0, 2, 4):
                state |= self.linear(f"{name}.{net}.{place}", hidden, features if place == 0 else hidden)
                state[f"{name}.{net}.{place + 1}.freq"] = frequency
            state |= self.linear(f"{name}.{net}.6", self.width, hidden, bias=False)
        return state

    def mixer(self, name: str) -> dict[str, torch.Tensor]:
        state = self.long_filter(f"{name}.filter_fn")
        if self.raw["residual_long_conv"]:
            state |= self.long_filter(f"{name}.filter_fn2")
        if self.raw["hyena_training_additions"]:
            state |= self.norm(f"{name}.layernorm")
        state |= self.linear(f"{name}.in_linear", 3 * self.width, self.width)
        state |= self.linear(f"{name}.out_linear", self.width, self.width)
        short = {"weight": self.draw(3 * self.width, 1, 3, std=0.5), "bias": self.draw(3 * self.width, std=0.1)}
        return state | {f"{name}.short_filter.{kind}": tensor for kind, tensor in short.items()}

    def embeddings(self, name: str) -> dict[str, torch.Tensor]:
        state = {f"{name}.position_ids": torch.arange(LENGTH)[None]}
        state[f"{name}.word_embeddings.weight"] = self.draw(self.raw["vocab_size"], self.width)
        if self.raw["use_positional_encodings"]:
            state[f"{name}.position_embeddings.weight"] = self.draw(LENGTH, self.width)
        state[f"{name}.token_type_embeddings.weight"] = self.draw(2, self.width)
        return state | self.norm(f"{name}.LayerNorm")

    def state(self) -> dict[str, torch.Tensor]:
        """A whole model with both heads; what is tied stands there under all of its names."""
        inner, outputs = self.raw["intermediate_size"], 2 if self.raw["use_glu_mlp"] else 1
        state = self.embeddings("bert.embeddings")
        for index in range(self.raw["num_hidden_layers"]):
            layer = f"bert.encoder.layer.{index}"
            state |= self.mixer(f"{layer}.attention")
            state |= self.mlp_linear(f"{layer}.mlp.gated_layers", outputs * inner, self.width, bias=False)
            state |= self.mlp_linear(f"{layer}.mlp.wo", self.width, inner, bias=True)
            state |= self.norm(f"{layer}.mlp.layernorm")
        head, embedding = "cls.predictions.", state["bert.embeddings.word_embeddings.weight"]
        state |= self.linear("bert.pooler.dense", self.width, self.width)
        state |= self.linear(f"{head}transform.dense", self.width, self.width)
        state |= self.norm(f"{head}transform.LayerNorm")
        return state | {f"{head}decoder.weight": embedding, f"{head}decoder.bias": self.draw(len(embedding))}


def write_state(changes: dict, seed: int = 0) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the tensors of a checkpoint."""
    raw = {**RAW, **changes}
    return raw, Writer(raw, seed).state()


def write_checkpoint(
    folder: Path,
    raw: dict,
    state: dict[str, torch.Tensor],
    head: str,
    change: Callable[[dict], dict] | None = None,
) -> Path:
    """Write a folder with one head, `"cls."` or `"bert.pooler."`, as its publishers did, or changed."""
    other = {"cls.": "bert.pooler.", "bert.pooler.": "cls."}[head]
    (folder / "config.json").write_text(json.dumps(raw))
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(other)}
    torch.save(kept if change is None else change(kept), folder / "pytorch_model.bin")
    return folder


def _linear(state: dict, name: str) -> dict:
    return {"weight": state[f"{name}.weight"].numpy(), "bias": _array(state.get(f"{name}.bias"))}


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def _taps(state: dict, name: str, raw: dict, length: int) -> dict:
    def net(part: str) -> np.ndarray:
        return oracles.implicit_filter(
            state[f"{name}.pos_emb.z"][0, :length].numpy(),
            [_linear(state, f"{name}.{part}.{place}") for place in (0, 2, 4, 6)],
            raw["hyena_w_mod"] * state[f"{name}.{part}.1.freq"].numpy().astype(np.float64),
            state[f"{name}.pos_emb.t"][0, :length].numpy(),
            state[f"{name}.modulation.deltas"].numpy(),
        )

    skip = state[f"{name}.bias"].numpy()
    return {"h": net("implicit_filter"), "h_reverse": net("implicit_filter_rev"), "skip": skip}


def _layer(state: dict, name: str, raw: dict, length: int) -> dict:
    width = raw["hidden_size"]
    # theirs: gate before, gate after, value; the oracle's: gate after, gate before, value
    order = np.r_[width : 2 * width, :width, 2 * width : 3 * width]
    taps = _taps(state, f"{name}.attention.filter_fn", raw, length)
    mixer = {
        **{key: array[None] for key, array in taps.items()},
        "in_proj": {k: a[order] for k, a in _linear(state, f"{name}.attention.in_linear").items()},
        "short_conv": {k: a[order] for k, a in _linear(state, f"{name}.attention.short_filter").items()},
        "out_proj": _linear(state, f"{name}.attention.out_linear"),
    }
    if raw["residual_long_conv"]:
        mixer["residual"] = _taps(state, f"{name}.attention.filter_fn2", raw, length)
    up = "gate_up" if raw["use_glu_mlp"] else "up"
    layer = {
        "mixer": mixer,
        "mlp": {up: _linear(state, f"{name}.mlp.gated_layers"), "down": _linear(state, f"{name}.mlp.wo")},
        "norm": _linear(state, f"{name}.mlp.layernorm"),
    }
    if raw["hyena_training_additions"]:
        layer["mixer_norm"] = _linear(state, f"{name}.attention.layernorm")
    return layer


def oracle(state: dict, raw: dict, ids: torch.Tensor, types: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """Hidden states (B, L, D), logits (B, L, V) and pooled vectors (B, D) in float64, of rows without padding."""
    params = {
        "embedding": state["bert.embeddings.word_embeddings.weight"].numpy(),
        "types": state["bert.embeddings.token_type_embeddings.weight"].numpy(),
        "embed_norm": _linear(state, "bert.embeddings.LayerNorm"),
        "layers": [
            _layer(state, f"bert.encoder.layer.{index}", raw, ids.shape[1])
            for index in range(raw["num_hidden_layers"])
        ],
        "dense": _linear(state, "cls.predictions.transform.dense"),
        "norm": _linear(state, "cls.predictions.transform.LayerNorm"),
        "bias": state["cls.predictions.decoder.bias"].numpy(),
    }
    if raw["use_positional_encodings"]:
        params["positions"] = state["bert.embeddings.position_embeddings.weight"].numpy()
    hidden = oracles.monarch_mixer_states(ids.numpy(), params, _array(types))
    pooled = oracles.bert_pooler(hidden, _linear(state, "bert.pooler.dense"), mean=raw["pool_all"])
    return {"hidden": hidden, "logits": oracles.bert_logits(hidden, params), "pooled": pooled}
