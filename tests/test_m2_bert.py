"""M2-BERT: published layouts load, and give the numbers of the formulas in any batch.

Run: python -m pytest tests/test_m2_bert.py -q

The oracle (`tests/m2_bert.py`) computes from the published names and tensors in float64; it reads padding like text,
as the published code does. Bounds are relative to max(1, largest value).
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForTextEncoding

from hyena_hf import HyenaConfig, HyenaForMaskedLM, HyenaForTextEncoding
from hyena_hf.checkpoints import convert_checkpoint, detect_layout, load_checkpoint
from hyena_hf.checkpoints.files import Source, Tensors
from hyena_hf.checkpoints.m2_bert import read
from hyena_hf.filters import ImplicitFilter
from hyena_hf.mixers import HyenaMixer
from tests import golden_reader
from tests.m2_bert import LENGTH, RAW, VARIANTS, oracle, write_checkpoint, write_state


LENGTHS = (11, 4, 1, 8)
POOLED = "bert.pooler."
HEADS = {"cls.": HyenaForMaskedLM, POOLED: HyenaForTextEncoding}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function of variant and head that writes a published folder once."""

    @cache
    def write(variant, head):
        raw, state = write_state(VARIANTS[variant])
        return write_checkpoint(tmp_path_factory.mktemp("m2"), raw, state, head)

    return write


@pytest.fixture(scope="module")
def model_of(folder_of):
    """A function of variant and head that loads a model once, in float64 unless told otherwise."""

    @cache
    def load(variant, head, dtype=torch.float64):
        return load_checkpoint(folder_of(variant, head)).to(dtype).requires_grad_(False)

    return load


def batch(rows, length, seed=1):
    """Token ids and their types (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, length
    ids = torch.randint(0, RAW["vocab_size"], shape, generator=generator)
    return ids, torch.randint(0, 2, shape, generator=generator)


def output(model, ids, types=None, **kwargs):
    """Logits (B, L, V), or vectors (B, D)."""
    outputs = model(ids, token_type_ids=types, **kwargs)
    return outputs.pooler_output if isinstance(model, HyenaForTextEncoding) else outputs.logits


def expected(variant, head, ids, types=None):
    raw, state = write_state(VARIANTS[variant])
    return oracle(state, raw, ids, types)["pooled" if head == POOLED else "logits"]


def close(got, truth, bound):
    assert abs(got - truth).max() <= bound * max(1.0, abs(truth).max())


# the numbers


@every_head
@every_variant
@pytest.mark.parametrize("length", [1, 17, LENGTH])
def test_outputs_of_a_loaded_checkpoint_equal_the_formulas_in_float64(model_of, variant, head, length):
    ids, types = batch(2, length)
    close(output(model_of(variant, head), ids, types).numpy(), expected(variant, head, ids, types), 1e-10)


@every_variant
def test_float32_logits_are_close_to_the_formulas(model_of, variant):
    ids, types = batch(2, LENGTH)
    truth = expected(variant, "cls.", ids, types)
    # the weights are large and the frequencies too: float32 rounding of the published code itself costs up to 4e-4
    close(output(model_of(variant, "cls.", torch.float32), ids, types).double().numpy(), truth, 2e-3)


@every_head
def test_types_are_zero_where_none_are_given(model_of, head):
    model, (ids, _) = model_of("published", head), batch(2, 9)
    assert torch.equal(output(model, ids), output(model, ids, torch.zeros_like(ids)))


def test_the_published_mixer_is_reproduced_by_the_names_of_the_reader():
    golden = golden_reader.load_golden("m2_mixer_bidir1_resid0")
    prefix = "bert.encoder.layer.0."
    state = {f"{prefix}attention.{name}": torch.from_numpy(array) for name, array in golden.state.items()}
    width = golden.meta["d_model"]
    frame = {"gated_layers": (2 * width, width), "wo": (width, width)}
    state |= {f"{prefix}mlp.{name}.weight": torch.zeros(shape) for name, shape in frame.items()}
    names = ("mlp.wo.bias", "mlp.layernorm.weight", "mlp.layernorm.bias")
    state |= {f"{prefix}{name}": torch.zeros(width) for name in names}
    state |= {"bert.embeddings.word_embeddings.weight": torch.zeros(8, width)}
    state |= {"bert.embeddings.token_type_embeddings.weight": torch.zeros(2, width)}
    state |= {f"bert.embeddings.LayerNorm.{kind}": torch.zeros(width) for kind in ("weight", "bias")}
    state |= {"bert.pooler.dense.weight": torch.zeros(width, width), "bert.pooler.dense.bias": torch.zeros(width)}
    source = Source("golden", golden_reader.GOLDEN, {}, Tensors(dict.fromkeys(state), state), "golden")
    conversion = read(source, "m2-bert")
    mixer = HyenaMixer(conversion.config, 0).eval()
    ours = "model.layers.0.mixer."
    mixer.load_state_dict({k.removeprefix(ours): tensor for k, tensor in conversion.checked() if k.startswith(ours)})
    with torch.no_grad():
        got = mixer.double()(torch.from_numpy(golden.inputs["x"]).double())
    close(got.numpy(), golden.outputs["y_float64"], 1e-10)


# batching


@cache
def texts():
    return [batch(1, length, seed=7 + length) for length in LENGTHS]


def layout(kind):
    """Ids, types and mask (4, 20): each text at the left, at the right, or with holes; the rest is other tokens."""
    columns = 20
    ids, types = batch(len(LENGTHS), columns, seed=99)
    mask = torch.zeros(len(LENGTHS), columns, dtype=torch.long)
    for row, (text, kinds) in enumerate(texts()):
        n = text.shape[1]
        generator = torch.Generator().manual_seed(row)
        places = {
            "left": torch.arange(columns - n, columns),
            "right": torch.arange(n),
            "holes": torch.randperm(columns, generator=generator)[:n].sort().values,
        }[kind]
        mask[row, places] = 1
        ids[row, places], types[row, places] = text[0], kinds[0]
    return ids, types, mask


@every_head
@every_variant
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_with_a_mask_a_text_has_the_outputs_of_the_text_alone(model_of, variant, head, kind):
    model, (ids, types, mask) = model_of(variant, head), layout(kind)
    got = output(model, ids, types, attention_mask=mask)
    for row, (text, kinds) in enumerate(texts()):
        truth = output(model, text, kinds)[0]
        close((got[row] if head == POOLED else got[row, mask[row].bool()]).numpy(), truth.numpy(), 1e-10)


@every_variant
def test_packed_texts_do_not_see_each_other(model_of, variant):
    model = model_of(variant, "cls.")
    ids, types = (torch.cat(parts, dim=1) for parts in zip(*texts(), strict=True))
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    logits = model(ids, token_type_ids=types, seq_idx=number).logits
    for part, (text, kinds) in zip(logits[0].split(LENGTHS), texts(), strict=True):
        close(part.numpy(), output(model, text, kinds)[0].numpy(), 1e-10)


@every_head
def test_without_a_mask_padding_is_read_like_text_as_the_published_code_does(model_of, head):
    model, (ids, _) = model_of("published", head), batch(2, LENGTH)
    ids[0, 7:], ids[1, 3:] = 0, 0
    got = output(model, ids)
    close(got.numpy(), expected("published", head, ids), 1e-10)
    assert torch.equal(got, output(model, ids, attention_mask=torch.ones_like(ids)))
    alone = output(model, ids[:1, :7])
    assert (alone[0, 0] - got[0, 0]).abs().max() > 1e-3


def test_gradients_of_padded_texts_are_those_of_the_texts_alone(folder_of):
    model = load_checkpoint(folder_of("published", "cls.")).double()
    weights = torch.randn(sum(LENGTHS), RAW["vocab_size"], dtype=torch.float64)

    def gradients(logits):
        model.zero_grad()
        (logits * weights).sum().backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    truth = gradients(torch.cat([output(model, *text)[0] for text in texts()]))
    ids, types, mask = layout("holes")
    got = gradients(output(model, ids, types, attention_mask=mask)[mask.bool()])
    for key, gradient in got.items():
        scale = max(1.0, truth[key].abs().max().item())
        assert (gradient - truth[key]).abs().max().item() <= 1e-10 * scale, key
        assert truth[key].abs().max() > 0, key


def test_positions_count_the_tokens_of_a_text_wherever_it_stands(model_of):
    model = model_of("published", "cls.")
    ids, types, mask = layout("left")
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, -7)
    got, truth = (output(model, ids, types, attention_mask=mask, position_ids=p) for p in (counted, None))
    assert torch.equal(got[mask.bool()], truth[mask.bool()])


def test_frozen_filters_change_nothing_and_are_evaluated_once_residual_ones_too(model_of, monkeypatch):
    model, (ids, types) = model_of("published", "cls."), batch(2, 9)
    truth, calls = output(model, ids, types), []
    evaluate = ImplicitFilter.taps
    monkeypatch.setattr(ImplicitFilter, "taps", lambda self, *args: calls.append(self) or evaluate(self, *args))
    with model.frozen_filters():
        for _ in range(3):
            assert torch.equal(output(model, ids, types), truth)
    assert len(calls) == 2 * 2 * RAW["num_hidden_layers"]  # both filters, both directions
    assert len(set(map(id, calls))) == 2 * RAW["num_hidden_layers"]


# layouts


@every_head
def test_the_layout_is_found_and_decides_the_class(folder_of, head):
    folder = folder_of("published", head)
    assert detect_layout(folder) == "m2-bert"
    assert type(load_checkpoint(folder)) is HEADS[head]


@every_head
def test_a_converted_folder_loads_with_the_auto_class_and_is_the_same_model(folder_of, model_of, head, tmp_path):
    convert_checkpoint(folder_of("published", head), tmp_path / "out")
    auto = AutoModelForTextEncoding if head == POOLED else AutoModelForMaskedLM
    model = auto.from_pretrained(tmp_path / "out").eval()
    ids, types = batch(2, 13)
    with torch.no_grad():
        assert torch.equal(output(model, ids, types), output(model_of("published", head, torch.float32), ids, types))


def written(folder, change=None, config=None):
    """A published folder with a head for masked tokens, its tensors or its configuration changed."""
    raw, state = write_state({})
    return write_checkpoint(folder, raw if config is None else config, state, "cls.", change)


WRAPPINGS = {
    "composer's file": lambda state: {"state": {"model": {f"model.{key}": t for key, t in state.items()}}, "rng": []},
    "names without bert": lambda state: {key.removeprefix("bert."): tensor for key, tensor in state.items()},
    "buffers of fast convolutions": lambda state: {
        **state,
        "bert.encoder.flashfft.f_16_fft": torch.ones(3),
        "bert.encoder.layer.0.attention.filter_fn.flashfft.twiddle": torch.ones(3),
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_files_of_trainers_load_as_those_of_the_hub(model_of, wrapping, tmp_path):
    folder = written(tmp_path, WRAPPINGS[wrapping])
    ids, types = batch(1, 9)
    with torch.no_grad():
        got = output(load_checkpoint(folder), ids, types)
    assert torch.equal(got, output(model_of("published", "cls.", torch.float32), ids, types))


def test_a_configuration_that_says_only_its_type_is_enough(model_of, tmp_path):
    folder = written(tmp_path, config={"model_type": "m2_bert"})
    model, truth = load_checkpoint(folder), model_of("published", "cls.", torch.float32)
    assert model.config.to_dict() == truth.config.to_dict()


def test_frequencies_may_stand_under_any_one_of_their_names_as_safetensors_keeps_them(model_of, tmp_path):
    raw, state = write_state({})
    kept = {k: t for k, t in state.items() if ".freq" not in k or k.endswith("implicit_filter_rev.3.freq")}
    save_file(
        {k: t for k, t in kept.items() if "decoder.weight" not in k and "pooler" not in k}, tmp_path / "a.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids, types = batch(1, 9)
    with torch.no_grad():
        got = output(load_checkpoint(tmp_path), ids, types)
    assert torch.equal(got, output(model_of("published", "cls.", torch.float32), ids, types))


def test_a_head_of_its_own_stays_one(tmp_path):
    def untie(state):
        return {**state, "cls.predictions.decoder.weight": state["cls.predictions.decoder.weight"] + 1}

    model = load_checkpoint(written(tmp_path, untie))
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_a_pooler_beside_a_head_for_masked_tokens_and_a_classifier_gives_a_text_encoder(model_of, tmp_path):
    raw, state = write_state({})
    state |= {"classifier.weight": torch.ones(10, 16), "classifier.bias": torch.ones(10)}
    torch.save(state, tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids, types = batch(1, 9)
    with torch.no_grad():
        got = output(load_checkpoint(tmp_path), ids, types)
    assert torch.equal(got, output(model_of("published", POOLED, torch.float32), ids, types))


def test_a_vocabulary_beside_the_weights_becomes_the_tokenizer(tmp_path):
    folder = written(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (folder / "vocab.txt").write_text("\n".join(words))
    conversion = convert_checkpoint(folder, tmp_path / "out")
    tokenizer = conversion.tokenizer()
    assert tokenizer("Hello world")["input_ids"] == [2, 5, 6, 3]
    assert tokenizer.model_max_length == LENGTH
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_the_card_warns_of_padding(folder_of, tmp_path):
    conversion = convert_checkpoint(folder_of("published", POOLED), tmp_path / "out")
    assert any("reads padding like text" in warning for warning in conversion.warnings)
    assert "reads padding like text" in (tmp_path / "out" / "README.md").read_text()


def drop(end):
    return lambda state: {key: tensor for key, tensor in state.items() if not key.endswith(end)}


def change(end, function):
    return lambda state: {k: function(tensor) if k.endswith(end) else tensor for k, tensor in state.items()}


DAMAGED = {
    "a tensor is missing": (drop("layer.1.attention.out_linear.weight"), {}, "out_linear"),
    "a filter ends early": (drop("layer.1.attention.filter_fn.implicit_filter.6.weight"), {}, "no tensor.*filter.6"),
    "a tensor is foreign": (lambda state: {**state, "bert.extra": torch.ones(1)}, {}, "no place for.*extra"),
    "frequencies differ": (change("layer.0.attention.filter_fn.implicit_filter.3.freq", torch.neg), {}, "differ"),
    "times are no ramp": (change("layer.1.attention.filter_fn.pos_emb.t", torch.ones_like), {}, "from 0 to 1"),
    "another shape": (change("embeddings.LayerNorm.bias", lambda tensor: tensor[:-1]), {}, r"shape \(15,\)"),
    "another width": (None, {"hidden_size": 32}, "hidden_size=32.*16"),
    "another length": (None, {"long_conv_l_max": 128}, "long_conv_l_max=128.*24"),
    "a norm in the config only": (None, {"hyena_training_additions": True}, "hyena_training_additions"),
    "attention instead": (None, {"monarch_mixer_sequence_mixing": False}, "monarch_mixer_sequence_mixing=False"),
    "attention pooling": (None, {"attention_pooling": True}, "attention_pooling=True"),
    "another epsilon": (None, {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_whole_checkpoint_is_refused_with_a_reason(name, tmp_path):
    damage, settings, message = DAMAGED[name]
    folder = written(tmp_path, damage, {**RAW, **settings})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


# published sizes

SIZES = {  # width and length: what the publishers call it
    (768, 128): 80e6,
    (1536, 128): 260e6,
    (1792, 128): 341e6,
}


def formula(width, length, vocab=30528, layers=12, hidden=128, features=5, blocks=4):
    """Parameters of a masked-language model, by hand."""
    inner = 4 * width
    net = (features * hidden + hidden) + 2 * (hidden * hidden + hidden) + hidden * width
    convolution = 2 * net + hidden + length * features + width
    mixer = 2 * convolution + (3 * width * width + 3 * width) + (width * width + width) + 3 * width * (3 + 1)
    mlp = (2 * inner * width + inner * width) // blocks + width + 2 * width
    embeddings = (vocab + length + 2) * width + 2 * width
    head = width * width + width + 2 * width + vocab
    return embeddings + layers * (mixer + mlp) + head


def on_meta(width, length):
    config = HyenaConfig(
        vocab_size=30528, hidden_size=width, num_hidden_layers=12, intermediate_size=4 * width,
        max_position_embeddings=length, is_causal=False, filter_hidden_size=128, filter_num_bands=2,
        trainable_positional_features=True, residual_conv=True, block_type="monarch_mixer", learned_positions=True,
        type_vocab_size=2, gated_mlp=True, mlp_bias=["down_proj"], mlp_blocks=4, lm_head_transform=True,
    )  # fmt: skip
    with torch.device("meta"):
        return HyenaForMaskedLM(config)


@pytest.mark.parametrize(("width", "length"), SIZES)
def test_published_parameter_counts_are_reproduced(width, length):
    count = on_meta(width, length).num_parameters()
    assert count == formula(width, length)
    assert count == pytest.approx(SIZES[width, length], rel=0.01, abs=0)


def test_a_saved_model_comes_back_bit_by_bit(model_of, tmp_path):
    model = model_of("published", "cls.", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    state = model.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())


def test_half_precision_keeps_both_filters_in_float32(folder_of):
    model = load_checkpoint(folder_of("published", "cls.")).to(torch.bfloat16)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".filter." in key else torch.bfloat16), key
    ids, types = batch(2, 20)
    assert np.isfinite(output(model, ids, types).detach().float().numpy()).all()


@pytest.mark.parametrize("rows", [34, 39, 40])
def test_a_vocabulary_that_the_published_code_rounds_up_is_no_contradiction(rows, tmp_path):
    raw, state = write_state(VARIANTS["published"])
    folder = write_checkpoint(tmp_path, {**raw, "vocab_size": rows}, state, "cls.")
    assert load_checkpoint(folder).config.vocab_size == 40


def test_a_vocabulary_of_another_model_is_one(tmp_path):
    raw, state = write_state(VARIANTS["published"])
    folder = write_checkpoint(tmp_path, {**raw, "vocab_size": 41}, state, "cls.")
    with pytest.raises(ValueError, match="says vocab_size=41, but its weights 40"):
        load_checkpoint(folder)
