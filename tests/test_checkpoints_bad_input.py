"""Published weights that are incomplete, damaged or dangerous: refused with the reason, nothing run or written."""

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
from collections import defaultdict, deque
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.checkpoints import convert_checkpoint, export_checkpoint, load_checkpoint
from hyena_hf.cli.main import main
from tests.models import new_model
from tests.test_checkpoints import copy_of, expected, golden, logits_of


class Attack:
    """Unpickling it with a real unpickler would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_is_refused_and_nothing_is_run(tmp_path):
    folder, proof = copy_of("longsafari-seqlen", tmp_path), tmp_path / "proof"
    stored = torch.load(folder / "weights.ckpt", weights_only=True)  # noqa: TID251 (a file of ours)
    torch.save({**stored, "hyper_parameters": Attack(proof)}, folder / "weights.ckpt")
    with pytest.raises(ValueError, match=r"system.*nothing was run"):
        load_checkpoint(folder)
    assert not proof.exists()
    torch.load(folder / "weights.ckpt", weights_only=False)  # noqa: TID251 (the attack is one)
    assert proof.exists()


class Call:
    """Unpickling it with a real unpickler would call a function."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("1 + 1",)


@pytest.mark.parametrize("function", [eval, exec, getattr, compile, subprocess.Popen, torch.save, __import__])
def test_functions_named_by_a_pickle_are_refused(function, tmp_path):
    folder = copy_of("longsafari-seqlen", tmp_path)
    stored = torch.load(folder / "weights.ckpt", weights_only=True)  # noqa: TID251 (a file of ours)
    torch.save({**stored, "hyper_parameters": Call(function)}, folder / "weights.ckpt")
    with pytest.raises(ValueError, match=rf"{function.__name__}.*nothing was run"):
        load_checkpoint(folder)


def test_settings_beside_the_weights_become_placeholders(tmp_path, monkeypatch):
    folder = copy_of("longsafari-seqlen", tmp_path)
    truth = logits_of(load_checkpoint(folder), expected("longsafari-seqlen")["input_ids"])
    stored = torch.load(folder / "weights.ckpt", weights_only=True)  # noqa: TID251 (a file of ours)
    calls = []

    # a class that pickles like those of OmegaConf: by name, with a state
    node = type("DictConfig", (), {"__module__": "omegaconf.dictconfig", "__setstate__": lambda *_: calls.append(1)})
    module = type(argparse)("omegaconf.dictconfig")
    module.DictConfig = node
    monkeypatch.setitem(__import__("sys").modules, "omegaconf", type(argparse)("omegaconf"))
    monkeypatch.setitem(__import__("sys").modules, "omegaconf.dictconfig", module)
    value = node()
    value.content = {"a": [1, 2]}
    settings = {"config": value, "space": argparse.Namespace(a=1), "table": defaultdict(int, a=1), "path": Path("a")}
    settings |= {"queue": deque([1, 2]), Path("key"): 1, "names": {Path("b")}}
    torch.save({**stored, "hyper_parameters": settings, "bytes": io.BytesIO(b"abc")}, folder / "weights.ckpt")
    assert torch.equal(logits_of(load_checkpoint(folder), expected("longsafari-seqlen")["input_ids"]), truth)
    assert not calls


def test_a_plain_pickle_is_no_torch_file(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"weight": Attack(proof)}))
    with pytest.raises(ValueError, match=r"model\.pt"):
        load_checkpoint(tmp_path / "model.pt")
    assert not proof.exists()


def test_a_torch_file_of_the_old_form_is_read(tmp_path):
    folder = copy_of("longsafari-seqlen", tmp_path)
    stored = torch.load(folder / "weights.ckpt", weights_only=True)  # noqa: TID251 (a file of ours)
    torch.save(stored, folder / "weights.ckpt", _use_new_zipfile_serialization=False)
    ids = expected("longsafari-seqlen")["input_ids"]
    assert torch.equal(
        logits_of(load_checkpoint(folder), ids), logits_of(load_checkpoint(golden("longsafari-seqlen")), ids)
    )


def test_an_unknown_layout_says_what_was_found_and_what_is_known(tmp_path):
    save_file({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"transformer\.h\.0.*gpt2.*safari-lm, longsafari-seqlen"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"layout 'evo3' is not known; choose from safari-lm"):
        load_checkpoint(golden("evo1"), layout="evo3")


def test_the_wrong_layout_for_a_file_is_refused():
    with pytest.raises(ValueError, match=r"backbone.layers"):
        load_checkpoint(golden("evo1"), layout="safari-lm")
    with pytest.raises(ValueError, match=r"embedding_layer.weight"):
        load_checkpoint(golden("longsafari-hf"), layout="evo2")


def test_a_missing_shard_is_named(tmp_path):
    folder = copy_of("evo1", tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"3 shards, of which 1 are missing.*model-00002-of-00003"):
        load_checkpoint(folder)


def test_a_missing_part_is_named(tmp_path):
    folder = copy_of("evo2", tmp_path)
    data = (folder / "evo2_7b.pt").read_bytes()
    (folder / "evo2_7b.pt").unlink()
    for number, piece in {0: data[:100], 2: data[100:]}.items():
        (folder / f"evo2_7b.pt.part{number}").write_bytes(piece)
    with pytest.raises(ValueError, match=r"evo2_7b.pt was cut into parts, of which part1 is missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("layout", "file"),
    [("longsafari-hf", "model.safetensors"), ("longsafari-seqlen", "weights.ckpt"), ("evo2", "evo2_7b.pt")],
)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(layout, file, share, tmp_path):
    folder = copy_of(layout, tmp_path)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=rf"{file}.*truncated"):
        load_checkpoint(folder)


def test_tensors_of_the_wrong_shape_are_named(tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    key = "hyena.backbone.layers.1.mixer.out_proj.weight"
    save_file({**state, key: torch.ones(16, 15)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mixer.out_proj.weight has shape \(16, 15\).*\(16, 16\)"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 32}, "says d_model=32, but its weights 16"),
        ({"n_layer": 3}, "says n_layer=3, but its weights 2"),
        ({"max_seq_len": 1026}, "says max_seq_len=1026, but its weights 130"),
    ],
)
def test_a_configuration_of_another_model_is_refused(changes, message, tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_options_that_published_checkpoints_do_not_have_are_refused(tmp_path):
    folder = copy_of("evo1", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hyena_filter_groups": 4}))
    with pytest.raises(ValueError, match=r"hyena_filter_groups=4.*expected 1"):
        load_checkpoint(folder)


@pytest.mark.parametrize("change", ["missing", "foreign"])
def test_missing_and_foreign_tensors_are_named(change, tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        del state["hyena.backbone.layers.0.norm1.bias"]
    else:
        state["hyena.backbone.layers.0.attention.weight"] = torch.ones(1)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="norm" if change == "missing" else "attention.weight"):
        load_checkpoint(folder)


def test_whether_filters_are_modulated_is_not_guessed(tmp_path):
    folder = copy_of("safari-lm", tmp_path)
    (folder / "model_config.json").unlink()
    with pytest.raises(ValueError, match="modulated stands in no weight"):
        load_checkpoint(folder)


def test_a_rotary_base_that_is_not_the_files_is_refused(tmp_path):
    folder = copy_of("evo2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rotary_emb_base": 1000000}))
    with pytest.raises(ValueError, match=r"rotary frequencies of base 1e\+06"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no file, no folder and no repository"),
        ("a/b/c", "no file, no folder and no repository"),
        ("./empty", "no file, no folder"),
    ],
)
def test_a_path_to_nothing_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_folders_without_weights_or_with_several_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no weights \(notes.txt\)"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no file of weights"):
        load_checkpoint(tmp_path / "notes.txt")
    for name in ("a.ckpt", "b.ckpt"):
        shutil.copy(golden("longsafari-seqlen") / "weights.ckpt", tmp_path / name)
    with pytest.raises(ValueError, match=r"several files of weights \(a.ckpt, b.ckpt\); name one"):
        load_checkpoint(tmp_path)


def test_a_revision_of_a_folder_is_refused():
    with pytest.raises(ValueError, match="revision"):
        load_checkpoint(golden("evo1"), revision="main")


def test_a_repository_that_cannot_be_fetched_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing .*could not be fetched"):
        load_checkpoint("nobody/nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 8, "proj_groups": 2}, "rotary frequencies, but num_attention_heads=8"),
        ({"hidden_size": 64}, "says hidden_size=64, but its weights 32"),
        ({"num_layers": 9}, "says num_layers=9, but its weights 4"),
        ({"attn_layer_idxs": [0]}, r"says attn_layer_idxs=\[0\], but its weights"),
        ({"vocab_size": 97}, "vocab_size=97, but its embedding has 96 rows"),
    ],
)
def test_a_configuration_of_another_striped_model_is_refused(changes, message, tmp_path):
    folder = copy_of("stripedhyena", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("field", ["learned_positions", "type_vocab_size"])
def test_parts_of_other_models_are_not_dropped_on_the_way_out(field, tmp_path):
    stored = load_checkpoint(golden("longsafari-hf")).config.to_dict()
    model = HyenaForCausalLM(HyenaConfig.from_dict({**stored, field: True if field == "learned_positions" else 2}))
    with pytest.raises(ValueError, match=field):
        export_checkpoint(model, tmp_path / "out", "longsafari-hf")


def test_adapters_that_are_not_merged_are_not_dropped_on_the_way_out(tmp_path):
    model = load_checkpoint(golden("longsafari-hf"))
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(TypeError, match="merge_and_unload"):
        export_checkpoint(tuned, tmp_path / "out", "longsafari-hf")
    with pytest.raises(ValueError, match="merge_and_unload"):
        export_checkpoint(tuned.get_base_model(), tmp_path / "out", "longsafari-hf")


def test_an_interrupted_end_of_a_conversion_leaves_nothing(tmp_path, monkeypatch):
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "config.json":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(golden("longsafari-hf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_this_package_is_pointed_to_its_own_loader(tmp_path):
    load_checkpoint(golden("longsafari-hf")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        load_checkpoint(tmp_path)


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for write in (
        convert_checkpoint,
        lambda source, out: export_checkpoint(load_checkpoint(source), out, "longsafari-hf"),
    ):
        with pytest.raises(ValueError, match=r"not empty \(it holds mine.txt\)"):
            write(golden("longsafari-hf"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    folder = copy_of("longsafari-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    key = "hyena.backbone.layers.1.mixer.out_proj.weight"
    save_file({**state, key: torch.ones(16, 15)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has shape"):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_conversion_has_left_is_replaced(tmp_path):
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    (tmp_path / "out" / ".unfinished" / "shard-0").write_text("half")
    convert_checkpoint(golden("longsafari-hf"), tmp_path / "out")
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_a_model_that_a_layout_cannot_say_is_refused_field_by_field(tmp_path):
    with pytest.raises(ValueError, match=r"order=3 \(must be 2\)"):
        export_checkpoint(new_model("order 3"), tmp_path / "out", "longsafari-hf")
    with pytest.raises(ValueError, match=r"gated_mlp=False \(must be True\)"):
        export_checkpoint(new_model("modal"), tmp_path / "out", "stripedhyena")
    with pytest.raises(ValueError, match="cannot be written; choose from longsafari-hf, stripedhyena"):
        export_checkpoint(new_model(), tmp_path / "out", "evo2")
    assert not (tmp_path / "out").exists()


def test_the_command_converts_both_ways_and_says_what_is_wrong(tmp_path, capsys):
    main(["convert", str(golden("longsafari-hf")), str(tmp_path / "ours")])
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "longsafari-hf"])
    assert "longsafari-hf: written to" in capsys.readouterr().out
    ids = expected("longsafari-hf")["input_ids"]
    assert torch.equal(
        logits_of(load_checkpoint(tmp_path / "back"), ids), logits_of(load_checkpoint(golden("longsafari-hf")), ids)
    )
    with pytest.raises(SystemExit, match=r"hyena convert: .*no file, no folder"):
        main(["convert", "nowhere", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match=r"hyena convert: .*is not empty"):
        main(["convert", str(golden("longsafari-hf")), str(tmp_path / "ours")])
