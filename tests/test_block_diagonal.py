"""Block-diagonal linear layers are dense ones with zeros outside their blocks.

Run: python -m pytest tests/test_block_diagonal.py -q
"""

import pytest
import torch

from hyena_hf import HyenaForMaskedLM
from hyena_hf.block_diagonal import BlockDiagonalLinear
from tests.models import config_of


def layer_of(inputs, outputs, blocks, bias=True):
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(inputs, outputs, blocks, bias).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize(("inputs", "outputs", "blocks"), [(12, 20, 4), (6, 3, 3), (5, 7, 1), (4, 4, 4)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 2)], ids=str)
def test_it_equals_the_dense_layer(inputs, outputs, blocks, shape):
    layer, x = layer_of(inputs, outputs, blocks), torch.randn(*shape, inputs, dtype=torch.float64)
    dense = torch.nn.functional.linear(x, torch.block_diag(*layer.weight), layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=0, atol=1e-13)


def test_its_gradients_are_right():
    layer, x = layer_of(6, 9, 3), torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_half_precision_and_autocast_keep_their_dtype():
    layer, x = layer_of(8, 8, 2).bfloat16(), torch.randn(3, 8).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_of(8, 8, 2).float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(("inputs", "outputs"), [(10, 8), (8, 10)])
def test_widths_that_blocks_do_not_divide_are_refused(inputs, outputs):
    with pytest.raises(ValueError, match=rf"inputs \({inputs}\) and outputs \({outputs}\).*blocks \(4\)"):
        BlockDiagonalLinear(inputs, outputs, 4)


@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_of_blocks_has_a_share_of_the_weights_and_starts_within_its_bound(gated):
    torch.manual_seed(0)
    changes = {"is_causal": False, "gated_mlp": gated, "block_type": "monarch_mixer"}
    dense, blocks = (HyenaForMaskedLM(config_of(mlp_blocks=n, **changes)).model.layers[0].mlp for n in (1, 4))

    def count(mlp):
        return sum(p.numel() for name, p in mlp.named_parameters() if name.endswith("weight"))

    assert 4 * count(blocks) == count(dense)
    for layer in (blocks.up_proj, blocks.down_proj):
        bound = layer.weight.shape[2] ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.eq(0).all()
