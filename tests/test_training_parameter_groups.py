"""Optimizer groups: every trainable parameter once, decay and learning rate as the model's table says."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hyena_hf import HyenaConfig, HyenaForCausalLM
from training.parameter_groups import get_parameter_groups


class Table(nn.Module):
    """A model with a policy table."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(3, 3)
        self.taps = nn.Parameter(torch.zeros(2, 4))

    def parameter_policy(self):
        return {"matrix.weight": (True, "base"), "matrix.bias": (False, "base"), "taps": (False, "filter")}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    )


def hyena(**fields):
    config = dict(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=8)
    return HyenaForCausalLM(HyenaConfig(**config, **fields))


def explicit_hybrid():
    return hyena(layer_types=["hyena", "full_attention"], filter_types=["explicit", "implicit"], num_attention_heads=2)


@pytest.mark.parametrize("make_model", [gpt2, Table, hyena, explicit_hybrid])
def test_every_trainable_parameter_is_in_exactly_one_group(make_model):
    model = make_model()
    next(model.parameters()).requires_grad_(False)
    groups = get_parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_the_table_of_a_model_decides_decay_and_learning_rate():
    groups = get_parameter_groups(Table(), learning_rate=1e-3, weight_decay=0.1, filter_learning_rate=1e-4)
    settings = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert settings == {
        "base/decay": (1e-3, 0.1, 1),
        "base/no_decay": (1e-3, 0.0, 1),
        "filter/no_decay": (1e-4, 0.0, 1),
    }


def test_the_filters_of_a_hyena_model_do_not_decay_and_have_their_own_rate():
    model = hyena(trainable_positional_features=True)
    groups = get_parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, filter_learning_rate=1e-4)
    filters = {id(parameter) for name, parameter in model.named_parameters() if ".filter." in name}
    assert filters
    for group in groups:
        if filters & {id(parameter) for parameter in group["params"]}:
            assert (group["lr"], group["weight_decay"]) == (1e-4, 0.0)


def test_without_a_table_matrices_decay_and_vectors_do_not():
    groups = get_parameter_groups(gpt2(), learning_rate=1e-3, weight_decay=0.1)
    assert {group["name"]: {parameter.ndim for parameter in group["params"]} for group in groups} == {
        "base/decay": {2},
        "base/no_decay": {1},
    }


def test_tied_weights_are_counted_once():
    model = gpt2()
    groups = get_parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    sizes = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert sizes == sum(parameter.numel() for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_wrappers_do_not_change_the_groups():
    groups = get_parameter_groups(nn.DataParallel(Table()), learning_rate=1e-3, weight_decay=0.1)
    assert {group["name"] for group in groups} == {"base/decay", "base/no_decay", "filter/no_decay"}


def test_adapters_train_with_the_base_rate_and_modules_to_save_keep_their_policy():
    model = get_peft_model(Table(), LoraConfig(target_modules=["matrix"], r=2, bias="all"))
    groups = get_parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {group["name"]: sorted(names[id(p)].split("matrix.")[-1] for p in group["params"]) for group in groups} == {
        "base/decay": ["lora_A.default.weight", "lora_B.default.weight"],
        "base/no_decay": ["base_layer.bias"],
    }


def test_a_parameter_missing_from_the_table_is_named():
    model = Table()
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"'extra' is missing from Table\.parameter_policy\(\)"):
        get_parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)


def test_rates_out_of_range_and_models_with_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match="learning_rate must be positive and finite, got 0"):
        get_parameter_groups(Table(), learning_rate=0, weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay must be at least 0 and finite, got -1"):
        get_parameter_groups(Table(), learning_rate=1e-3, weight_decay=-1)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no trainable filter parameters"):
        get_parameter_groups(gpt2(), learning_rate=1e-3, weight_decay=0.1, filter_learning_rate=1e-4)
    with pytest.raises(ValueError, match="no trainable parameter"):
        get_parameter_groups(Table().requires_grad_(False), learning_rate=1e-3, weight_decay=0.1)
