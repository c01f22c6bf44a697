"""Other libraries work on Hyena models as they are: PEFT, quantisers, accelerate's offload, pipelines, the server.

Run: python -m pytest tests/test_ecosystem.py -q
"""

import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

from tests.models import new_model, tokens


# the names that transformers 5.17 knows, which peft reads
DEPRECATED = ("-W", "ignore:`is_gradient_checkpointing`:FutureWarning")
PROJECTIONS = {"in_proj", "q_proj", "k_proj", "v_proj", "out_proj"}


def run_python(code, *args):
    """What a fresh process prints."""
    command = [sys.executable, "-W", "error", *DEPRECATED, "-c", code, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


# filters are not found by whatever replaces or wraps linear layers


def test_no_part_of_a_filter_is_a_linear_layer_to_others():
    model = new_model("sliding")
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))}
    assert linear
    assert not [name for name in linear if ".filter" in name or "short_conv" in name]


# PEFT


def adapted(name, config, dtype=torch.float64):
    return peft.get_peft_model(new_model(name, dtype), config)


def train_a_step(model, ids):
    """One large step, so that an adapter that does nothing shows."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.SGD(trained, lr=1.0).step()


@pytest.mark.parametrize(("name", "found"), [("order 3", 2), ("heads", 2), ("hybrid", 5), ("attention only", 4)])
def test_lora_without_targets_adapts_the_projections_of_all_mixers(name, found):
    model = adapted(name, peft.LoraConfig())
    adapters = {key.split(".lora_A")[0] for key, _ in model.named_parameters() if ".lora_A" in key}
    assert {key.rsplit(".", 1)[1] for key in adapters} <= PROJECTIONS
    assert len({key.rsplit(".", 1)[1] for key in adapters}) == found
    assert all(".mixer." in key for key in adapters)


def test_lora_on_all_linear_layers_leaves_filters_and_head_alone():
    model = adapted("hybrid", peft.LoraConfig(target_modules="all-linear"))
    adapters = [key for key, _ in model.named_parameters() if "lora_A" in key]
    assert len(adapters) == 2 * 2 + 4 + 3 * 2
    assert not [key for key in adapters if ".filter." in key or "lm_head" in key]


@pytest.mark.parametrize("name", ["order 2", "hybrid"])
def test_a_trained_lora_adapter_merges_and_comes_back_from_its_file(name, tmp_path):
    ids = tokens(2, 20)
    model = adapted(name, peft.LoraConfig(task_type="CAUSAL_LM"))
    before = model(input_ids=ids).logits
    train_a_step(model, ids)
    expected = model.eval()(input_ids=ids).logits.detach()
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(new_model(name, torch.float64), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-12)


def test_lora_on_a_bfloat16_model_trains_and_keeps_filters_in_float32():
    model = adapted("hybrid", peft.LoraConfig(), torch.bfloat16)
    train_a_step(model, tokens(2, 20))
    dtypes = {parameter.dtype for key, parameter in model.named_parameters() if ".filter." in key}
    assert dtypes == {torch.float32}
    merged = model.merge_and_unload()
    assert merged.model.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert merged(tokens(1, 9)).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # what PEFT says of any norm that it tunes
@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(),
        peft.VeraConfig(r=4),
        peft.LNTuningConfig(),
        peft.LoHaConfig(r=2),
        peft.OFTConfig(oft_block_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_find_their_targets_too(config):
    model = adapted("hybrid", config, torch.float32)
    train_a_step(model, tokens(2, 20))
    assert model(input_ids=tokens(1, 9)).logits.isfinite().all()


def test_peft_finds_our_defaults_when_it_is_imported_after_the_model_was_made():
    code = """
import hyena_hf
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
model = hyena_hf.HyenaForCausalLM(hyena_hf.HyenaConfig(**sizes))
import peft
print(*sorted(peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"].target_modules))
"""
    assert run_python(code).split() == sorted(PROJECTIONS)
