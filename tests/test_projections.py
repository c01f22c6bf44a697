"""Projections into the layout of convolutions are linear layers, whose gradients come in the layout of their input.

Run: python -m pytest tests/test_projections.py -q
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyena_hf.mixers.projections import project_down, project_up


BOTH_WAYS = pytest.mark.parametrize(("project", "shape"), [(project_down, (2, 5, 6)), (project_up, (2, 6, 5))])
BIAS = pytest.mark.parametrize("bias", [True, False])


def make(shape, bias, dtype=torch.float64):
    """A layer of 6 -> 9 features, its parameters, and an input."""
    linear = nn.Linear(6, 9, bias=bias, dtype=dtype)
    return linear, list(linear.parameters()), torch.randn(shape, dtype=dtype, requires_grad=True)


@BIAS
@BOTH_WAYS
def test_first_and_second_derivatives_of_projections_are_right(project, shape, bias):
    linear, parameters, x = make(shape, bias)

    def function(x, *_):
        return project(linear, x)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@BIAS
@BOTH_WAYS
def test_gradients_of_projections_equal_those_of_the_layer_and_are_contiguous(project, shape, bias):
    linear, parameters, x = make(shape, bias, torch.float32)
    y = project(linear, x)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, *parameters), grad)
    plain = linear(x).mT if project is project_down else linear(x.mT)
    assert found[0].is_contiguous()
    for a, b in zip(found, torch.autograd.grad(plain, (x, *parameters), grad), strict=True):
        torch.testing.assert_close(a, b)


@BOTH_WAYS
def test_projections_compile_to_one_graph_and_run_under_checkpointing(project, shape):
    linear, parameters, x = make(shape, bias=True)
    compiled = torch.compile(lambda x: project(linear, x), backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(project(linear, x).square().sum(), (x, *parameters))
    for y in (compiled(x), checkpoint(project, linear, x, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(y.square().sum(), (x, *parameters)), expected, strict=True):
            torch.testing.assert_close(a, b)


@BOTH_WAYS
def test_projections_give_no_gradient_to_what_is_frozen(project, shape):
    linear, _, x = make(shape, bias=True)
    linear.weight.requires_grad_(False)
    project(linear, x).sum().backward()
    assert linear.weight.grad is None
    assert torch.equal(linear.bias.grad, torch.full((9,), 10.0, dtype=torch.float64))
