"""The memory plan counts what the real model holds, without its weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hyena_hf.linear_attention import convert_attention
from hyena_hf.linear_attention.modes import linear_attentions
from training.adapters import add_lora
from training.memory_plan import TRAINED, describe, main, make_plan, parse_arguments


CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=3, intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip
OPTIONS = parse_arguments(["model", "--length", "96", "--batch-size", "2", "--window", "8", "--lora", "4"])


def real(rows, length):
    """Bytes that backward keeps of a real step, weights left out, and the model."""
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    converted = convert_attention(model, window=8, feature_map="hedgehog_softmax")
    for layer in linear_attentions(converted).values():
        layer.float()
    adapted = add_lora(converted, "lm", 4).train()
    weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in weights), adapted


def test_the_plan_counts_what_the_real_model_holds():
    plan = make_plan(CONFIG, OPTIONS)
    kept, adapted = real(2, 96)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert plan.maps == sum(count for name, count in trained.items() if "linear_attention" in name)
    assert plan.adapters == sum(count for name, count in trained.items() if "lora" in name)
    assert plan.weights == 2 * AutoModelForCausalLM.from_config(CONFIG).num_parameters()
    assert plan.kept == pytest.approx(kept, rel=0.05)  # constants of the real run are shared between layers
    assert plan.transfer == plan.weights + TRAINED * plan.maps + plan.kept_of_a_layer


def test_more_devices_take_less_each_and_more_rows_take_more():
    one, four, longer = (
        make_plan(CONFIG, parse_arguments(["model", "--window", "8", "--length", length, "--devices", devices]))
        for length, devices in (("64", "1"), ("64", "4"), ("128", "1"))
    )
    assert four.sharded < one.sharded
    assert four.replicated == one.replicated
    assert longer.kept > 1.5 * one.kept


def test_the_command_says_what_fits(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    main([str(tmp_path), "--window", "8", "--length", "64", "--device-memory", "80"])
    assert capsys.readouterr().out.count(", fits in 80 GiB") == 3
    options = parse_arguments(["model", "--length", "64", "--window", "8", "--device-memory", "0.000001"])
    assert "does not fit" in describe(make_plan(CONFIG, options), options, "model")
    with pytest.raises(SystemExit):
        parse_arguments(["model", "--devices", "0"])
