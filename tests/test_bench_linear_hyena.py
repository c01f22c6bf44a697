"""The experiment with Hyena in the place of attention: operators see no later tokens and are as they are defined."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks import bench_linear_hyena as bench
from hyena_hf.linear_attention.modes import softmax_log_weights
from hyena_hf.mixers.linear_attention import LinearAttention
from hyena_hf.ops.multihead import multihead_conv


LENGTH = bench.WINDOW + 26


def attention(heads=2):
    sizes = {"num_heads": heads, "num_key_value_heads": 1, "head_dim": 4, "scaling": 0.5, "max_length": LENGTH}
    return LinearAttention(**sizes, feature_map="elu", feature_dim=None, window=0, is_causal=True)


def turns():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2)
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(LENGTH).unsqueeze(0))


def inputs(q, k, v):
    return bench.inputs_of(attention(), turns(), q, k, v)


def heads(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(1, number, LENGTH, 4, generator=generator) for number in (2, 1, 1))


def shaken(seed=0) -> Any:
    """Students whose every parameter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.rand(2, LENGTH, generator=generator)
    start = bench.Start(4, taps, torch.ones(2, 1), taps, taps, torch.zeros(2, 1))
    students = bench.students_of(attention(), start)
    for parameter in students.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return students


@pytest.mark.parametrize("name", ["lag", "hyena", "multihyena", "linear", "share", "hybrid"])
def test_no_student_sees_later_tokens_and_each_sees_the_earlier_ones_that_it_should(name):
    student = shaken()[name]
    at = 10
    x = tuple(heads())
    changed = tuple(part.clone() for part in x)
    for part in changed:
        part[:, :, at] += 1.0
    with torch.no_grad():
        difference = (student(inputs(*x)) - student(inputs(*changed))).abs().amax(dim=(0, 1, 3))
    assert difference[:at].max() < 1e-4
    assert difference[at] > 1e-3
    assert difference[at + 1 : at + 5].max() > 1e-3
    behind = difference[at + bench.WINDOW + 4 :]
    assert (behind.max() < 1e-6) == (name == "share")


def test_hyena_is_its_definition_summed_in_float64():
    student, x = shaken()["hyena"], inputs(*heads())
    q, k, v = (m(part).double() for m, part in zip(
        (student.q_map, student.k_map, student.v_map), (x.plain_q, x.plain_k, x.values), strict=True
    ))  # fmt: skip
    short = student.short.double().view(3, -1, bench.SHORT_TAPS)
    padded = (torch.nn.functional.pad(part, (bench.SHORT_TAPS - 1, 0)) for part in (q, k, v))
    q, k, v = (
        torch.einsum("bcnk,ck->bcn", part.unfold(-1, bench.SHORT_TAPS, 1), taps)
        for part, taps in zip(padded, short, strict=True)
    )
    h = student.taps(LENGTH).double()
    w = k * v
    y = torch.stack(
        [
            sum(h[:, t - s] * w[..., s] for s in range(t + 1)) + student.skip.double() * w[..., t]
            for t in range(LENGTH)
        ],
        dim=-1,
    )
    expected = (q * y).unflatten(1, (2, 4)).transpose(2, 3)
    torch.testing.assert_close(student(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_quadratic_form_is_the_package_multihyena():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 70, 4, generator=generator, dtype=torch.float64).unbind(0)
    h = torch.randn(3, 70, generator=generator, dtype=torch.float64)
    channels = (x.transpose(2, 3).flatten(1, 2) for x in (q, k, v))
    expected = multihead_conv(*channels, h, h.new_zeros(3)).unflatten(1, (3, 4)).transpose(2, 3)
    torch.testing.assert_close(bench.by_products(q, k, v, h), expected)


def test_taps_of_few_states_are_as_far_away_as_their_fit_says():
    taps = torch.rand(3, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted, errors = bench.modal_taps(taps)
    assert torch.equal(fitted[:, 0], taps[:, 0])
    distance = (fitted - taps).norm(dim=1) / taps[:, 1:].norm(dim=1)
    torch.testing.assert_close(errors, distance)
    assert errors.min() > 0.01


def test_a_hybrid_reads_nothing_in_its_window_by_the_convolution():
    hybrid = shaken()["hybrid"]
    assert hybrid.older.taps(LENGTH)[:, : bench.WINDOW].abs().max() == 0
    assert hybrid.older.taps(LENGTH)[:, bench.WINDOW :].abs().min() > 0


def test_the_share_of_the_window_recovers_softmax_where_older_tokens_have_no_value():
    q, k, v = heads()
    k, v = torch.zeros_like(k), v.clone()
    v[:, :, : LENGTH - bench.WINDOW] = 0
    x = inputs(q, k, v)
    expected = v.sum(dim=2)[0, 0] / LENGTH
    y = softmax_log_weights(attention(), q, k, None).exp() @ x.values
    share = bench.students_of(attention(), bench.start_of(attention(), x, y))["share"]
    share.mass.data.fill_(math.log(LENGTH - bench.WINDOW))
    torch.testing.assert_close(share(x)[0, :, -1], expected.expand(2, -1))


def test_the_rotary_turn_is_undone():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, LENGTH, 4, generator=generator)
    turned, _ = apply_rotary_pos_emb(q, q, *turns())
    assert (turned - q).abs().max() > 0.1
    torch.testing.assert_close(bench.turned_back(turned, turns()), q)


def test_attention_by_lag_alone_is_found_by_its_profile():
    weights = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) + 0.1
    lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    logs = weights[:, lag.clamp(min=0)].log().masked_fill(lag < 0, -torch.inf).unsqueeze(0)
    torch.testing.assert_close(bench.lag_profile(logs), weights)
    x = inputs(*heads())
    expected = logs.softmax(dim=-1) @ x.values
    start = bench.start_of(attention(), x, 3 * expected)
    lag = bench.Lag(dataclasses.replace(start, profile=weights, lag_gain=torch.full((2, 1), 3.0)))
    torch.testing.assert_close(lag(x), 3 * expected, rtol=1e-4, atol=1e-5)


def test_gains_are_those_of_least_squares():
    x, noise = torch.randn(2, 1, 2, LENGTH, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x * torch.tensor([2.0, -0.5]).view(2, 1, 1) + noise
    for head in range(2):
        columns = (part[0, head].reshape(-1, 1) for part in (x, y))
        expected = torch.linalg.lstsq(*columns).solution
        torch.testing.assert_close(bench.gain(y, x)[head], expected[0])


def test_the_window_and_the_mean_are_softmax_over_what_they_see():
    q, k, v = heads()
    x = inputs(q, k, v)
    weights = softmax_log_weights(attention(), q, k, None).exp()
    seen = torch.ones(LENGTH, LENGTH).tril().triu(1 - bench.WINDOW)
    near = weights * seen
    torch.testing.assert_close(bench.window_alone(x), near / near.sum(dim=-1, keepdim=True) @ x.values)
    torch.testing.assert_close(bench.mean_of_values(x)[0, :, 2], x.values[0, :, :3].mean(dim=1))


def results(hyena, ratio, window=1.2):
    """Of two layers with one head each; `hyena` are its squared errors, `window` the ratio of the untrained window."""
    names = ("mean", "window", "lag", "hyena", "multihyena", "linear", "share", "hybrid")
    errors = {str(i): {name: [4.0] for name in names} | {"square": [4.0], "hyena": [hyena[i]]} for i in range(2)}
    perplexity = [
        {"name": name, "which": which, "layers": [0], "value": 10 * value}
        for name in names
        for which, value in (("1 lowest", window if name == "window" else ratio), ("layer 1", 1.5))
    ]
    options = {"steps": 3, "length": 100, "rows": 1, "dtype": "float32"}
    return {
        "options": options,
        "commit": "abc",
        "errors": errors,
        "softmax": 10.0,
        "perplexity": perplexity,
        "distilled": [{"name": "hyena", "layer": 1, "taps": [0.1, 0.2], "error": 0.5, "distilled": 0.625}],
    }


def test_the_page_says_where_conversion_is_good_enough_and_which_layers_are_closest():
    text = "\n".join(bench.page(results([1.0, 0.25], 1.04)))
    assert "| 0 | 1.000 | 1.000 | 1.000 | 0.500 |" in text
    assert "| 1 lowest | 1.040 |" in text
    close = "perplexity? Within that: 1 lowest of 1 lowest, layer 1; and better than a window that nobody trained: "
    assert close + "**1 lowest**; the worst is layer 1, 1.50 times." in text
    assert close + "**nowhere**; the worst" in "\n".join(bench.page(results([1.0, 0.25], 1.04, window=1.04)))
    assert "hyena is closer to softmax attention than linear attention in 2 of 2 layers" in text
    assert "hyena: 1;" in text  # its layer of lowest error
    assert "1.0 0.25, 0.0 0.50" in text
    assert "| hyena | 1 | 0.100 | 0.200 | 0.500 | 0.625 |" in text
    assert "300 tokens" in text
    assert "Within that: nowhere of 1 lowest, layer 1" in "\n".join(bench.page(results([1.0, 0.25], 1.06)))


def test_a_page_without_perplexities_yet_is_a_page():
    unfinished = results([1.0, 0.25], 1.0) | {"perplexity": [], "distilled": [], "softmax": None}
    text = "\n".join(bench.page(unfinished))
    assert "Perplexity over" not in text
    assert "| mean | 1.000 |" in text


def test_training_goes_on_where_its_state_was_saved(tmp_path):
    def stepped(parameter, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            (parameter * (step + 1.0)).square().sum().backward()
            optimizer.step()

    def new():
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    whole, begun, resumed = new(), new(), new()
    stepped(*whole, range(5))
    stepped(*begun, range(3))
    bench.save_state(tmp_path / "runs" / "state.safetensors", 3, begun[1])
    taken = bench.load_state(tmp_path / "runs" / "state.safetensors", resumed[1])
    stepped(*resumed, range(taken, 5))
    assert torch.equal(whole[0], resumed[0])


def test_a_smoke_run_learns_measures_and_keeps_all_in_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMOKE_RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "--smoke"])
    bench.main()
    text = (tmp_path / "linear_hyena.md").read_text()
    for part in ("2 steps of one row of 96 tokens", "| 1 lowest |", "| layer 0 |", "| hyena | ", "![layers]"):
        assert part in text
    assert str(tmp_path) not in text
    assert "step 2: lag" in capsys.readouterr().err
    assert len(list((tmp_path / "linear_hyena" / "perplexity").iterdir())) >= 9
    result = json.loads((tmp_path / "linear_hyena" / "errors.json").read_text())
    assert result["options"]["length"] == 96
    assert set(result["layers"]) == {"0", "1"}
