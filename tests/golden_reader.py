"""Read a golden file of `tests/golden`: what a published reference computed, and its parameters as oracle arguments.

`load_golden("safari_op_order3_L64_D16")` sorts the arrays of one file by role. `operator_params`, `mixer_m2_params`
and `language_model_params` translate published parameter names into the plain dicts that `tests/oracles.py` takes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests import oracles


GOLDEN = Path(__file__).parent / "golden"
INPUTS = ("x", "x_short", "x_long", "input_ids")
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Golden:
    """One golden file: `state` and `grads` have the published names; the input's gradient is "x"."""

    meta: dict
    state: State
    inputs: State
    outputs: State
    grads: State
    init_std: State

    @property
    def order(self) -> int:
        """Order of the operator; files that do not say are of order 2."""
        return self.meta.get("order", self.meta.get("layer", {}).get("order", 2))

    @property
    def channel_major(self) -> bool:
        """Whether filter channels are packed (channel, order), as safari's package does, not its standalone file."""
        return self.meta["module"].startswith("safari") and "standalone" not in self.meta["module"]

    @property
    def shift(self) -> float:
        """Modulation shift; files that do not say have none."""
        return self.meta.get("shift", 0.0)

    @property
    def modulate(self) -> bool:
        """Whether the filter is modulated by the exponential window."""
        return self.meta.get("modulate", self.meta.get("layer", {}).get("modulate", True))


def load_golden(name: str) -> Golden:
    """The arrays of golden/<name>.npz by role; `task_*` files have only outputs."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta_json")))
    groups: dict[str, State] = {"sd": {}, "grad": {}, "init_std": {}, "inputs": {}, "outputs": {}}
    for key, array in arrays.items():
        head, _, tail = key.partition("/")
        if tail:
            groups[head][tail] = array
        elif key == "grad_x":
            groups["grad"]["x"] = array
        else:
            groups["inputs" if key in INPUTS else "outputs"][key] = array
    return Golden(meta, groups["sd"], groups["inputs"], groups["outputs"], groups["grad"], groups["init_std"])


def linear_params(state: State, name: str) -> dict[str, np.ndarray | None]:
    """{"weight", "bias"} of the linear, convolution or norm called `name`; a missing bias is None."""
    return {"weight": state[f"{name}.weight"], "bias": state.get(f"{name}.bias")}


def filter_taps(state: State, prefix: str, shift: float, modulate: bool, net: str = "implicit_filter") -> np.ndarray:
    """Taps (C, trained length) of the filter under `prefix`, in the packing of the file, from its stored tables.

    The MLP's layers are Sequential indices 0, 2, 4, ...; the indices between are one shared sine (`1.freq`).
    """
    indices = sorted(int(key.split(".")[-2]) for key in state if key.startswith(f"{prefix}{net}.") and "weight" in key)
    return oracles.implicit_filter(
        state[f"{prefix}pos_emb.z"][0],
        [linear_params(state, f"{prefix}{net}.{index}") for index in indices],
        state[f"{prefix}{net}.1.freq"],
        state[f"{prefix}pos_emb.t"],
        state[f"{prefix}modulation.deltas"] if modulate else None,
        shift,
    )


def operator_params(golden: Golden, state: State | None = None, prefix: str = "") -> dict:
    """Arguments of `oracles.hyena_operator` for the published operator under `prefix` (of `state` if given)."""
    state = golden.state if state is None else state
    packed = filter_taps(state, f"{prefix}filter_fn.", golden.shift, golden.modulate)
    return {
        "in_proj": linear_params(state, f"{prefix}in_proj"),
        "short_conv": linear_params(state, f"{prefix}short_filter"),
        "h": oracles.unpack_channels(packed, golden.order, golden.channel_major),
        "skip": oracles.unpack_channels(state[f"{prefix}filter_fn.bias"], golden.order, golden.channel_major),
        "out_proj": linear_params(state, f"{prefix}out_proj"),
    }


def mixer_m2_params(golden: Golden) -> dict:
    """Arguments of `oracles.hyena_operator` for Monarch Mixer: its first projected block gates before the convolution.

    Our order is x_0 (after), x_1 (before), v; theirs is before, after, v: the first two blocks change places.
    """
    state = golden.state
    width = golden.meta["d_model"]
    swap = np.r_[width : 2 * width, :width, 2 * width : 3 * width]

    def swapped(name: str) -> dict[str, np.ndarray | None]:
        return {key: array[swap] for key, array in linear_params(state, name).items()}

    taps = {
        net: filter_taps(state, "filter_fn.", golden.shift, True, net)
        for net in ("implicit_filter", "implicit_filter_rev")
    }
    return {
        "in_proj": swapped("in_linear"),
        "short_conv": swapped("short_filter"),
        "h": taps["implicit_filter"][None],
        "h_reverse": taps["implicit_filter_rev"][None],
        "skip": state["filter_fn.bias"][None],
        "out_proj": linear_params(state, "out_linear"),
    }


def language_model_params(golden: Golden, state: State | None = None, prefix: str = "backbone.") -> dict:
    """Arguments of `oracles.hidden_states` and `oracles.logits` (tied embedding) for a published language model."""
    state = golden.state if state is None else state
    depth = golden.meta["n_layer"]
    layers = [f"{prefix}layers.{index}." for index in range(depth)]
    return {
        "embedding": state[f"{prefix}embeddings.word_embeddings.weight"],
        "layers": [
            {
                "norm1": linear_params(state, f"{layer}norm1"),
                "mixer": operator_params(golden, state, f"{layer}mixer."),
                "norm2": linear_params(state, f"{layer}norm2"),
                "mlp": {
                    "up": linear_params(state, f"{layer}mlp.fc1"),
                    "down": linear_params(state, f"{layer}mlp.fc2"),
                },
            }
            for layer in layers
        ],
        "final_norm": linear_params(state, f"{prefix}ln_f"),
    }
