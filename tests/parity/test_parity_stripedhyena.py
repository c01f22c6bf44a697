# SPDX-License-Identifier: Apache-2.0
"""StripedHyena 7B, Evo 1 and Evo 1.5 against the packages stripedhyena and evo-model.

python -m pytest -m parity tests/parity/test_parity_stripedhyena.py
"""

from dataclasses import replace

import pytest
import torch

from hyena_hf.checkpoints import load_checkpoint
from tests.parity.comparison import assert_agrees, difference
from tests.parity.published import EVO_1, EVO_1_131K, PUBLISHED, SH_7B, Case


pytestmark = pytest.mark.parity

NAMES = [name for name, case in PUBLISHED.items() if case.family != "evo2"]


def case(config: dict, **changes) -> Case:
    """A case of the given config, in one file of weights."""
    return Case("stripedhyena" if config["vocab_size"] < 512 else "evo1", config, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_float32_are_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_float32_are_as_near_to_the_exact_ones_as_the_reference_s(name, publish):
    published = publish(PUBLISHED[name])
    reference = difference(torch.tensor(published.arrays["logits"]), published.arrays["logits_64"])
    assert_agrees(load_checkpoint(published.folder).float(), published, 2 * reference + 1e-6, suffix="_64")


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


def test_a_layout_given_by_name_is_the_one_found(publish):
    published = publish(PUBLISHED["evo_1_131k"])
    found, given = load_checkpoint(published.folder), load_checkpoint(published.folder, layout="evo1")
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), given.state_dict().values(), strict=True)
    )


def test_rows_as_long_as_the_reference_allows_agree(publish):
    published = publish(replace(PUBLISHED["sh_7b_shards"], length=700))
    assert_agrees(load_checkpoint(published.folder).float(), published, tolerance=1e-5)
