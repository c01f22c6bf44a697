# SPDX-License-Identifier: Apache-2.0
"""Converted attention models: stock ones with another attention, the same in every batch and cache."""

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from hyena_hf.feature_maps import FEATURE_MAPS
from hyena_hf.linear_attention import attention_mode, convert_attention
from tests import oracles
from tests.models import tokens


VOCABULARY = 97
GQA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CAUSAL = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GQA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GQA, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GQA, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=None
        )
    ),
}
WAYS = {
    "pure": {},
    "window": {"window": 6},
    "softmax maps, window": {"feature_map": "hedgehog_softmax", "window": 6},
    "some layers": {"layers": [0, -1], "window": 4},
}
every_family = pytest.mark.parametrize("family", CAUSAL)
every_way = pytest.mark.parametrize("way", WAYS)


def stock(family: str) -> torch.nn.Module:
    """A random model in float64 whose weights are large enough for a wrong token to show."""
    torch.manual_seed(0)
    model = CAUSAL[family]().double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "wpe" in name or "wte" in name or "embed" in name else 0.25)
    return model


def converted(family: str, way: str) -> torch.nn.Module:
    model = convert_attention(stock(family), **WAYS[way]).requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".linear_attention." in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def oracle_params(attention: torch.nn.Module, name: str) -> dict:
    maps = {
        key: {"name": name, **{part: x.numpy() for part, x in getattr(attention, key).state_dict().items()}}
        for key in ("q_map", "k_map")
    }
    factor = attention.window_factor
    return {
        **maps,
        "window": attention.window,
        "window_factor": None if factor is None else factor.numpy(),
        "joint": attention.q_map.is_log,
        "causal": attention.is_causal,
    }


def oracle_logits(model: torch.nn.Module, reference: torch.nn.Module, **inputs) -> Tensor:
    """Outputs of the stock model whose attention function is the oracle's, one sequence without padding."""
    modules = [module for module in model.modules() if hasattr(module, "linear_attention")]
    by_layer = {module.layer_idx: module.linear_attention for module in modules}

    def attention(module, q, k, v, mask, **_):  # noqa: ARG001 (transformers' interface)
        if module.layer_idx not in by_layer:
            y = torch.from_numpy(oracles.attention(q.numpy(), k.numpy(), v.numpy()))
        else:
            params = oracle_params(by_layer[module.layer_idx], model.config.feature_map)
            y = torch.from_numpy(oracles.linear_attention(q.numpy(), k.numpy(), v.numpy(), params))
        return y.transpose(1, 2).contiguous(), None

    AttentionInterface.register("hyena_hf_oracle", attention)
    reference.set_attn_implementation("hyena_hf_oracle")
    return reference(**inputs)


@every_family
@every_way
def test_logits_equal_the_stock_model_with_the_oracles_attention(family, way):
    model, ids = converted(family, way), tokens(2, 40)
    truth = oracle_logits(model, stock(family), input_ids=ids, use_cache=False).logits
    logits = model(ids).logits
    torch.testing.assert_close(logits, truth, rtol=0, atol=1e-9 * max(1, truth.abs().max().item()))


@every_family
@every_way
def test_padding_caches_and_pieces_change_nothing(family, way):
    model, ids = converted(family, way), tokens(3, 30)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :11] = 0
    mask[2, 20:] = 0
    alone = [model(ids[row : row + 1, mask[row].bool()], use_cache=False).logits[0] for row in range(3)]
    scale = max(1, alone[0].abs().max().item())
    for sizes, make in (
        ([30], None),
        ([30], lambda: DynamicCache(config=model.config)),
        ([1] * 30, lambda: DynamicCache(config=model.config)),
        ([7, 1, 12, 10], DynamicCache),
        ([20, 1, 9], lambda: StaticCache(config=model.config, max_cache_len=32)),
    ):
        past, start, outputs = make and make(), 0, []
        for size in sizes:
            part = ids[:, start : start + size]
            given = {} if past is None else {"past_key_values": past}
            outputs.append(model(part, attention_mask=mask[:, : start + size], **given).logits)
            start += size
        logits = torch.cat(outputs, dim=1)
        for row in range(3):
            torch.testing.assert_close(logits[row, mask[row].bool()], alone[row], rtol=0, atol=1e-9 * scale)


@every_family
@every_way
def test_packed_documents_do_not_see_each_other(family, way):
    model, ids = converted(family, way), tokens(1, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).unsqueeze(0)
    packed = model(ids, position_ids=positions).logits[0]
    alone = [model(part).logits[0] for part in (ids[:, :12], ids[:, 12:])]
    scale = max(1, packed.abs().max().item())
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-9 * scale)


@every_family
@every_way
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "chunks", "static"],
)
def test_generation_needs_no_cache_argument_and_changes_no_token(family, way, options):
    model, ids = converted(family, way), tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    known = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    truth = model.generate(ids, use_cache=False, **known, **beams)
    assert model.generate(ids, **known, **options).equal(truth)
    assert len(set(truth[:, 13:].flatten().tolist())) > 4


@every_family
def test_saving_and_loading_through_auto_classes_gives_the_same_model(family, tmp_path):
    model = converted(family, "some layers")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"hedgehog_{family}"
    ids = tokens(1, 20)
    assert loaded(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize("way", ["pure", "window", "softmax maps, window"])
def test_an_encoder_equals_the_stock_model_with_the_oracles_attention(way):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    reference = BertModel(config).double().eval().requires_grad_(False)
    model = convert_attention(reference, **WAYS[way]).requires_grad_(False)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    for row, length in ((0, 20), (1, 13)):
        alone = ids[row : row + 1, :length]
        truth = oracle_logits(model, reference, input_ids=alone).last_hidden_state[0]
        for hidden in (
            model(alone).last_hidden_state[0],
            model(ids, attention_mask=mask).last_hidden_state[row, :length],
        ):
            torch.testing.assert_close(hidden, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_encoder_heads_are_converted_saved_and_loaded(kind, tmp_path):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = convert_attention(kind(config).eval(), window=3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ids = tokens(2, 15)
    assert loaded(ids).logits.equal(model(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "HedgehogBertModel"


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_map_can_be_converted_to(feature_map):
    model, ids = stock("llama"), tokens(1, 20)
    linear = convert_attention(model, feature_map=feature_map, layers=[1], window=2)
    past = DynamicCache(config=linear.config)
    pieces = torch.cat([linear(part, past_key_values=past).logits for part in ids.split(7, dim=1)], dim=1)
    torch.testing.assert_close(pieces, linear(ids, use_cache=False).logits, rtol=0, atol=1e-9)


def test_the_cosformer_refuses_distances_that_it_would_weigh_negatively():
    linear = convert_attention(stock("llama"), feature_map="cosformer")
    past = linear(tokens(1, 256)).past_key_values
    for ids, given in ((tokens(1, 257), None), (tokens(1, 1), past)):
        with pytest.raises(ValueError, match="257 tokens exceeds"):
            linear(ids, past_key_values=given)


def test_the_model_that_is_converted_stays_as_it_is():
    model, ids = stock("llama"), tokens(1, 20)
    before = model(ids).logits
    linear = convert_attention(model)
    for parameter in linear.requires_grad_(False).parameters():
        parameter.zero_()
    assert model(ids).logits.equal(before)


def test_random_rotations_keep_the_kernel_of_the_scores():
    """Only a rotation shared by queries and keys leaves q . k as it was."""
    linear = convert_attention(stock("llama"), init="random")
    attention = linear.model.layers[0].self_attn.linear_attention
    q, k = torch.randn(1, 4, 9, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    turned = attention.q_map.project(q) @ attention.k_map.project(k).repeat_interleave(2, dim=1).mT
    torch.testing.assert_close(turned, q @ k.repeat_interleave(2, dim=1).mT, rtol=0, atol=1e-5)
    assert (attention.q_map.weight[0] - torch.eye(8)).abs().max() > 0.1


def test_what_cannot_be_converted_is_refused():
    model = stock("llama")
    linear = convert_attention(model)
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    )
    quantised = stock("llama")
    quantised.config.quantization_config = {"quant_method": "gguf"}
    cases = [
        (linear, {}, "converted already"),
        (opt, {}, "OPTAttention"),
        (quantised, {}, "GgufConfig"),
        (model, {"window": -1}, "window .-1"),
        (model, {"layers": [3]}, "indices of the 3 layers"),
        (model, {"layers": []}, "empty"),
        (model, {"layers": "first"}, "indices of the 3 layers"),
        (model, {"feature_map": "hedge"}, "'hedge'"),
        (model, {"feature_map": "elu", "feature_dim": 4}, "leave it out"),
        (model, {"init": "zero"}, "'zero'"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            convert_attention(given, **options)
    for options in ({"window": 2.5}, {"window": True}, {"feature_dim": 8.0}):
        with pytest.raises(TypeError, match="whole number"):
            convert_attention(model, **options)
    for layers in (1, None, [True]):
        with pytest.raises(ValueError, match="indices of the 3 layers"):
            convert_attention(model, layers=layers)
    with pytest.raises(TypeError, match="transformers model"):
        convert_attention(torch.nn.Linear(2, 2))  # pyright: ignore


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_that_keep_a_sliding_window_see_no_more_than_it_with_and_without_a_cache(family):
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config, kind = kinds[family]
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = kind(config(**GQA, **sliding)).double().eval().requires_grad_(False)
    linear, ids = convert_attention(model, layers=[0]), tokens(1, 20)
    with attention_mode(linear, "softmax"):
        torch.testing.assert_close(linear(ids, use_cache=False).logits, model(ids).logits, rtol=0, atol=1e-10)
    past = DynamicCache(config=linear.config)
    steps = torch.cat([linear(part, past_key_values=past).logits for part in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, linear(ids, use_cache=False).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="sliding window of 4"):
        convert_attention(model)


def test_settings_of_the_model_come_along_as_copies():
    model = LlamaForCausalLM._from_config(LlamaConfig(**GQA), attn_implementation="eager")
    linear = convert_attention(model, layers=[0])
    assert linear.config._attn_implementation == "eager"
    linear.generation_config.max_new_tokens = 77
    assert model.generation_config.max_new_tokens != 77


def test_a_checkpoint_without_its_maps_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    converted("llama", "window").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {key: x for key, x in load_file(path).items() if ".q_map." not in key}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 6 tensors of linear attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_head_counts_that_do_not_divide_are_refused():
    from hyena_hf.linear_attention import HedgehogLlamaConfig

    with pytest.raises(ValueError, match="multiple of num_key_value_heads"):
        HedgehogLlamaConfig(**{**GQA, "num_key_value_heads": 3})


def test_a_cache_of_another_model_is_refused():
    model = converted("llama", "pure")
    past = model(tokens(1, 5)).past_key_values
    with pytest.raises(ValueError, match="filled by another model"):
        converted("llama", "pure")(tokens(1, 1), past_key_values=past)
    with pytest.raises(ValueError, match="another model"):
        model(tokens(1, 5), past_key_values=DynamicCache(config=stock("llama").config))
