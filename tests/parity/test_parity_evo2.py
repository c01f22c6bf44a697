# SPDX-License-Identifier: Apache-2.0
"""Evo 2 against the package vtx (vortex), as it runs without Transformer Engine.

python -m pytest -m parity tests/parity/test_parity_evo2.py
"""

import pytest
import torch

from hyena_hf.checkpoints import load_checkpoint
from tests.parity.comparison import assert_agrees, difference
from tests.parity.published import EVO_2, EVO_2_1M, PUBLISHED, Case


pytestmark = pytest.mark.parity

NAMES = [name for name, case in PUBLISHED.items() if case.family == "evo2"]


def evo_2(config: dict, **changes) -> Case:
    """A case of the given config, as the 7B models are published."""
    return Case("evo2", config, "evo2-7b-1m.yml", "pt", "evo2_7b.pt", prefix=False, **changes)


def mostly_attention(config: dict) -> dict:
    """The config with attention behind a first layer that shows the layout."""
    return {
        **config,
        "attn_layer_idxs": [1, 2],
        "hcs_layer_idxs": [0],
        "hcm_layer_idxs": [],
        "hcl_layer_idxs": [],
        "num_layers": 3,
    }


def without_long_filters(config: dict) -> dict:
    """The config with only those filters whose numbers both sides store alike: explicit ones of 7 and 128 taps."""
    return {**config, "hcs_layer_idxs": [0, 2, 4], "hcm_layer_idxs": [1, 5], "hcl_layer_idxs": []}


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_float32_are_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_float32_are_as_near_to_the_exact_ones_as_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])
    reference = difference(torch.tensor(published.arrays["logits"]), published.arrays["logits_64"])
    assert_agrees(load_checkpoint(published.folder).float(), published, 2 * reference + 1e-6, suffix="_64")


@pytest.mark.parametrize("name", ["evo_2_40b"])
def test_logits_in_bfloat16_are_as_near_to_the_exact_ones_as_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])  # stored in bfloat16: weights are not rounded again
    model, exact = load_checkpoint(published.folder), torch.tensor(published.arrays["logits_64"])
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        error = (model(published.ids).logits - exact).pow(2).mean().sqrt()
    reference = (torch.tensor(published.arrays["logits_16"]) - exact).pow(2).mean().sqrt()
    assert error <= 1.2 * reference


@pytest.mark.parametrize("rounded", [False, True])
def test_logits_of_attention_layers_in_float64_are_the_reference_s(rounded, publish):
    published = publish(evo_2(mostly_attention(EVO_2_1M), rounded_frequencies=rounded))
    assert_agrees(load_checkpoint(published.folder).double(), published, tolerance=1e-10, suffix="_64")


@pytest.mark.parametrize("length", [45, 300])
def test_logits_with_explicit_filters_in_float64_are_the_reference_s_without_its_casts(length, publish):
    published = publish(evo_2(without_long_filters(EVO_2), length=length))
    assert_agrees(load_checkpoint(published.folder).double(), published, tolerance=1e-10, suffix="_64")


@pytest.mark.parametrize(
    "change",
    [{"interleave": False}, {"interleave": False, "column_split_hyena": True}, {"column_split": False},
     {"hyena_flip_x1x2": True}, {"evo2_style_activations": False}, {"qkv_proj_bias": True}],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_switches_of_the_config_mean_what_they_mean_in_the_reference(change, publish):
    published = publish(evo_2({**EVO_2, **change}))
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)


def test_steps_with_a_cache_give_the_logits_of_the_reference_s_whole_row(publish):
    published = publish(PUBLISHED["evo_2_7b_1m"])
    model, ids = load_checkpoint(published.folder).float(), published.ids
    with torch.no_grad():
        output = model(ids[:, :100], use_cache=True)
        logits = [output.logits]
        for step in range(100, ids.shape[1]):
            output = model(ids[:, step : step + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    assert difference(torch.cat(logits, dim=1), published.arrays["logits"]) <= 1e-5
