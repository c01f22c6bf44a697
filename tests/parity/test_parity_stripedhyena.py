# SPDX-License-Identifier: Apache-2.0
"""StripedHyena 7B, Evo 1 and Evo 1.5 against the packages stripedhyena and evo-model.

python -m pytest -m parity tests/parity/test_parity_stripedhyena.py
"""

from dataclasses import replace

import pytest
import torch

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.checkpoints import export_checkpoint, load_checkpoint
from tests.parity.comparison import assert_agrees, difference
from tests.parity.published import EVO_1, EVO_1_131K, PUBLISHED, SH_7B, Case


pytestmark = pytest.mark.parity

NAMES = [name for name, case in PUBLISHED.items() if case.family != "evo2"]


def case(config: dict, **changes) -> Case:
    """A case of the given config, in one file of weights."""
    return Case("stripedhyena" if config["vocab_size"] < 512 else "evo1", config, **changes)


def own_model() -> HyenaForCausalLM:
    """A model that was never published, with other numbers of poles in its layers, all weights drawn anew."""
    config = HyenaConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=3,
        layer_types=["hyena", "full_attention", "hyena"],
        filter_types=["modal", "implicit", "modal"],
        state_size=[4, 4, 6],
        num_poles=[3, 3, 4],
        num_attention_heads=4,
        num_key_value_heads=2,
        norm_type="rms_norm_outer_eps",
        hidden_act="silu",
        gated_mlp=True,
        mlp_bias=False,
        use_bias=["in_proj", "short_conv"],
        tie_word_embeddings=False,
    )
    model = HyenaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "filter" not in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_float32_are_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_float32_are_as_near_to_the_exact_ones_as_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])
    reference = difference(torch.tensor(published.arrays["logits"]), published.arrays["logits_64"])
    assert_agrees(load_checkpoint(published.folder).float(), published, 2 * reference + 1e-6, suffix="_64")


@pytest.mark.parametrize("name", ["sh_7b_shards", "evo_1_8k"])
def test_logits_in_bfloat16_are_as_near_to_the_exact_ones_as_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])  # stored in bfloat16: weights are not rounded again
    model, exact = load_checkpoint(published.folder), torch.tensor(published.arrays["logits_64"])
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        error = (model(published.ids).logits - exact).pow(2).mean().sqrt()
    reference = (torch.tensor(published.arrays["logits_16"]) - exact).pow(2).mean().sqrt()
    assert error <= 1.2 * reference


@pytest.mark.parametrize("config", [SH_7B, EVO_1, EVO_1_131K], ids=["sh_7b", "evo_1", "evo_1_131k"])
def test_logits_in_float64_are_the_reference_s_where_poles_have_no_weight(config, publish):
    # the references round poles to float32, we their logarithms
    published = publish(case(config, residues=0.0))
    assert_agrees(load_checkpoint(published.folder).double(), published, tolerance=1e-10, suffix="_64")


@pytest.mark.parametrize("fused", [False, True])
def test_epsilon_of_norms_stands_where_the_reference_puts_it(fused, publish):
    published = publish(case({**SH_7B, "eps": 0.1, "use_flash_rmsnorm": fused}, residues=0.0))
    assert_agrees(load_checkpoint(published.folder).double(), published, tolerance=1e-10, suffix="_64")


@pytest.mark.parametrize("config", [SH_7B, EVO_1], ids=["sh_7b", "evo_1"])
def test_gates_split_by_thirds_are_the_reference_s(config, publish):
    published = publish(case({**config, "column_split_hyena": False}))
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)


@pytest.mark.parametrize("name", ["sh_7b_shards", "evo_1_131k"])
def test_steps_with_a_cache_give_the_logits_of_the_reference_s_whole_row(name, publish):
    published = publish(PUBLISHED[name])
    model, ids = load_checkpoint(published.folder).float(), published.ids
    with torch.no_grad():
        output = model(ids[:, :30], use_cache=True)
        logits = [output.logits]
        for step in range(30, ids.shape[1]):
            output = model(ids[:, step : step + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    assert difference(torch.cat(logits, dim=1), published.arrays["logits"]) <= 1e-5


@pytest.mark.parametrize("name", ["sh_7b_shards", "evo_1_131k"])
def test_the_reference_computes_the_same_from_files_that_we_write_back(name, publish, run_exported, tmp_path):
    published = publish(PUBLISHED[name])
    export_checkpoint(load_checkpoint(published.folder).float(), tmp_path / "exported", "stripedhyena")
    found = run_exported(tmp_path / "exported").arrays["logits"]
    assert difference(torch.tensor(found), published.arrays["logits"]) <= 1e-5


def test_the_reference_computes_our_logits_from_a_model_of_ours(run_exported, tmp_path):
    model = own_model()
    export_checkpoint(model, tmp_path / "exported", "stripedhyena")
    reference = run_exported(tmp_path / "exported")
    with torch.no_grad():
        assert difference(model(reference.ids).logits, reference.arrays["logits"]) <= 1e-5


def test_a_layout_given_by_name_is_the_one_found(publish):
    published = publish(PUBLISHED["evo_1_131k"])
    found, given = load_checkpoint(published.folder), load_checkpoint(published.folder, layout="evo1")
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), given.state_dict().values(), strict=True)
    )


def test_rows_as_long_as_the_reference_allows_agree(publish):
    published = publish(replace(PUBLISHED["sh_7b_shards"], length=700))
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)
