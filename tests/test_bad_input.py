"""What cannot work is refused at the door, with the numbers and a remedy; nothing is computed from it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
)

from hyena_hf import HyenaModel
from tests.models import config_of, model_of, new_model, tokens


def embeds(*shape):
    return torch.zeros(*shape, 32, dtype=torch.float64)


IDS = tokens(2, 6)
ONES = torch.ones(2, 6, dtype=torch.long)

CALLS = {
    "neither ids nor embeddings": ({}, ValueError, "exactly one of them; got neither"),
    "both ids and embeddings": ({"input_ids": IDS, "inputs_embeds": embeds(2, 6)}, ValueError, "got both"),
    "an empty batch": ({"input_ids": IDS[:0]}, ValueError, "batch 0, length 6"),
    "no tokens": ({"input_ids": IDS[:, :0]}, ValueError, "batch 2, length 0"),
    "no embeddings": ({"inputs_embeds": embeds(2, 0)}, ValueError, "batch 2, length 0"),
    "ids of one dimension": ({"input_ids": IDS[0]}, ValueError, r"\(batch, length\), got \(6,\)"),
    "embeddings of two dimensions": (
        {"inputs_embeds": embeds(2)},
        ValueError,
        r"\(batch, length, 32\), got \(2, 32\)",
    ),
    "embeddings of another width": ({"inputs_embeds": embeds(2, 6)[..., :31]}, ValueError, r"\(batch, length, 32\)"),
    "ids that are fractions": ({"input_ids": IDS / 2}, TypeError, r"integers \(int64 or int32\), got torch.float32"),
    "an id above the vocabulary": ({"input_ids": IDS + 97}, ValueError, "outside the vocabulary of 97"),
    "a negative id": ({"input_ids": IDS - 97}, ValueError, "outside the vocabulary of 97"),
    "a mask of another length": ({"input_ids": IDS, "attention_mask": ONES[:, :5]}, ValueError, r"\(2, 5\).*\(2, 6\)"),
    "a mask of another batch": ({"input_ids": IDS, "attention_mask": ONES[:1]}, ValueError, r"\(1, 6\).*\(2, 6\)"),
    "a mask of four dimensions": (
        {"input_ids": IDS, "attention_mask": ONES[:, None, None]},
        ValueError,
        r"2-D.*got \(2, 1, 1, 6\)",
    ),
    "labels above the vocabulary": ({"input_ids": IDS, "labels": IDS + 97}, ValueError, "labels.*vocabulary of 97"),
    "negative labels": ({"input_ids": IDS, "labels": torch.full_like(IDS, -1)}, ValueError, "labels hold -1.*-100"),
    "labels of another shape": ({"input_ids": IDS, "labels": IDS[:, :5]}, ValueError, r"\(2, 5\).*\(2, 6\)"),
    "positions of another shape": (
        {"input_ids": IDS, "position_ids": IDS[:, :5]},
        ValueError,
        r"\(2, 6\), got \(2, 5\)",
    ),
    "seq_idx of another shape": ({"input_ids": IDS, "seq_idx": ONES[:, :5]}, ValueError, r"\(2, 6\).*got \(2, 5\)"),
    "seq_idx that goes back": (
        {"input_ids": IDS, "seq_idx": torch.tensor([[0, 0, 1, 1, 0, 0]] * 2)},
        ValueError,
        "decreases",
    ),
    "ends of documents beyond the batch": (
        {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5, 13])},
        ValueError,
        r"from 0 to the number of tokens \(12\)",
    ),
    "ids in eight bits": ({"input_ids": IDS.to(torch.int8)}, TypeError, "got torch.int8"),
    "ids in a list": ({"input_ids": IDS.tolist()}, TypeError, "tensors, got list"),
    "an additive mask": (
        {"input_ids": IDS, "attention_mask": torch.zeros(2, 6).fill_(-1e9)},
        ValueError,
        "1 .or True. for real",
    ),
    "a mask of halves": ({"input_ids": IDS, "attention_mask": ONES / 2}, ValueError, "1 .or True. for real"),
    "labels that are fractions": ({"input_ids": IDS, "labels": IDS / 2}, TypeError, "labels must be whole numbers"),
    "labels for some of the positions": (
        {"input_ids": IDS, "labels": IDS, "logits_to_keep": 3},
        ValueError,
        "leave logits_to_keep out",
    ),
    "fewer than no logits": ({"input_ids": IDS, "logits_to_keep": -3}, ValueError, "got -3"),
    "positions that are fractions": (
        {"input_ids": IDS, "position_ids": torch.arange(6).expand(2, -1) / 2},
        TypeError,
        "position_ids must be a tensor of whole numbers",
    ),
    "seq_idx that says yes or no": ({"input_ids": IDS, "seq_idx": ONES.bool()}, TypeError, "seq_idx must be a tensor"),
    "ends that are fractions": (
        {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5.5, 12])},
        TypeError,
        "cu_seq_lens_q must be a tensor of whole numbers",
    ),
    "a tuple as a cache": ({"input_ids": IDS, "past_key_values": ((), ())}, TypeError, "tuple; use DynamicCache"),
}


@pytest.mark.parametrize("what", CALLS)
def test_the_model_refuses(what):
    kwargs, error, message = CALLS[what]
    with pytest.raises(error, match=message):
        model_of("hybrid")(**kwargs)


# caches


def filled(name="order 2", dtype=torch.float64, batch=2):
    model = model_of(name, dtype)
    return model(tokens(batch, 6), use_cache=True).past_key_values


def test_a_cache_of_another_model_is_refused():
    twin = new_model("order 2", torch.float64)
    with pytest.raises(ValueError, match="filled by another model"):
        twin(IDS, past_key_values=filled())
    with pytest.raises(ValueError, match="3 layers but the model 2"):
        new_model(num_hidden_layers=2)(IDS, past_key_values=filled())


def test_a_cache_that_gpt2_filled_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0))
    foreign = gpt2(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled by another model"):
        model_of("order 2")(IDS, past_key_values=foreign)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_of_another_batch_size_is_refused(batch):
    with pytest.raises(ValueError, match=f"holds 2 sequences but the batch has {batch}"):
        model_of("order 2")(tokens(batch, 1), past_key_values=filled())


@pytest.mark.parametrize("name", ["order 2", "heads", "hybrid"])
def test_a_cache_of_another_dtype_is_refused(name):
    model = new_model(name)
    past = model(IDS).past_key_values
    with pytest.raises(ValueError, match=r"torch.float32.*torch.float64.*empty cache"):
        model.double()(IDS, past_key_values=past)


def test_a_refused_call_leaves_the_cache_as_it_was():
    model, past = model_of("hybrid"), filled("hybrid")
    for kwargs, error, _ in CALLS.values():
        if "past_key_values" not in kwargs and "input_ids" in kwargs:
            with pytest.raises(error):
                model(**kwargs, past_key_values=past)
    assert past.get_seq_length() == 6
    got = model(tokens(2, 1), past_key_values=past).logits
    whole = model(torch.cat([tokens(2, 6), tokens(2, 1)], dim=1)).logits[:, -1:]
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[9], [6, 3], [8, 1]])
def test_a_static_cache_does_not_overflow(sizes):
    model = model_of("hybrid")
    past = StaticCache(config=model.config, max_cache_len=8)
    for size in sizes[:-1]:
        model(tokens(1, size), past_key_values=past)
    with pytest.raises(ValueError, match=rf"holds 8 tokens, but {sum(sizes[:-1])} \+ {sizes[-1]}"):
        model(tokens(1, sizes[-1]), past_key_values=past)


@pytest.mark.parametrize(
    "description",
    [
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6, 12])},
    ],
)
def test_packed_documents_with_a_cache_are_refused(description):
    model = model_of("order 2")
    with pytest.raises(ValueError, match="packed documents cannot share a cache"):
        model(IDS, past_key_values=DynamicCache(config=model.config), **description)


COUNTED = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])}
POSITIONS = {
    "columns across a hole": (COUNTED, torch.arange(6)),
    "a restart inside a sequence": ({"attention_mask": ONES}, torch.tensor([0, 1, 2, 0, 1, 2])),
    "a restart with a cache": ({"past_key_values": True}, torch.tensor([0, 1, 2, 0, 1, 2])),
    "a step inside a document": (
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]]), "attention_mask": ONES},
        torch.tensor([0, 1, 3, 0, 1, 2]),
    ),
}


@pytest.mark.parametrize("what", POSITIONS)
def test_positions_that_contradict_the_mask_the_cache_or_the_documents_are_refused(what):
    model, (kwargs, positions) = model_of("hybrid"), POSITIONS[what]
    if "past_key_values" in kwargs:
        kwargs = {"past_key_values": DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match=r"position_ids contradict.*leave position_ids out"):
        model(IDS, position_ids=positions.expand(2, -1), **kwargs)


def test_positions_of_padded_rows_may_begin_anywhere_but_a_cache_wants_them_counted():
    model, mask = model_of("hybrid"), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    columns, truth = torch.arange(6).expand(2, -1), model(IDS, attention_mask=mask).logits
    logits = model(IDS, attention_mask=mask, position_ids=columns).logits
    torch.testing.assert_close(logits[mask.bool()], truth[mask.bool()], rtol=0, atol=1e-12)  # only differences count
    past = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="row 0 the position 2 in column 2"):
        model(IDS, attention_mask=mask, position_ids=columns, past_key_values=past)


@pytest.mark.parametrize("masked", [True, False])
def test_positions_that_do_not_go_on_from_the_cache_are_refused(masked):
    model, past = model_of("hybrid"), DynamicCache(config=model_of("hybrid").config)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :2] = 0 if masked else 1
    truth = model(torch.cat([IDS, IDS[:, :2]], dim=1), attention_mask=mask, use_cache=False).logits[:, 6:]
    model(IDS, attention_mask=mask[:, :6], past_key_values=past)
    wrong = torch.tensor([[6, 7], [6, 7]] if masked else [[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="position_ids contradict"):
        model(IDS[:, :2], attention_mask=mask, position_ids=wrong, past_key_values=past)
    right = mask.cumsum(1)[:, 6:] - 1
    got = model(IDS[:, :2], attention_mask=mask, position_ids=right, past_key_values=past).logits
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


def test_positions_that_begin_elsewhere_make_no_cache():
    model = model_of("hybrid")
    assert model(IDS, position_ids=torch.arange(6)[None]).past_key_values is not None
    assert model(IDS, position_ids=torch.arange(10, 16)[None]).past_key_values is None


def test_a_model_that_changed_its_dtype_leaves_a_cache_of_the_old_one_as_it_was():
    model = new_model("hybrid")
    past = model(IDS).past_key_values
    model.bfloat16()
    with pytest.raises(ValueError, match=r"filled in torch.float32.*torch.bfloat16.*empty"):
        model(IDS[:, :1], past_key_values=past)
    assert past.get_seq_length() == 6
    assert {history.used for history in past.layers[0].histories[1:]} == {6}


def test_a_config_that_was_changed_into_an_impossible_one_is_refused_by_the_model(tmp_path):
    new_model("order 2").save_pretrained(tmp_path)
    for changes, message in (
        ({"num_hidden_layers": 4}, "entries for num_hidden_layers"),
        ({"order": 0}, "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            HyenaModel.from_pretrained(tmp_path, **changes)
    with pytest.raises(TypeError, match="takes a HyenaConfig, got GPT2Config"):
        HyenaModel(GPT2Config())


def test_a_mask_that_leaves_the_past_out_is_refused():
    with pytest.raises(ValueError, match="6 cached and 1 new tokens"):
        model_of("order 2")(tokens(2, 1), attention_mask=ONES[:, :1], past_key_values=filled())


def test_a_crop_beyond_what_is_pending_is_refused():
    model, past = model_of("hybrid"), filled("hybrid")
    with pytest.raises(ValueError, match=r"crop\(-1\).*activate_past_recording"):
        past.crop(-1)
    past.activate_past_recording()
    model(tokens(2, 3), past_key_values=past)
    with pytest.raises(ValueError, match=r"crop\(-4\) reaches beyond"):
        past.crop(-4)
    with pytest.raises(ValueError, match="negative number"):
        past.layers[0].crop(2)
    past.crop(-3)
    assert past.get_seq_length() == 6


def test_a_static_cache_cannot_record():
    model = model_of("order 2")
    past = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="static cache cannot be rolled back"):
        past.activate_past_recording()


def test_gradient_checkpointing_with_a_cache_is_refused():
    model = new_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(IDS, past_key_values=DynamicCache(config=model.config))


# lengths

TOO_LONG = [
    ({"beyond_trained_length": "refuse"}, "beyond_trained_length is 'refuse'"),
    ({"trainable_positional_features": True}, "trained table"),
    ({"beyond_trained_length": "refuse", "filter_types": ["explicit"] * 3}, "beyond_trained_length is 'refuse'"),
]


@pytest.mark.parametrize(("changes", "reason"), TOO_LONG)
def test_sequences_beyond_the_trained_length_are_refused_where_the_config_says_so(changes, reason):
    model = new_model(max_position_embeddings=8, **changes)
    model(tokens(1, 8))
    with pytest.raises(ValueError, match=rf"9 tokens exceeds max_position_embeddings \(8\), and .*{reason}"):
        model(tokens(1, 9))
    past = model(tokens(1, 8)).past_key_values
    with pytest.raises(ValueError, match="9 tokens exceeds"):
        model(tokens(1, 1), past_key_values=past)
    with pytest.raises(ValueError, match="tokens exceeds"):
        model.generate(tokens(1, 4), max_new_tokens=6, pad_token_id=0)
    assert model.generate(tokens(1, 4), max_new_tokens=5, pad_token_id=0).shape == (1, 9)


def test_padding_and_packing_do_not_count_as_length():
    model = new_model(max_position_embeddings=8, beyond_trained_length="refuse")
    mask = torch.zeros(1, 12, dtype=torch.long)
    mask[:, 4:] = 1
    assert model(tokens(1, 12), attention_mask=mask).logits.isfinite().all()
    documents = torch.arange(24)[None] // 8
    assert model(tokens(1, 24), seq_idx=documents).logits.isfinite().all()


# checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    new_model("hybrid").save_pretrained(folder)
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of a checkpoint, to be broken."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def refused(folder, message="corrupt or truncated", load=AutoModelForCausalLM):
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 5, 0.1, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(broken, kept):
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(broken)


def test_a_checkpoint_of_garbage_is_refused(broken):
    weights = broken / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (weights.stat().st_size,), dtype=torch.uint8, generator=generator)
    weights.write_bytes(noise.numpy().tobytes())
    refused(broken)


def test_a_checkpoint_with_a_damaged_header_is_refused(broken):
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[40:60] = bytes(20)
    weights.write_bytes(content)
    refused(broken)


def edit_tensors(folder, edit):
    """Rewrite the weights of a checkpoint after edit(tensors)."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "missing",
    ["model.layers.0.mixer.skip", "model.layers.0.mixer.filter.decay_rates", "model.norm.bias"],
)
@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(broken, missing, load):
    edit_tensors(broken, lambda tensors: tensors.pop(missing))
    name = missing if load is AutoModelForCausalLM else missing.removeprefix("model.")
    refused(broken, f"1 tensors are missing.*{name}", load)


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel])
def test_a_checkpoint_with_a_tensor_too_many_is_refused(broken, load):
    edit_tensors(broken, lambda tensors: tensors.update({"model.layers.0.mixer.gate.weight": torch.ones(2)}))
    refused(broken, "1 do not belong.*gate", load)


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(broken):
    edit_tensors(broken, lambda tensors: tensors.update({"model.norm.bias": torch.ones(31)}))
    for kind in (ValueError, RuntimeError):  # ours, and transformers' own; its report above them names the tensors
        with pytest.raises(kind, match="holds tensors of other shapes"):
            AutoModelForCausalLM.from_pretrained(broken)


def test_weights_of_another_config_are_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "layer_types": ["hyena"] * 3}))
    refused(broken, "check that config.json and the weights come from the same model")


def test_weights_of_another_architecture_are_refused(broken):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    gpt2.save_pretrained(broken.parent / "gpt2")
    shutil.copy(broken.parent / "gpt2" / "model.safetensors", broken)
    refused(broken, "no complete checkpoint of this HyenaForCausalLM")


def test_a_shard_that_is_missing_or_cut_is_refused(tmp_path):
    new_model().save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match="model-"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_weights_is_refused(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_what_was_missing_and_unexpected_is_told_on_request(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert type(model).__name__ == "HyenaForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_whoever_asks_for_the_loading_info_gets_it_instead_of_the_error(broken):
    edit_tensors(broken, lambda tensors: tensors.pop("model.norm.weight"))
    _, info = AutoModelForCausalLM.from_pretrained(broken, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.norm.weight"}


def test_a_rotary_type_that_was_set_behind_the_config_is_refused():
    config = config_of("hybrid")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type 'dynamic'; choose one of"):
        AutoModelForCausalLM.from_config(config)
