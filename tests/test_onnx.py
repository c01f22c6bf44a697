"""Whole models run in onnxruntime: exported graphs hold standard operators on real numbers only.

Run: python -m pytest tests/test_onnx.py -q
"""

import numpy as np
import pytest
import torch

from hyena_hf import HyenaForCausalLM, HyenaForMaskedLM
from tests.models import FULL, HYENA, new_model, tokens


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# torch's exporter copies tree specifications by an interface of torch that is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

MODELS = {
    "order 2": {"num_hidden_layers": 1},
    "order 3": {"num_hidden_layers": 1},
    "heads": {"num_hidden_layers": 1, "num_heads": 16},
    "hybrid": {"num_hidden_layers": 2, "layer_types": [HYENA, FULL]},
    "masked": {"num_hidden_layers": 1, "is_causal": False},
    "low frequencies": {"num_hidden_layers": 1, "filter_length": 40, "frequency_sparsity": 0.5},
}
# beyond the lengths at which heads are products of queries and keys
LENGTH = 70


def build_model(name):
    kind = HyenaForMaskedLM if name == "masked" else HyenaForCausalLM
    model = new_model(
        "order 2" if name in ("masked", "low frequencies") else name, kind=kind, use_cache=False, **MODELS[name]
    )
    return model.requires_grad_(False)


def export(model, sizes):
    """An ONNX model; `sizes` names the axes of `input_ids` that may change."""
    inputs = {"input_ids": tokens(2, LENGTH)}
    shapes = {"input_ids": sizes}
    return torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)


def check_in_onnxruntime(program, model, shapes):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    for shape in shapes:
        ids = tokens(*shape, seed=3)
        logits, expected = session.run(None, {"input_ids": ids.numpy()})[0], model(ids).logits.numpy()
        assert logits.shape == expected.shape
        assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected), shape


@pytest.mark.parametrize("name", ["order 3", "heads", "hybrid", "masked", "low frequencies"])
def test_onnxruntime_computes_the_logits_of_a_model_for_any_batch(name):
    model = build_model(name)
    program = export(model, {0: torch.export.Dim("batch", min=1, max=64)})
    assert {node.domain for node in program.model.graph.all_nodes()} == {""}
    check_in_onnxruntime(program, model, [(1, LENGTH), (3, LENGTH)])


@pytest.mark.parametrize(
    "name", ["order 2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
def test_onnxruntime_computes_the_logits_of_a_model_at_any_length(name):
    model = build_model(name)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=1000)}
    check_in_onnxruntime(export(model, sizes), model, [(3, 2), (1, LENGTH), (2, 64), (1, 700)])
