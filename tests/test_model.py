"""The model: equal to its formulas, trainable, savable and compilable in every combination that a config can name."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from hyena_hf import HyenaForCausalLM, HyenaModel
from hyena_hf.filters import ExplicitFilter, ModalFilter, positional_features
from hyena_hf.mixers import HyenaMixer
from hyena_hf.modeling_hyena import HyenaMLP, make_norm
from hyena_hf.ops.modal import NO_POLE
from tests import oracles
from tests.models import COMBINATIONS, HEDGEHOG, HYENA, SHAPE, config_of, linear_attention, model_of, new_model, tokens


every_combination = pytest.mark.parametrize("name", COMBINATIONS)


# the formulas


def linear(module):
    return {"weight": module.weight.numpy(), "bias": None if module.bias is None else module.bias.numpy()}


def norm(module):
    return {"weight": module.weight.numpy(), "bias": module.bias.numpy() if isinstance(module, nn.LayerNorm) else None}


def filter_taps(config, long_filter, length):
    """Taps (N - 1, H, length) from the parameters of a filter, by the oracle."""
    if isinstance(long_filter, ExplicitFilter):
        taps = long_filter.weight.numpy()
        return np.repeat(taps, config.num_filters // taps.shape[1], axis=1)
    if isinstance(long_filter, ModalFilter):
        return modal_taps(long_filter, length)
    trained = config.max_position_embeddings
    # our own table, one float32 rounding away from the oracle's: a test below compares the two
    features = positional_features(length, trained, config.filter_num_bands).numpy()
    if config.trainable_positional_features:
        features = long_filter.features.numpy()[:length]
    layers = [linear(layer) for layer in (*long_filter.layers, long_filter.output)]
    filters = (config.order - 1) * config.num_filters
    decays, times = None, None
    if config.modulation:
        times = oracles.filter_times(trained, length)
        decays = oracles.decay_rates(filters, config.fast_decay, config.slow_decay, config.modulation_target)
    shift = config.modulation_shift
    h = oracles.implicit_filter(features, layers, long_filter.frequency.numpy(), times, decays, shift)
    if config.filter_length is not None:
        h = h[:, : config.filter_length]
    return oracles.unpack_channels(h, config.order)


def modal_taps(modal, length):
    """Of the canonical poles: parts rounded to float32, an angle of 0 or pi real, slots without a pole left out."""
    log_radius, angle, re, im, direct = (
        x.numpy().astype(np.float64)
        for x in (modal.log_radius, modal.angle, modal.residue_re, modal.residue_im, modal.direct)
    )
    radius, real = np.exp(log_radius), np.abs(angle) >= np.pi
    poles = radius * np.where(real, -1, np.cos(angle)) + 1j * radius * np.where(real, 0, np.sin(angle))
    poles = poles.real.astype(np.float32) + 1j * poles.imag.astype(np.float32).astype(np.float64)
    residues = np.where(log_radius > NO_POLE, re + 1j * im, 0)
    return oracles.modal_filter(poles, residues, direct, length)


def rotary(model, length):
    """Cosines and sines (L, P) of the model's float32 frequencies."""
    angles = np.tile(np.outer(np.arange(length), model.rotary_emb.inv_freq.numpy()), 2)
    return np.cos(angles), np.sin(angles)


def mixer(model, layer, length):
    """Parameters of a mixer as the oracle takes them."""
    config, module = model.config, model.layers[layer].mixer
    if config.layer_types[layer] == HYENA:
        return {
            "in_proj": linear(module.in_proj),
            "short_conv": linear(module.short_conv),
            "h": filter_taps(config, module.filter, length),
            "skip": module.skip.numpy(),
            "out_proj": linear(module.out_proj),
        }
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
    if config.layer_types[layer] == HEDGEHOG:
        kind = {"linear": linear_attention(config, module.attention)}
    else:
        kind = {"window": module.sliding_window}
    return {
        **kind,
        **{name: linear(getattr(module, ours)) for name, ours in names.items()},
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rotary": rotary(model, length),
    }


def oracle(model, ids):
    """Logits of a whole model from its formulas."""
    config, length = model.config, ids.shape[1]
    layers = []
    for index, layer in enumerate(model.model.layers):
        inner = {"up": linear(layer.mlp.up_proj), "down": linear(layer.mlp.down_proj)}
        if config.gated_mlp:
            inner["gate"] = linear(layer.mlp.gate_proj)
        mixed = mixer(model.model, index, length)
        layers.append({"norm1": norm(layer.mixer_norm), "mixer": mixed, "norm2": norm(layer.mlp_norm), "mlp": inner})
    params = {
        "embedding": model.model.embed_tokens.weight.numpy(),
        "layers": layers,
        "final_norm": norm(model.model.norm),
        "lm_head": model.lm_head.weight.numpy(),
    }
    kind = {"layer_norm": "layer", "rms_norm": "rms", "rms_norm_outer_eps": "rms_outer"}[config.norm_type]
    return oracles.logits(oracles.hidden_states(ids.numpy(), params, kind, config.norm_eps, config.hidden_act), params)


@every_combination
def test_logits_and_loss_equal_the_oracle_in_float64(name):
    model, ids = model_of(name), tokens(2, 61)
    labels = ids.clone()
    labels[0, :7] = labels[1, 40:] = -100
    out = model(ids, labels=labels)
    truth = oracle(model, ids)
    scale = max(1.0, abs(truth).max())
    assert abs(out.logits.numpy() - truth).max() <= 1e-10 * scale
    # transformers takes the loss of float32 logits
    assert out.loss.item() == pytest.approx(oracles.next_token_loss(truth, labels.numpy()), rel=1e-6)


@pytest.mark.parametrize("num_bands", [4, 16])
def test_computed_tables_are_one_float32_rounding_from_the_oracle(num_bands):
    table = positional_features(300, 256, num_bands)
    assert abs(table.numpy() - oracles.positional_features(256, num_bands, 300)).max() <= 1.2e-7
    frequencies = HyenaForCausalLM(config_of("hybrid", head_dim=8)).model.rotary_emb.inv_freq
    exact = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    assert abs(frequencies.numpy() / exact - 1).max() <= 1.2e-7


@every_combination
def test_float32_logits_are_close_to_float64_and_bfloat16_ones_to_float32(name):
    ids = tokens(2, 61)
    exact, single = (model_of(name, dtype)(ids).logits for dtype in (torch.float64, torch.float32))
    half = new_model(name).to(torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16
    assert (single - exact).abs().max().item() <= 1e-4 * exact.abs().max().item()
    assert (half - exact).norm().item() <= 0.05 * exact.norm().item()


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm", "rms_norm_outer_eps"])
def test_gradients_of_bfloat16_norms_are_summed_in_float32(norm_type):
    norm = make_norm(config_of(norm_type=norm_type)).bfloat16()
    x, cotangent = torch.randn(500, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    exact = make_norm(config_of(norm_type=norm_type)).double()
    for module, one, other in ((norm, x, cotangent), (exact, x.double(), cotangent.double())):
        module(one).backward(other)
    for got, truth in zip(norm.parameters(), exact.parameters(), strict=True):
        # every summand and the sum are rounded once; torch's own kernel on a CPU is off by 2e-2
        assert (got.grad - truth.grad).abs().max() <= 5e-3 * truth.grad.abs().max()


def test_the_filter_ends_where_its_support_ends():
    long_filter = model_of("partial").model.layers[0].mixer.filter
    assert long_filter(40).shape == (1, 32, 40)
    assert long_filter(40)[..., 11:].eq(0).all()
    assert long_filter(40)[..., 10].ne(0).all()


@every_combination
def test_a_shorter_filter_is_a_prefix_of_a_longer_one(name):
    for layer in model_of(name).model.layers:
        if isinstance(layer.mixer, HyenaMixer):
            long, short = layer.mixer.filter(256), layer.mixer.filter(17)
            torch.testing.assert_close(long[..., :17], short, rtol=0, atol=1e-14)


# training and storage


def train_one_step(model, ids, **kwargs):
    model.train()
    loss = model(ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    return loss


@every_combination
def test_every_combination_learns_from_one_step_in_all_its_parameters(name):
    model, ids = new_model(name, sine_frequency=5), tokens(2, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    first = train_one_step(model, ids)
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        # a key's bias cannot move a softmax
        assert parameter.grad.abs().max() > (0 if key.endswith("k_proj.bias") else 1e-12), key
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert model(ids, labels=ids, use_cache=False).loss < first


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_combination_comes_back_bit_by_bit_from_safetensors(name, dtype, tmp_path):
    model, ids = new_model(name).to(dtype), tokens(1, 20)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is HyenaForCausalLM
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[key].dtype, key
        assert torch.equal(tensor, state[key]), key
        assert tensor.dtype == (torch.float32 if ".filter." in key else dtype), key
    # equal weights at other addresses may be summed in another order
    limit = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=limit, atol=limit)
    assert loaded.generate(ids, max_new_tokens=5, pad_token_id=0).shape == (1, 25)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_stored_once_and_stay_tied(tied, tmp_path):
    model = new_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (not a mapping)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_float32_file_loads_in_bfloat16_with_its_filters_in_float32(tmp_path):
    model = new_model("hybrid")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    for key, tensor in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    for one in (loaded, model):
        assert torch.equal(one.model.rotary_emb.inv_freq, frequencies)


def test_the_base_model_loads_alone_and_from_a_language_model(tmp_path):
    model, ids = new_model("order 3"), tokens(1, 9)
    model.save_pretrained(tmp_path / "lm")
    base = AutoModel.from_pretrained(tmp_path / "lm")
    assert type(base) is HyenaModel
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again(ids).last_hidden_state, model.model(ids).last_hidden_state, rtol=0, atol=1e-5)


@every_combination
def test_filters_keep_float32_in_half_models_and_follow_double(name):
    model = new_model(name)
    for convert, body, filters in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
        (lambda m: m.float(), torch.float32, torch.float32),
    ):
        converted = convert(copy.deepcopy(model))
        for key, tensor in converted.state_dict().items():
            assert tensor.dtype == (filters if ".filter." in key else body), key
        assert converted(tokens(1, 5)).logits.dtype == body


def test_a_residual_stream_in_float32_is_closer_to_the_exact_one():
    ids = tokens(2, 61)
    exact = model_of("order 2")(ids).logits
    errors = [
        (new_model(residual_in_fp32=wide).to(torch.bfloat16)(ids).logits - exact).norm().item()
        for wide in (True, False)
    ]
    assert errors[0] < errors[1]
    wide = new_model(residual_in_fp32=True).to(torch.bfloat16)
    assert wide.model(ids, output_hidden_states=True).hidden_states[1].dtype == torch.float32


@every_combination
def test_gradient_checkpointing_gives_the_same_gradients(name):
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    plain, checkpointed = (new_model(name, torch.float64) for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        train_one_step(model, ids, attention_mask=mask)
    for (key, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), key


# initialisation

INIT_STD = {
    "embed_tokens.weight": 0.1,
    "in_proj.weight": 0.1,
    "up_proj.weight": 0.1,
    "q_proj.weight": 0.1,
    "out_proj.weight": 0.1 / math.sqrt(6),
    "down_proj.weight": 0.1 / math.sqrt(6),
    "short_conv.weight": 1 / 3,  # U(-a, a) has std a / sqrt(3), a = 1 / sqrt(3 taps)
    "short_conv.bias": 1 / 3,
    "mixer.skip": 1.0,
    "filter.output.weight": 0.1,
    "filter.layers.1.weight": 0.1,
    "filter.weight": 1 / math.sqrt(3 * 400),
    "proj.bias": 0.0,
    "filter.layers.0.bias": 0.0,
    "norm.weight": 0.0,
    "norm.bias": 0.0,
    "filter.frequency": 0.0,
}
WIDE = {
    "hidden_size": 256,
    "initializer_range": 0.1,
    "filter_hidden_size": 128,
    "layer_types": [HYENA, "full_attention", HYENA],
    "filter_types": ["implicit", "implicit", "explicit"],
    "filter_length": 400,
}


def check_table(model):
    """Every parameter has the spread, and every constant the value, that the table of `_init_weights` says."""
    seen = set()
    for name, parameter in model.named_parameters():
        for ending, std in INIT_STD.items():
            if name.endswith(ending):
                seen.add(ending)
                assert parameter.double().std().item() == pytest.approx(std, rel=0.15, abs=1e-7), name
                assert abs(parameter.double().mean().item()) < 0.2 * std + 1e-7 or std == 0, name
    assert seen == set(INIT_STD)
    hyena = model.model.layers[0].mixer
    assert hyena.filter.frequency.eq(14).all()
    assert model.model.norm.weight.eq(1).all()
    assert hyena.in_proj.bias.eq(0).all()
    decays = oracles.decay_rates(256).reshape(1, 256)
    torch.testing.assert_close(hyena.filter.decay_rates, torch.tensor(decays, dtype=torch.float32))


def test_new_weights_are_those_of_the_table(tmp_path):
    config = config_of(**WIDE)
    check_table(HyenaForCausalLM(config))
    check_table(AutoModelForCausalLM.from_config(config))
    with torch.device("meta"):
        empty = HyenaForCausalLM(config)
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        nn.init.constant_(tensor, math.nan)
    empty.init_weights()
    check_table(empty)
    empty.save_pretrained(tmp_path)
    check_table(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["order 3", "trained features", "hybrid"])
def test_from_config_and_a_meta_model_compute_the_same_buffers_and_features(name):
    plain, empty = HyenaForCausalLM(config_of(name)), None
    with torch.device("meta"):
        empty = HyenaForCausalLM(config_of(name))
    empty.to_empty(device="cpu").init_weights()
    for key, buffer in plain.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[key], buffer), key
    if name == "trained features":
        table = oracles.positional_features(SHAPE["max_position_embeddings"], 4)
        for model in (plain, empty):
            got = model.model.layers[0].mixer.filter.features.detach().numpy()
            assert abs(got - table).max() <= 1.2e-7


@every_combination
def test_the_policy_names_every_parameter_once(name):
    model = new_model(name)
    policy = model.parameter_policy()
    assert list(policy) == [key for key, _ in model.named_parameters()]
    for key, (decay, group) in policy.items():
        assert group == ("filter" if ".filter." in key else "base"), key
        matrix = key.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")) and ".filter." not in key
        assert decay is matrix, key


# the interface of transformers


def test_logits_to_keep_computes_some_positions_only():
    model, ids = model_of("hybrid"), tokens(2, 9)
    whole = model(ids).logits
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-13)
    close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
    marked = torch.zeros(2, 9, dtype=torch.bool)
    marked[0, 3] = marked[1, 8] = True
    close(model(ids, logits_to_keep=marked).logits, whole[marked])


def test_embeddings_serve_in_the_place_of_ids():
    model, ids = model_of("order 3"), tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_hidden_states_are_the_embedding_every_block_and_the_final_norm():
    model, ids = model_of("hybrid"), tokens(2, 9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)


def test_outputs_come_as_a_tuple_on_request():
    model, ids = model_of("order 2"), tokens(1, 5)
    loss, logits, past = model(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0
    assert logits.shape == (1, 5, 97)
    assert past.get_seq_length() == 5


@pytest.mark.parametrize("name", ["order 2", "hybrid"])
def test_the_loss_of_a_padded_batch_is_that_of_its_sequences_alone(name):
    model = model_of(name)
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :6], mask[1, [4, 5, 9, 19]], mask[2] = 0, 0, 0
    loss = model(ids, attention_mask=mask, labels=ids).loss
    alone = [ids[row, mask[row].bool()][None] for row in range(2)]
    sums = sum(model(sequence, labels=sequence).loss * (sequence.shape[1] - 1) for sequence in alone)
    torch.testing.assert_close(loss, sums / sum(sequence.shape[1] - 1 for sequence in alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("described_by", ["seq_idx", "cu_seq_lens_q", "position_ids"])
def test_no_document_of_a_packed_batch_predicts_the_next(described_by):
    model, lengths = model_of("hybrid"), [7, 1, 12]
    ids, parts = tokens(1, 20), tokens(1, 20).split([7, 1, 12], dim=1)
    description = {
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "cu_seq_lens_q": torch.tensor([0, 7, 8, 20]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }[described_by]
    sums = sum(model(part, labels=part).loss * (part.shape[1] - 1) for part in parts if part.shape[1] > 1)
    loss = model(ids, labels=ids, **{described_by: description}).loss
    torch.testing.assert_close(loss, sums / 17, rtol=0, atol=1e-6)


def test_the_loss_of_an_accumulated_batch_counts_all_its_tokens():
    model, ids = model_of("order 2"), tokens(2, 9)
    whole = model(ids, labels=ids).loss
    parts = [model(row[None], labels=row[None], num_items_in_batch=16).loss for row in ids]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    model = new_model("sliding", torch.float64, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    got = model(ids, attention_mask=mask).logits[mask.bool()]
    truth = model_of("sliding")(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("name", ["order 3", "heads", "sliding"])
def test_a_compiled_forward_and_training_step_is_one_graph_and_exact(name):
    torch.compiler.reset()
    plain, compiled = (new_model(name, torch.float64) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 40)
    for model, call in ((plain, plain), (compiled, step)):
        model.train()
        call(ids, labels=ids, use_cache=False).loss.backward()
    for (key, one), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-13, msg=key)
    torch.compiler.reset()


def packed_batch():
    """Two rows of packed documents, with ends and widest length as the usual collator gives them."""
    ends = torch.tensor([0, 7, 29, 40, 41, 80], dtype=torch.int32)
    return tokens(2, 40), {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 39, "max_length_k": 39}


def padded_batch():
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :11], mask[1, 20:25] = 0, 0
    return ids, {"attention_mask": mask}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("batch", [packed_batch, padded_batch])
@pytest.mark.parametrize("name", ["order 3", "heads", "sliding"])
def test_a_compiled_training_step_on_a_packed_or_padded_batch_is_one_graph_and_exact(name, batch):
    torch.compiler.reset()
    ids, kwargs = batch()
    plain, compiled = (new_model(name, torch.float64) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    losses = []
    for model, call in ((plain, plain), (compiled, step)):
        model.train()
        losses.append(call(ids, labels=ids, use_cache=False, **kwargs).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for (key, one), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12, msg=key)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
def test_a_compiled_packed_batch_may_have_another_length():
    torch.compiler.reset()
    model = new_model("order 2", torch.float64).requires_grad_(False)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 20, 15], [9, 30, 2], [11, 3, 3, 20]):
        ids, ends = tokens(1, sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
        got = step(ids, cu_seq_lens_q=ends, max_length_q=max(lengths)).logits
        torch.testing.assert_close(got, model(ids, cu_seq_lens_q=ends).logits, rtol=0, atol=1e-12)
    torch.compiler.reset()


def test_an_exported_partial_filter_takes_any_length_of_one_row():
    model = new_model("sliding", torch.float64).requires_grad_(False)
    length = torch.export.Dim("length", min=2, max=200)
    inputs = {"input_ids": tokens(1, 40), "use_cache": False}
    shapes = {"input_ids": {1: length}, "use_cache": None}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for n in (2, 17, 200):
        got = exported(input_ids=tokens(1, n), use_cache=False).logits
        torch.testing.assert_close(got, model(tokens(1, n)).logits, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
def test_a_compiled_packed_batch_refuses_ends_that_do_not_fit():
    torch.compiler.reset()
    ids, kwargs = packed_batch()
    step = torch.compile(new_model("order 2"), fullgraph=True, backend="aot_eager")
    for ends in (
        [0, 7, 29, 40, 41, 79],
        [0, 7, 29, 28, 41, 80],
        [1, 7, 29, 40, 41, 80],
        [0, 7, 9, 10, 11, 80],
        [0, 7, 29, 39, 41, 80],
    ):
        with pytest.raises(RuntimeError, match="cu_seq_lens_q must rise from 0 to the number of tokens"):
            step(ids, **kwargs | {"cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32)})
    torch.compiler.reset()


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("name", ["order 3", "heads", "hybrid"])
def test_an_exported_model_takes_any_batch_length_and_mask(name, masked):
    model = new_model(name, torch.float64).requires_grad_(False)
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=250)}
    ids, mask = padded_batch()[0], padded_batch()[1]["attention_mask"]
    masks = {"attention_mask": mask} if masked else {}
    exported = torch.export.export(
        model,
        (),
        {"input_ids": ids, "use_cache": False, **masks},
        dynamic_shapes={"input_ids": dims, "use_cache": None, **({"attention_mask": dims} if masked else {})},
    ).module()
    for shape in ((1, 2), (3, 77), (5, 250)):
        ids = tokens(*shape)
        mask = torch.rand(shape) < 0.7
        masks = {"attention_mask": mask.long()} if masked else {}
        got = exported(input_ids=ids, use_cache=False, **masks).logits
        kept = mask if masked else torch.ones_like(mask)
        torch.testing.assert_close(got[kept], model(ids, **masks).logits[kept], rtol=0, atol=1e-12)


def test_lora_trains_and_merges():
    targets = ["in_proj", "out_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        new_model("hybrid", torch.float64), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    )
    ids = tokens(2, 20)
    train_one_step(model, ids)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (2 * 4 + 3)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    before = model.eval()(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, before, rtol=0, atol=1e-12)


def watched_mlp(monkeypatch, **changes):
    """An MLP with tiles of 8 tokens, and the shapes that its activation sees."""
    monkeypatch.setattr(HyenaMLP, "_TILE", 8)
    mlp, seen = HyenaMLP(config_of("order 2", **changes), 0).eval(), []
    mlp.activation.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return mlp, seen, torch.randn(3, 11, mlp.up_proj.in_features)


@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_in_tiles_of_tokens_equals_the_mlp_at_once(monkeypatch, gated):
    mlp, seen, x = watched_mlp(monkeypatch, gated_mlp=gated)
    whole = mlp(x).detach()
    with torch.no_grad():
        tiled = mlp(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert [shape[0] for shape in seen] == [3, 8, 8, 8, 8, 1]
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_hooks_adapters_and_checkpoints_see_whole_rows_of_an_mlp(monkeypatch):
    """Tiles once gave reentrant checkpoints other dropout than their gradients, and adapters tokens for rows."""
    mlp, seen, x = watched_mlp(monkeypatch)
    with torch.no_grad():
        mlp.train()(x)  # what a checkpoint does first
        mlp.eval().up_proj.register_forward_hook(lambda *_: None)
        mlp(x)
    assert seen == [(3, 11, mlp.up_proj.out_features)] * 2
