# SPDX-License-Identifier: Apache-2.0
"""Attention transfer trains feature maps towards full softmax attention, a layer at a time, and says how far."""

import copy
import math

import pytest
import torch

from hyena_hf.linear_attention import attention_mode, attention_transfer, convert_attention, transfer
from hyena_hf.linear_attention.modes import linear_attentions
from hyena_hf.linear_attention.transfer import measure_branches, measure_layers
from hyena_hf.ops.linear_attention import linear_attention_weights
from tests import oracles
from tests.models import tokens
from tests.test_convert_attention import CAUSAL, converted, stock


LOSSES = ("weights", "outputs", "both")


def batches(count: int = 4, length: int = 24) -> list[torch.Tensor]:
    return [tokens(2, length) for _ in range(count)]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_softmax_mode_is_the_teacher(family, padded):
    model, teacher, ids = converted(family, "window"), stock(family), tokens(2, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 13:] = 0
    with attention_mode(model, "softmax"):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    truth = teacher(ids, attention_mask=mask, use_cache=False).logits
    scale = max(1, truth.abs().max().item())
    torch.testing.assert_close(logits[mask.bool()], truth[mask.bool()], rtol=0, atol=1e-9 * scale)


def test_the_branches_alone_are_a_window_and_linear_attention():
    model, ids = converted("llama", "window"), tokens(2, 20)
    q, k, v = (torch.randn(2, heads, 20, 8, dtype=torch.float64) for heads in (4, 2, 2))
    layer = linear_attentions(model)[0]
    with attention_mode(model, "window"):
        window = layer.replacement(layer, q, k, v, None)
        model(ids, use_cache=False)
    expected = oracles.attention(q.numpy(), k.numpy(), v.numpy(), window=6)
    torch.testing.assert_close(window, torch.from_numpy(expected), rtol=0, atol=1e-12)
    with attention_mode(model, "linear"):
        linear = layer.replacement(layer, q, k, v, None)
    weights = linear_attention_weights(*layer.features(q, k), log_features=True)
    torch.testing.assert_close(linear, weights @ v.repeat_interleave(2, dim=1), rtol=0, atol=1e-12)


def test_modes_end_with_their_block_and_take_no_cache():
    model, ids = converted("llama", "pure"), tokens(1, 9)
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError), attention_mode(model, "softmax"):
        raise ZeroDivisionError
    assert model(ids).logits.equal(before)
    with attention_mode(model, "softmax"), pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="no window"), attention_mode(model, "window"):
        pass
    with pytest.raises(ValueError, match="'soft'"), attention_mode(model, "soft"):
        pass
    with pytest.raises(ValueError, match="convert it first"), attention_mode(stock("llama"), "softmax"):
        pass


def test_the_fits_of_a_report_are_those_of_the_definitions():
    """KL, entropies and error from weights written out, for one layer and one batch with padding."""
    model, ids = converted("llama", "window"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    seen = {}

    def hook(_, arguments, keywords):
        seen["hidden"], seen["rotary"] = arguments[0] if arguments else keywords["hidden_states"], keywords

    module = model.model.layers[0].self_attn
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    fit = measure_layers(model, [{"input_ids": ids, "attention_mask": mask}])[0]
    handle.remove()
    layer, hidden = module.linear_attention, seen["hidden"]
    cos, sin = (x.numpy() for x in seen["rotary"]["position_embeddings"])
    totals, count = torch.zeros(5, dtype=torch.float64), 0
    errors, squares = 0.0, 0.0
    for row, length in ((0, 20), (1, 13)):
        x = hidden[row : row + 1, :length]
        q, k, v = (p(x).view(1, length, -1, 8).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        index = 0 if len(cos) == 1 else row
        q, k = (torch.from_numpy(oracles.rotate(y.numpy(), cos[index, :length], sin[index, :length])) for y in (q, k))
        keys = k.repeat_interleave(2, dim=1)
        hidden_keys = torch.ones(length, length, dtype=torch.bool).triu(1)
        p = (q @ keys.mT / 8**0.5).masked_fill(hidden_keys, -torch.inf).softmax(-1)
        ours = [
            linear_attention_weights(*layer.features(q, k), log_features=True, window=window)
            for window in (layer.softmax_window(q, k), None)
        ]
        kl = [torch.where(hidden_keys, 0, p * (p / w).log()).sum() for w in ours]
        entropies = [torch.where(hidden_keys, 0, -w * w.log()).sum() for w in (ours[0], p)]
        totals += torch.stack([*kl, torch.zeros((), dtype=torch.float64), *entropies])
        count += 4 * length
        values = v.repeat_interleave(2, dim=1)
        errors += (ours[0] @ values - p @ values).square().sum()
        squares += (p @ values).square().sum()
    expected = totals / count
    expected[2] = (errors / squares).sqrt()
    got = [fit.kl, fit.linear_kl, fit.output_error, fit.entropy, fit.teacher_entropy]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", ["pure", "window", "softmax maps, window", "some layers"])
def test_transfer_brings_every_layer_nearer_and_touches_nothing_else(loss, way):
    model = converted("llama", way).float()
    before = copy.deepcopy(model.state_dict())
    data = batches()
    untrained = measure_layers(model, data)
    report = attention_transfer(model, data, steps=40, loss=loss, learning_rate=3e-2, held_out=data)
    for old, new in zip(untrained, report.layers, strict=True):
        if loss != "outputs":
            assert new.linear_kl < 0.9 * old.linear_kl
        if loss != "weights":
            assert new.output_error < 0.9 * old.output_error
    for key, value in model.state_dict().items():
        assert value.equal(before[key]) != (".linear_attention." in key), key
    assert len(report.losses[0]) == report.steps == 40
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert str(report).count("\n") >= 3


def test_layers_are_trained_from_the_teachers_inputs():
    """A layer learns the same beside another converted layer as alone: its inputs are those of the teacher."""
    data, maps = batches(), []
    for layers in ([2], "all"):
        model = convert_attention(stock("llama").float(), layers=layers)
        attention_transfer(model, data, steps=5)
        maps.append(linear_attentions(model)[2].state_dict())
    for key, value in maps[0].items():
        torch.testing.assert_close(value, maps[1][key], rtol=0, atol=1e-5)


def test_the_branches_of_a_report_are_perplexities_of_the_modes():
    model, data = converted("gpt2", "window"), batches(2)
    found = measure_branches(model, data)
    assert set(found) == {"softmax", "converted", "window", "linear"}
    teacher = stock("gpt2")
    nll = [teacher(ids, labels=ids).loss for ids in data]
    assert found["softmax"] == pytest.approx(math.exp(sum(nll) / 2), rel=1e-5)
    nll = [model(ids, labels=ids).loss for ids in data]
    assert found["converted"] == pytest.approx(math.exp(sum(nll) / 2), rel=1e-5)


def test_attentions_are_measured_by_name():
    model, data = converted("gpt2", "pure"), batches(1)
    assert set(measure_branches(model, data, ["window", "linear"])) == {"linear"}  # it has no window
    with pytest.raises(ValueError, match="'windw'"):
        measure_branches(model, data, ["windw"])


def test_packed_documents_are_predicted_each_by_itself():
    model, ids = converted("llama", "window"), tokens(1, 12)
    packed = {"input_ids": ids, "position_ids": torch.arange(6).repeat(2).unsqueeze(0)}
    apart = measure_branches(model, [ids[:, :6], ids[:, 6:]])
    assert measure_branches(model, [packed]) == pytest.approx(apart, rel=1e-6)


def test_masked_tokens_teach_nothing():
    """Rows with other tokens behind the mask train the same maps."""
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, 15:] = 0
    maps = []
    for filler in (3, 50):
        model = convert_attention(stock("llama").float(), window=4)
        data = [{"input_ids": ids.masked_fill(mask == 0, filler), "attention_mask": mask}]
        attention_transfer(model, data, steps=3)
        maps.append(linear_attentions(model)[0].state_dict())
    for key, value in maps[0].items():
        assert value.equal(maps[1][key])


def test_bfloat16_models_keep_their_dtype_and_learn():
    model = convert_attention(stock("llama").bfloat16())
    report = attention_transfer(model, batches(), steps=20, learning_rate=3e-2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.losses[1][-1] < report.losses[1][0]


def test_a_transfer_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SAVE_EVERY", 3)
    data = batches(3)
    whole, stopped, resumed = (convert_attention(stock("llama").float(), window=4) for _ in range(3))
    report = attention_transfer(whole, data, steps=8, loss="both")

    def stop(step: int, _: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attention_transfer(stopped, data, steps=8, loss="both", work_dir=tmp_path, progress=stop)
    seen: list[int] = []
    again = attention_transfer(
        resumed, data, steps=8, loss="both", work_dir=tmp_path, progress=lambda step, _: seen.append(step)
    )
    assert seen == [4, 5, 6, 7, 8]  # step 3 was kept
    assert again.losses == report.losses
    for key, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[key]), key


def test_a_work_folder_belongs_to_one_transfer(tmp_path):
    model = convert_attention(stock("llama").float())
    attention_transfer(model, batches(), steps=2, work_dir=tmp_path)
    with pytest.raises(ValueError, match=r"another training \(differing: loss, model\)"):
        attention_transfer(model, batches(), steps=2, loss="both", work_dir=tmp_path)


def test_training_where_nothing_can_be_trained_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of it"):
        attention_transfer(converted("llama", "pure").float(), batches(), steps=1)


def test_autocast_does_not_lower_the_precision_of_what_a_report_measures():
    model = converted("llama", "window").float()
    expected = measure_layers(model, batches())
    with torch.autocast("cpu", torch.bfloat16):
        found = measure_layers(model, batches())
    # the first layer's inputs are those of projections in bfloat16, its weights are not
    assert found[0].teacher_entropy != pytest.approx(
        float(torch.tensor(found[0].teacher_entropy).bfloat16()), abs=1e-9
    )
    assert found[0].kl == pytest.approx(expected[0].kl, rel=0.05)


def test_batches_without_a_token_are_refused():
    ids = tokens(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match="step 1 has no token"):
        attention_transfer(convert_attention(stock("llama").float()), [batch], steps=1)


def test_what_cannot_be_trained_is_refused():
    model = converted("llama", "pure").float()
    fixed = convert_attention(stock("llama"), feature_map="elu")
    once = iter(batches(2))
    cases = [
        (model, batches(), {"loss": "mse"}, "'mse'"),
        (model, batches(), {"steps": 0}, "steps .0."),
        (model, batches(), {"learning_rate": 0.0}, "learning_rate"),
        (model, once, {}, "ended after 2 of 3"),
        (model, [], {}, "ended after 0"),
        (fixed, batches(), {}, "nothing to train"),
        (model, batches(), {"held_out": []}, "held_out needs batches"),
        (model, batches(), {"held_out": [tokens(2, 1)]}, "held_out needs batches"),
        (model, tokens(2, 9), {}, "shape .B, L."),
        (model, [{"input_ids": [[1, 2]]}], {}, "shape .B, L."),
        (stock("llama"), batches(), {}, "convert it first"),
    ]
    for given, data, options, message in cases:
        with pytest.raises(ValueError, match=message):
            attention_transfer(given, data, **{"steps": 3, **options})
    with pytest.raises(TypeError, match="input_ids"):
        attention_transfer(model, ["text"], steps=1)
    model.model.layers[0].self_attn.q_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="no finite number at step 1"):
        attention_transfer(model, batches(), steps=1)
