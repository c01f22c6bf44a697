"""Published weights: every layout gives the logits of the published code, and comes back from our own files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hyena_hf import HyenaConfig, HyenaForCausalLM, HyenaForSequenceClassification
from hyena_hf.checkpoints import (
    LAYOUTS,
    convert_checkpoint,
    detect_layout,
    export_checkpoint,
    load_checkpoint,
    writing,
)
from hyena_hf.checkpoints.pickles import read_torch_file
from hyena_hf.checkpoints.striped import modal_parameters, rows_of_projections
from hyena_hf.filters import positional_features
from hyena_hf.ops.modal import impulse_response


CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
GOLDEN = {
    "safari-lm": "safari-lm",
    "longsafari-seqlen": "longsafari-seqlen",
    "longsafari-hf": "hf",
    "stripedhyena": "stripedhyena",
    "evo1": "evo1",
    "evo2": "evo2",
}


def golden(layout):
    return CHECKPOINTS / GOLDEN[layout]


def copy_of(layout, tmp_path):
    return Path(shutil.copytree(golden(layout), tmp_path / layout))


def expected(layout):
    with np.load(golden(layout) / "expected.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@torch.no_grad()
def logits_of(model, ids, positions=None):
    logits = model(torch.as_tensor(ids)).logits
    return logits if positions is None else logits[:, torch.as_tensor(positions)]


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("layout", GOLDEN)
def test_logits_are_those_of_the_published_code(layout):
    truth = expected(layout)
    model = load_checkpoint(golden(layout))
    assert not model.training
    logits = logits_of(model.float(), truth["input_ids"], truth.get("positions")).numpy()
    assert abs(logits - truth["logits"]).max() <= 1e-5 * max(1.0, abs(truth["logits"]).max())


@pytest.mark.parametrize("layout", ["stripedhyena", "evo1", "evo2"])
def test_in_float64_logits_differ_from_the_published_ones_by_the_float32_filters_alone(layout):
    truth = expected(layout)
    logits = logits_of(load_checkpoint(golden(layout)).double(), truth["input_ids"], truth["positions"]).numpy()
    # both keep poles and residues in float32, but published residues are multiplied by their pole and rounded again
    assert abs(logits - truth["logits_float64"]).max() <= 2e-6 * abs(truth["logits_float64"]).max()


@pytest.mark.parametrize("layout", GOLDEN)
def test_the_layout_is_found_from_the_files(layout):
    assert layout in LAYOUTS
    assert detect_layout(golden(layout)) == layout


@pytest.mark.parametrize("layout", GOLDEN)
def test_a_converted_folder_loads_through_auto_classes_with_the_same_logits(layout, tmp_path):
    convert_checkpoint(golden(layout), tmp_path / "out")
    direct, ids = load_checkpoint(golden(layout)), expected(layout)["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == direct.dtype
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(direct, ids), rtol=0, atol=0)
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), direct.named_parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == loaded.config.eos_token_id
    assert layout in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("layout", GOLDEN)
def test_a_loaded_model_is_saved_and_generates_with_a_cache(layout, tmp_path):
    model = load_checkpoint(golden(layout)).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.as_tensor(expected(layout)["input_ids"][:, :9])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = loaded.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize(
    ("layout", "text", "ids", "special"),
    [
        ("longsafari-hf", "ACGTN", [0, 7, 8, 9, 10, 11, 1], (1, 4)),
        ("longsafari-seqlen", "ACGTN", [0, 7, 8, 9, 10, 11, 1], (1, 4)),
        ("evo1", "ACGT", [65, 67, 71, 84], (0, 1)),
        ("evo2", "acgt", [97, 99, 103, 116], (0, 1)),
    ],
)
def test_the_tokenizer_has_the_published_ids_and_the_real_end_token(layout, text, ids, special, tmp_path):
    convert_checkpoint(golden(layout), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == special
    config = HyenaConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.pad_token_id) == special


def test_checkpointing_modules_change_no_name_that_matters(tmp_path):
    folder = copy_of("longsafari-seqlen", tmp_path)
    stored = torch.load(folder / "weights.ckpt", weights_only=True)  # noqa: TID251 (a file of ours)
    wrapped = {
        key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): value
        for key, value in stored["state_dict"].items()
    }
    torch.save({**stored, "state_dict": wrapped}, folder / "weights.ckpt")
    change_config(folder, checkpoint_mixer=True, checkpoint_mlp=True)
    ids = expected("longsafari-seqlen")["input_ids"]
    assert torch.equal(
        logits_of(load_checkpoint(folder), ids), logits_of(load_checkpoint(golden("longsafari-seqlen")), ids)
    )


@pytest.mark.parametrize("layout", ["safari-lm", "longsafari-seqlen", "longsafari-hf"])
def test_positional_features_of_the_formula_are_not_stored(layout, tmp_path):
    convert_checkpoint(golden(layout), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "features" in name]  # noqa: SIM118 (no mapping)


def test_trained_positional_features_are_kept_and_used(tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    key = "hyena.backbone.layers.1.mixer.filter_fn.pos_emb.z"
    moved = state[key] + 0.1 * torch.randn(state[key].shape, generator=torch.Generator().manual_seed(0))
    save_file({**state, key: moved}, folder / "model.safetensors")
    model = load_checkpoint(folder)
    assert model.config.trainable_positional_features
    assert torch.equal(model.model.layers[1].mixer.filter.features, moved[0])
    assert torch.equal(model.model.layers[0].mixer.filter.features, positional_features(130, 130, 2))
    ids = expected("longsafari-hf")["input_ids"]
    assert (logits_of(model, ids) - logits_of(load_checkpoint(golden("longsafari-hf")), ids)).abs().max() > 1e-4


def test_an_untied_head_stays_untied(tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state["lm_head.weight"] + 1}, folder / "model.safetensors")
    model = load_checkpoint(folder)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"] + 1)


def test_a_fine_tuned_classifier_is_loaded_as_one(tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file({**state, "score.weight": torch.ones(3, 16)}, folder / "model.safetensors")
    model = load_checkpoint(folder)
    assert isinstance(model, HyenaForSequenceClassification)
    assert torch.equal(model.score.weight, torch.ones(3, 16))


def test_a_safari_model_in_its_trainers_form_is_no_dna_model(tmp_path):
    folder = copy_of("safari-lm", tmp_path)
    state = torch.load(folder / "hyena_tiny.ckpt", weights_only=True)  # noqa: TID251 (a file of ours)
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, folder / "hyena_tiny.ckpt")
    assert detect_layout(folder) == "safari-lm"
    ids = expected("safari-lm")["input_ids"]
    assert torch.equal(logits_of(load_checkpoint(folder), ids), logits_of(load_checkpoint(golden("safari-lm")), ids))


def test_dna_weights_without_a_prefix_load_with_a_loud_note(tmp_path, caplog):
    folder = copy_of("longsafari-seqlen", tmp_path)
    state = torch.load(folder / "weights.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 (a file of ours)
    bare = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    torch.save(bare, folder / "weights.ckpt")
    with caplog.at_level("WARNING"):
        load_checkpoint(folder)
    assert "name its layout, longsafari-seqlen" in caplog.text
    ids = expected("longsafari-seqlen")["input_ids"]
    named = logits_of(load_checkpoint(folder, layout="longsafari-seqlen"), ids)
    assert torch.equal(named, logits_of(load_checkpoint(golden("longsafari-seqlen")), ids))


def test_a_name_elsewhere_in_the_path_changes_nothing(tmp_path):
    folder = Path(shutil.copytree(golden("safari-lm"), tmp_path / "hyena-small-150b-tok" / "mine"))
    assert load_checkpoint(folder).config.modulation


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(("layout", "file"), [("safari-lm", "hyena_tiny.ckpt"), ("evo2", "evo2_7b.pt")])
def test_wrappers_of_parallel_training_and_compilation_change_no_name(layout, file, wrapper, tmp_path):
    folder = copy_of(layout, tmp_path)
    state = {name: tensor.clone() for name, tensor in read_torch_file([folder / file]).items()}
    torch.save({wrapper + key: value for key, value in state.items()}, folder / file)
    ids = expected(layout)["input_ids"]
    assert torch.equal(logits_of(load_checkpoint(folder), ids), logits_of(load_checkpoint(golden(layout)), ids))


def test_a_model_does_not_live_in_the_file_it_came_from(tmp_path):
    folder = copy_of("longsafari-seqlen", tmp_path)
    model = load_checkpoint(folder)
    ids = expected("longsafari-seqlen")["input_ids"]
    before = logits_of(model, ids)
    (folder / "weights.ckpt").write_bytes(b"")  # a mapping of it would end the process here
    assert torch.equal(logits_of(model, ids), before)


def test_names_of_classes_and_the_kind_of_problem_stay(tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file({**state, "score.weight": torch.ones(2, 16)}, folder / "model.safetensors")
    change_config(folder, id2label={"0": "exon", "1": "intron"}, problem_type="multi_label_classification")
    config = load_checkpoint(folder).config
    assert (config.id2label, config.label2id) == ({0: "exon", 1: "intron"}, {"exon": 0, "intron": 1})
    assert config.problem_type == "multi_label_classification"


def with_order_3(state, channel_major):
    """The published tensors of a model of order 3, from those of order 2: filters of both steps, and their packing."""
    changed = {}
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if key.endswith(("in_proj.weight", "in_proj.bias", "short_filter.weight", "short_filter.bias")):
            value = torch.cat([value, torch.randn(value[:16].shape, generator=generator)])
        elif key.endswith(("filter_fn.bias", "implicit_filter.6.weight")):
            second = torch.randn(value.shape, generator=generator)
            pair = torch.stack([value, second], dim=1 if channel_major else 0)
            value = pair.flatten(0, 1)
        elif key.endswith("deltas"):
            value = torch.linspace(-3.0701, -15.3506, 32).view(1, 1, 32)
        changed[key] = value
    return changed


@pytest.mark.parametrize(("layout", "file"), [("safari-lm", "hyena_tiny.ckpt"), ("longsafari-seqlen", "weights.ckpt")])
def test_filters_of_order_3_are_unpacked_as_each_code_packs_them(layout, file, tmp_path):
    folder, channel_major = copy_of(layout, tmp_path), layout == "safari-lm"
    stored = torch.load(folder / file, weights_only=True)  # noqa: TID251 (a file of ours)
    state = with_order_3(stored.get("state_dict", stored), channel_major)
    torch.save({"state_dict": state} if "state_dict" in stored else state, folder / file)
    layer = json.loads(next(folder.glob("*config.json")).read_text())["layer"]
    next(folder.glob("*config.json")).write_text(
        json.dumps({**json.loads(next(folder.glob("*config.json")).read_text()), "layer": {**layer, "order": 3}})
    )
    mixer = load_checkpoint(folder).model.layers[0].mixer
    assert mixer.order == 3
    prefix = next(key for key in state if key.endswith("layers.0.mixer.filter_fn.bias")).removesuffix("bias")
    for step in range(2):
        # the published convolutions take channel d of step o at d * 2 + o, or at o * 16 + d
        places = [d * 2 + step if channel_major else step * 16 + d for d in range(16)]
        assert torch.equal(mixer.skip[step], state[f"{prefix}bias"][places])
        rows = mixer.filter.output.weight.unflatten(0, (2, 16))[step]
        assert torch.equal(rows, state[f"{prefix}implicit_filter.6.weight"][places])
        assert torch.equal(mixer.filter.decay_rates[step], state[f"{prefix}modulation.deltas"].flatten()[places])


def test_windows_are_shifted_in_dna_models_only():
    shifts = {layout: load_checkpoint(golden(layout)).config.modulation_shift for layout in list(GOLDEN)[:3]}
    assert shifts == {"safari-lm": 0.0, "longsafari-seqlen": 0.05, "longsafari-hf": 0.05}


@pytest.mark.parametrize("config", [True, False])
def test_the_released_153m_model_is_not_modulated_whatever_its_training_configuration_says(config, tmp_path):
    folder = Path(shutil.copytree(golden("safari-lm"), tmp_path / "hyena-small-150b-tok"))
    if not config:
        (folder / "model_config.json").unlink()
    model = load_checkpoint(folder)
    assert not model.config.modulation
    assert all(layer.mixer.filter.decay_rates is None for layer in model.model.layers)


def test_poles_and_residues_give_the_published_taps():
    generator = torch.Generator().manual_seed(0)
    radius = 0.7 + 0.299 * torch.rand(5, 4, generator=generator)
    turn = 6.28 * torch.rand(5, 4, generator=generator) - 3.14
    poles = torch.view_as_real(torch.polar(radius, turn)).unsqueeze(2)
    poles[0, 0], poles[1, 1, 0, 1] = 0, 0  # a pole at 0, and a real one
    residues = torch.randn(5, 4, 1, 2, generator=generator)
    p, r = (x.double().numpy()[:, :, 0] @ [1, 1j] for x in (poles, residues))
    lags = np.arange(200)
    # 0 to the power 0 is 1
    published = np.real(r[..., None] * p[..., None] ** lags).sum(1)
    parts = modal_parameters(poles, residues)
    ours = impulse_response(
        *(parts[name] for name in ("log_radius", "angle", "residue_re", "residue_im", "direct")), 200
    )
    assert abs(ours.numpy() - published).max() <= 5e-6 * abs(published).max()


def test_logarithms_of_real_poles_give_the_published_taps():
    generator = torch.Generator().manual_seed(0)
    logarithms = -torch.rand(5, 16, 1, generator=generator)
    residues = torch.randn(5, 16, generator=generator)
    published = (residues.double()[..., None] * torch.exp(logarithms.double() * torch.arange(200))).sum(1)
    parts = modal_parameters(logarithms, residues)
    ours = impulse_response(
        *(parts[name] for name in ("log_radius", "angle", "residue_re", "residue_im", "direct")), 200
    )
    assert (ours - published).abs().max() <= 1e-6 * published.abs().max()


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_rows_of_projections_stand_where_the_published_code_looks_for_them(interleave, split, flip):
    raw = {"interleave": interleave, "column_split_hyena": split, "hyena_flip_x1x2": flip, "num_attention_heads": 3}
    ours = rows_of_projections(raw, 6).tolist()
    z = list(range(18))
    if interleave:
        z = z[0::3] + z[1::3] + z[2::3]
    if split:
        heads = [z[6 * head : 6 * head + 6] for head in range(3)]
        z = [row for part in range(3) for head in heads for row in head[2 * part : 2 * part + 2]]
    x2, x1, v = z[:6], z[6:12], z[12:]
    assert ours == (x1 + x2 if flip else x2 + x1) + v


def test_a_filter_that_does_not_decay_is_loaded_and_named(tmp_path, caplog):
    folder = copy_of("evo1", tmp_path)
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for key in state:
            if key.endswith("blocks.0.filter.poles"):
                state[key][3, 1, 0] = torch.tensor([1.001, 0.0])
        save_file(state, file)
    with caplog.at_level("WARNING"):
        model = load_checkpoint(folder)
    assert "layer 0 do not decay in 1 channels (first [3])" in caplog.text
    assert model.model.layers[0].mixer.filter.log_radius[0, 3, 1] > 0


def test_rotary_frequencies_rounded_in_the_file_are_used_rounded():
    model = load_checkpoint(golden("evo2"))
    assert model.config.rope_frequency_dtype == "bfloat16"
    exact = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact.bfloat16().float() / 128)


def test_a_file_cut_into_parts_is_read_as_one(tmp_path):
    folder = copy_of("evo2", tmp_path)
    data = (folder / "evo2_7b.pt").read_bytes()
    (folder / "evo2_7b.pt").unlink()
    third = len(data) // 3
    for number, piece in enumerate((data[:third], data[third : 2 * third], data[2 * third :])):
        (folder / f"evo2_7b.pt.part{number}").write_bytes(piece)
    ids = expected("evo2")["input_ids"]
    whole = logits_of(load_checkpoint(golden("evo2")), ids)
    assert torch.equal(logits_of(load_checkpoint(folder), ids), whole)
    assert torch.equal(logits_of(load_checkpoint(folder / "evo2_7b.pt.part1"), ids), whole)


def test_a_published_evo2_file_needs_no_configuration(tmp_path):
    folder = copy_of("evo2", tmp_path)
    (folder / "config.json").unlink()
    model = load_checkpoint(folder)
    ids, config = expected("evo2")["input_ids"], model.config
    assert torch.equal(logits_of(model, ids), logits_of(load_checkpoint(golden("evo2")), ids))
    assert config.rope_parameters == {"rope_type": "linear", "factor": 128.0, "rope_theta": 10000.0}
    assert config.max_position_embeddings == 1048576
    assert config.hidden_act == ["gelu", *["linear"] * 5]


def test_fp8_models_load_with_a_loud_note(tmp_path, caplog):
    folder = copy_of("evo2", tmp_path)
    (folder / "evo2_7b.pt").rename(folder / "evo2_40b.pt")
    with caplog.at_level("WARNING"):
        load_checkpoint(folder)
    assert "FP8" in caplog.text


def test_a_repository_of_the_hub_is_read_from_the_local_cache(tmp_path, monkeypatch):
    commit = "0123456789012345678901234567890123456789"
    repo = tmp_path / "models--LongSafari--hyenadna-tiny"
    shutil.copytree(golden("longsafari-hf"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load_checkpoint("LongSafari/hyenadna-tiny")
    ids = expected("longsafari-hf")["input_ids"]
    assert torch.equal(logits_of(model, ids), logits_of(load_checkpoint(golden("longsafari-hf")), ids))
    assert torch.equal(
        logits_of(load_checkpoint("LongSafari/hyenadna-tiny", revision=commit), ids), logits_of(model, ids)
    )


@pytest.mark.parametrize("layout", ["longsafari-hf", "longsafari-seqlen"])
def test_a_dna_model_goes_back_into_the_published_layout_and_is_the_same(layout, tmp_path):
    model = load_checkpoint(golden(layout))
    export_checkpoint(model, tmp_path / "out", "longsafari-hf")
    published = load_file(golden("longsafari-hf") / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: value.shape for key, value in written.items()} == {key: v.shape for key, v in published.items()}
    if layout == "longsafari-hf":
        for key, value in written.items():
            torch.testing.assert_close(value, published[key], rtol=0, atol=1e-6, msg=key)
    ids = expected(layout)["input_ids"]
    assert detect_layout(tmp_path / "out") == "longsafari-hf"
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "out"), ids), logits_of(model, ids))


@pytest.mark.parametrize("layout", ["stripedhyena", "evo1"])
def test_a_striped_model_goes_back_into_the_published_layout(layout, tmp_path):
    model = load_checkpoint(golden(layout)).float()
    export_checkpoint(model, tmp_path / "out", "stripedhyena")
    published = {}
    for file in golden(layout).glob("*.safetensors"):
        published |= load_file(file)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(published) == set(written)
    for key, value in written.items():
        if "poles" in key or "residues" in key:  # one of a conjugate pair serves
            value, theirs = value.clone(), published[key].clone()
            flipped = theirs[..., 1] < 0 if "poles" in key else published[key.replace("residues", "poles")][..., 1] < 0
            theirs[..., 1] = torch.where(flipped, -theirs[..., 1], theirs[..., 1])
            torch.testing.assert_close(value, theirs, rtol=2e-6, atol=2e-6, msg=key)
        else:
            rounding = 2**-8 if "inv_freq" in key else 1e-5  # published in bfloat16, and computed anew by who reads it
            torch.testing.assert_close(value.float(), published[key].float(), rtol=rounding, atol=2e-6, msg=key)
    ids = expected(layout)["input_ids"]
    torch.testing.assert_close(
        logits_of(load_checkpoint(tmp_path / "out", "stripedhyena"), ids), logits_of(model, ids), rtol=1e-5, atol=1e-5
    )


def test_filters_of_different_sizes_are_filled_up_on_the_way_out(tmp_path):
    torch.manual_seed(0)
    config = HyenaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=24, filter_types=["modal"] * 2,
        state_size=[4, 7], num_poles=[3, 5], norm_type="rms_norm_outer_eps", gated_mlp=True, mlp_bias=False,
        hidden_act="silu", use_bias=False, num_attention_heads=2,
    )  # fmt: skip
    model = HyenaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.filter.angle[:, 1::2, 0] = 0.0
            layer.mixer.filter.residue_re.normal_()
            layer.mixer.filter.direct.normal_()
    export_checkpoint(model, tmp_path / "out", "stripedhyena")
    ids = torch.randint(0, 32, (2, 50))
    back = load_checkpoint(tmp_path / "out", "stripedhyena")
    torch.testing.assert_close(logits_of(back, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5)


def test_a_conversion_in_shards_is_the_conversion_in_one_file(tmp_path, monkeypatch):
    convert_checkpoint(golden("evo1"), tmp_path / "one")
    monkeypatch.setattr(writing, "SHARD_BYTES", 30_000)
    convert_checkpoint(golden("evo1"), tmp_path / "many")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {key: value for file in shards for key, value in load_file(tmp_path / "many" / file).items()}
    assert set(one) == set(many)
    assert all(torch.equal(one[key], many[key]) for key in one)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model.num_parameters() == load_checkpoint(golden("evo1")).num_parameters()


PUBLISHED_COUNTS = {  # layers, width, MLP, order, features, vocabulary, published millions
    "hyenadna-tiny-1k-seqlen": ((2, 128, 512, 2, 5, 16), 0.436),
    "hyenadna-tiny-1k-seqlen-d256": ((2, 256, 1024, 2, 5, 16), 1.641),
    "hyenadna-tiny-16k-seqlen-d128": ((2, 128, 512, 2, 5, 16), 0.436),
    "hyenadna-small-32k-seqlen": ((4, 256, 1024, 2, 5, 16), 3.278),
    "hyenadna-medium-160k-seqlen": ((8, 256, 1024, 2, 5, 16), 6.551),
    "hyenadna-medium-450k-seqlen": ((8, 256, 1024, 2, 5, 16), 6.551),
    "hyenadna-large-1m-seqlen": ((8, 256, 1024, 2, 5, 16), 6.551),
    "hyena-small-150b-tok": ((18, 864, 1728, 2, 33, 50264), 152.5),
    "125M, order 2": ((12, 768, 3072, 2, 33, 50264), 124.5),
    "125M, order 3": ((12, 768, 3072, 3, 33, 50264), 132.2),
    "125M slim, order 2": ((18, 768, 1536, 2, 33, 50264), 124.9),
    "125M slim, order 3": ((18, 768, 1536, 3, 33, 50264), 136.5),
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    (layers, width, inner, order, features, vocabulary), published = PUBLISHED_COUNTS[name]
    config = HyenaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, order=order,
        filter_num_bands=(features - 1) // 2,
    )  # fmt: skip
    with torch.device("meta"):
        count = HyenaForCausalLM(config).num_parameters()
    assert round(count / 1e6, 3 if published < 100 else 1) == published
