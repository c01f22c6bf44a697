"""Fits for inputs of a known spectrum: the error that counts is that of outputs.

.venv/bin/python -m pytest tests/test_weighted_fits.py
"""

import json

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from hyena_hf.distillation import distill, fit_modal, input_spectra
from hyena_hf.distillation.modes import PAIR, Modes, flat, moments, powers, taps_of
from hyena_hf.distillation.refine import least_squares, removal_costs
from hyena_hf.distillation.weighting import (
    FLOOR,
    error_energy,
    filtered,
    on_grid,
    spectral_rows,
    weighted_gram,
    weighted_joint_gram,
    weighted_moments,
    weighted_taps,
)
from tests import oracles
from tests.filters_to_distil import modal, smoothed_noise
from tests.models import new_model, tokens
from tests.test_distill_model import smooth


# numerator and denominator of what makes white noise coloured
COLOURS = {"low": ([1], [1, -0.9]), "high": ([1], [1, 0.9]), "band": ([1], [1, -1.57, 0.9])}


def spectrum_of(colour, channels=1, frequencies=257):
    _, gain = scipy.signal.freqz(*COLOURS[colour], worN=np.linspace(0, np.pi, frequencies))
    return torch.tensor(abs(gain) ** 2).expand(channels, -1)


def relative_output(h, parts, colour):
    """Root mean square of the error of outputs over that of outputs for 200,000 coloured samples, without lag 0."""
    noise = np.random.default_rng(0).standard_normal(200_000)
    u = scipy.signal.lfilter(*COLOURS[colour], noise)
    fit = oracles.modal_filter(*(part.numpy() for part in parts[:3]), h.shape[1])
    found = []
    for taps, error in zip(h.numpy(), h.numpy() - fit, strict=True):
        taps = np.r_[0, taps[1:]]
        outputs = [scipy.signal.fftconvolve(u, x)[: len(u)] for x in (error, taps)]
        found.append(np.linalg.norm(outputs[0]) / np.linalg.norm(outputs[1]))
    return np.array(found)


@pytest.mark.parametrize("colour", list(COLOURS))
def test_a_weighted_fit_has_a_fifth_less_power_of_error_in_outputs_and_never_more(colour):
    h = smoothed_noise(8, 400)
    plain, weighted = (fit_modal(h, state_size=8, spectrum=s) for s in (None, spectrum_of(colour, 8)))
    before, after = (relative_output(h, parts, colour) for parts in (plain, weighted))
    np.testing.assert_allclose(weighted[3].relative_output, after, rtol=0.15)  # the floor hides silent frequencies
    assert (after <= 1.01 * before).all()
    assert np.mean((after / before) ** 2) <= 0.8
    assert weighted[3].relative_l2.mean() >= plain[3].relative_l2.mean()
    assert (weighted[3].lower_bound <= weighted[3].relative_l2).all()
    assert torch.equal(weighted[2], h[:, 0])
    assert weighted[0].abs().max() < 1
    assert weighted[3].states.max() <= 8


def test_a_flat_spectrum_of_any_unit_or_of_none_is_no_weight():
    h = smoothed_noise(4, 300)
    plain = fit_modal(h, state_size=6)[3]
    assert torch.equal(plain.relative_output, plain.relative_l2)
    for level in (0.0, 1e-200, 7.0):
        report = fit_modal(h, state_size=6, spectrum=torch.full((4, 5), level, dtype=torch.float64))[3]
        np.testing.assert_allclose(report.relative_output, report.relative_l2, rtol=1e-6)
        assert (report.relative_l2 <= plain.relative_l2 * 1.001).all()


@pytest.mark.parametrize("method", ["auto", "era", "pursuit", "balanced"])
def test_every_method_takes_a_spectrum_and_exact_filters_stay_exact(method):
    h, _, _, _ = modal(3, 4, 200)
    report = fit_modal(h, state_size=4, method=method, spectrum=spectrum_of("low", 3))[3]
    limit = 1e-4 if method == "auto" else 1.0
    assert (report.relative_l2 <= limit).all()
    assert (report.relative_output <= limit).all()


def test_chunks_of_filters_keep_their_own_spectra(monkeypatch):
    h, spectrum = smoothed_noise(3, 100), torch.cat([spectrum_of(c) for c in COLOURS])
    whole = fit_modal(h, state_size=4, spectrum=spectrum)[3].relative_output
    monkeypatch.setattr("hyena_hf.distillation.fit._NUMBERS", 1)
    split = fit_modal(h, state_size=4, spectrum=spectrum)[3].relative_output
    np.testing.assert_allclose(whole, split, rtol=1e-3)


def test_zero_filters_have_no_error_in_outputs_either():
    report = fit_modal(torch.zeros(2, 20), state_size=2, spectrum=torch.ones(2, 3))[3]
    assert report.relative_output.tolist() == [0, 0]


def weighted_problem(count, channels=2):
    taps = taps_of(smoothed_noise(channels, count + 1)[:, 1:].contiguous())
    return weighted_taps(taps, spectrum_of("low", channels))


def toeplitz(taps):
    """The matrix between errors, from the correlations of the input."""
    return [scipy.linalg.toeplitz(np.fft.irfft(row)[: taps.length]) for row in taps.spectrum.numpy()]


@pytest.mark.parametrize("count", [1, 2, 3, 50, 127, 128, 300])
def test_weighted_sums_are_products_with_the_toeplitz_matrix_of_correlations(count):
    taps = weighted_problem(count)
    log_pole = torch.tensor([[-0.05 + 0.4j, -1e-3 + 3.0j, -0.2 + 0j, -1e-5 + 0j]] * 2, dtype=torch.complex128)
    residue = torch.tensor([[1 + 2j, -0.5 + 0.1j, 0.3 + 0j, 2 + 0j]] * 2, dtype=torch.complex128)
    power = powers(log_pole, taps.blocks)
    lag = np.arange(count)
    basis = np.exp(log_pole.numpy()[..., None] * lag)
    slopes = residue.numpy()[..., None] * lag * basis
    joint = weighted_joint_gram(taps, log_pole, residue).numpy()
    plain, sloped = weighted_moments(taps, power, taps.blocks, slopes=True)
    for channel, matrix in enumerate(toeplitz(taps)):
        x = flat(taps.blocks, count)[channel].numpy()
        both = np.concatenate([basis[channel], slopes[channel]])
        for found, u in ((weighted_gram(taps, log_pole).numpy(), basis[channel]), (joint, both)):
            columns = np.concatenate([u.real, -u.imag])
            truth = columns @ matrix @ columns.T
            assert abs(found[channel] - truth).max() <= 1e-6 * abs(truth).max()  # a pole is 1e-5 from the circle
        assert abs(plain[channel].numpy() - basis[channel] @ matrix @ x).max() <= 1e-10 * count
        assert abs(sloped[channel].numpy() - (lag * basis[channel]) @ matrix @ x).max() <= 1e-9 * count**2
        np.testing.assert_allclose(float(error_energy(taps, taps.blocks)[channel]), x @ matrix @ x, rtol=1e-9)
        rows = spectral_rows(taps, flat(taps.blocks, count).unsqueeze(1))[channel].numpy()
        np.testing.assert_allclose(rows @ rows.T, x @ matrix @ x, rtol=1e-9)


@pytest.mark.parametrize("gap", [1e-1, 1e-7, 0.0])
def test_weighted_residues_are_those_of_least_squares_even_for_poles_that_nearly_agree(gap):
    taps = weighted_problem(200)._replace(rounding=0.0)  # however badly float32 steps would follow
    log_pole = torch.tensor([[-0.02 + 0.1j, -0.02 + (0.1 + gap) * 1j]] * 2, dtype=torch.complex128)
    fit = least_squares(taps, Modes(log_pole, torch.zeros_like(log_pole), torch.full((2, 2), PAIR)))
    columns = np.exp(log_pole[0].numpy() * np.arange(200)[:, None])
    columns = np.concatenate([columns.real, columns.imag], axis=1)
    for channel, matrix in enumerate(toeplitz(taps)):
        root = np.linalg.cholesky(matrix).T
        x = flat(taps.blocks, 200)[channel].numpy()
        best = root @ (x - columns @ np.linalg.lstsq(root @ columns, root @ x, rcond=1e-13)[0])
        np.testing.assert_allclose(float(fit.cost[channel]), best @ best, rtol=1e-4)


def test_the_weighted_price_of_a_mode_is_what_leaving_it_out_costs():
    taps = weighted_problem(200)
    log_pole = torch.tensor([[-0.05 + 0.4j, -0.01 + 1.0j]] * 2, dtype=torch.complex128)
    modes = Modes(log_pole, torch.zeros_like(log_pole), torch.full((2, 2), PAIR))
    fit = least_squares(taps, modes)
    without = least_squares(taps, Modes(*(part[:, :1] for part in modes)))
    np.testing.assert_allclose(removal_costs(taps, fit.modes)[:, 1], without.cost - fit.cost, rtol=1e-6)


def test_the_factor_of_a_spectrum_is_causal_keeps_poles_and_has_its_power():
    taps = weighted_problem(255, channels=1)
    impulse = torch.zeros(1, 255, dtype=torch.float64)
    impulse[0, 0] = 1
    g = filtered(taps, impulse)[0].numpy()
    power = abs(np.fft.rfft(g, n=512)) ** 2
    np.testing.assert_allclose(power, taps.spectrum[0].numpy(), rtol=1e-2)
    decay = 0.95 ** torch.arange(255, dtype=torch.float64).unsqueeze(0)
    later = filtered(taps, decay)[0, 150:].numpy()
    np.testing.assert_allclose(later[1:] / later[:-1], 0.95, rtol=1e-3)
    assert torch.equal(filtered(taps_of(decay), decay), decay)


def test_without_a_spectrum_sums_are_the_unweighted_ones():
    taps = taps_of(smoothed_noise(2, 50)[:, 1:].contiguous())
    power = powers(torch.full((2, 1), -0.1 + 0.2j, dtype=torch.complex128), taps.blocks)
    assert torch.equal(weighted_moments(taps, power, taps.blocks)[0], moments(power, taps.blocks)[0])
    np.testing.assert_allclose(error_energy(taps, taps.blocks), taps.energy)


def test_no_frequency_counts_less_than_the_floor():
    grid = on_grid(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64), 100)
    assert grid.shape == (1, 129)
    assert float(grid.min()) == FLOOR
    assert torch.equal(on_grid(torch.zeros(1, 5, dtype=torch.float64), 100), torch.ones(1, 129, dtype=torch.float64))


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (torch.ones(3, 5), r"real power \(2, F\).*got \(3, 5\)"),
        (torch.ones(2, 1), "at least 2 frequencies"),
        (torch.ones(2, 5, dtype=torch.complex64), "complex64"),
        (-torch.ones(2, 5), "nowhere negative"),
        (torch.full((2, 5), float("nan")), "finite"),
    ],
)
def test_a_spectrum_without_sense_is_refused(spectrum, message):
    with pytest.raises(ValueError, match=message):
        fit_modal(torch.ones(2, 20), state_size=2, spectrum=spectrum)


def first_inputs(model, ids):
    """Short-convolved projections (B, (N + 1) D, L) of the first layer, by torch alone."""
    seen = []
    layer = model.model.layers[0]
    handle = layer.mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids)
    handle.remove()
    mixer = layer.mixer
    p = torch.nn.functional.linear(seen[0], mixer.in_proj.weight, mixer.in_proj.bias).mT
    weight, bias = mixer.short_conv.weight, mixer.short_conv.bias
    p = torch.nn.functional.pad(p, (weight.shape[1] - 1, 0))
    return torch.nn.functional.conv1d(p, weight.unsqueeze(1), bias, groups=p.shape[1])


@pytest.mark.parametrize("length", [2, 60, 512, 1100])
def test_input_spectra_are_those_of_the_gated_value(length):
    model = new_model("order 2", torch.float64, num_hidden_layers=1, max_position_embeddings=2000)
    ids = tokens(2, length)
    found = input_spectra(model.requires_grad_(False), [ids[:1], ids[1:]])[0]
    _, gate, v = first_inputs(model, ids).detach().chunk(3, dim=1)
    size = min(length, 512)
    window = scipy.signal.windows.hann(size + 2)[1:-1]
    options = {"nperseg": size, "nfft": 512, "detrend": False, "window": window, "noverlap": size - max(1, size // 2)}
    truth = np.mean([scipy.signal.welch(row, **options)[1] for row in (gate * v).numpy()], axis=0)
    truth[:, 1:-1] /= 2  # one-sided
    np.testing.assert_allclose(found / found.mean(), truth / truth.mean(), rtol=1e-6)


def test_input_spectra_of_heads_are_means_over_their_products():
    model = new_model("heads", torch.float64, num_hidden_layers=1).requires_grad_(False)
    found = input_spectra(model, [tokens(2, 100)])[0]
    _, k, v = (x.unflatten(1, (8, 4)) for x in first_inputs(model, tokens(2, 100)).chunk(3, dim=1))
    products = (k.unsqueeze(3) * v.unsqueeze(2)).numpy()  # (B, H, P, P, L)
    window = scipy.signal.windows.hann(102)[1:-1]
    power = abs(np.fft.rfft(products * window, n=512)) ** 2
    truth = power.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found / found.mean(), truth / truth.mean(), rtol=1e-6)


@pytest.mark.parametrize("name", ["order 3", "heads", "hybrid"])
def test_listening_changes_nothing_and_covers_every_filter(name):
    model = new_model(name).requires_grad_(False).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model.eval()(tokens(1, 40)).logits
    model.train()
    spectra = input_spectra(model, [tokens(1, 40)])
    assert model.training
    for layer, power in spectra.items():
        long_filter = model.model.layers[layer].mixer.filter
        assert power.shape == (long_filter(8).flatten(0, 1).shape[0], 257)
        assert (power > 0).all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(tokens(1, 40)).logits, logits)


@pytest.mark.parametrize("name", ["order 2", "order 3", "heads"])
def test_a_weighted_distillation_reports_both_errors(name, tmp_path):
    model = smooth(name)
    plain = distill(model, state_size=2, calibration=tokens(2, 60))[1]
    student, report = distill(model, state_size=2, calibration=iter([tokens(2, 60)]), weighted=True)
    assert student(tokens(1, 20)).logits.shape == (1, 20, 97)
    assert report.calibration.tokens == plain.calibration.tokens
    assert "of outputs: median" in str(report)
    assert "of outputs" not in str(plain)
    report.save(tmp_path)
    numbers = json.loads((tmp_path / "distillation.json").read_text())
    assert numbers["weighted"] is True
    for one, before in zip(numbers["layers"], plain.layers, strict=True):
        assert one["filters"]["relative_output"] != one["filters"]["relative_l2"]
        assert torch.equal(before.filters.relative_output, before.filters.relative_l2)


def test_weights_need_a_calibration_set():
    with pytest.raises(ValueError, match="give a calibration set"):
        distill(smooth(), weighted=True)


def test_finished_layers_serve_only_inputs_of_the_same_spectrum(tmp_path, monkeypatch):
    model, calls = smooth(), []

    def fit(h, **options):
        calls.append(options["spectrum"])
        return fit_modal(h, **options)

    monkeypatch.setattr("hyena_hf.distillation.model.fit_modal", fit)
    for calibration in (tokens(1, 60), tokens(1, 60), tokens(1, 60, seed=2)):
        distill(model, state_size=2, calibration=calibration, weighted=True, work_dir=tmp_path)
    assert len(calls) == 4
    distill(model, state_size=2, calibration=tokens(1, 60), work_dir=tmp_path)
    assert calls[4:] == [None, None]


def test_a_tolerance_is_on_the_error_of_outputs_where_that_is_fitted(monkeypatch):
    model = smooth(filter_types=["explicit"] * 2, filter_length=100)
    monkeypatch.setattr("hyena_hf.distillation.model._SIZES", (2, 5))
    with pytest.warns(UserWarning, match="miss the tolerance"):
        _, report = distill(model, tolerance=0.1, calibration=tokens(1, 60), weighted=True)
    missed = sum(int((one.filters.relative_output > 0.1).sum()) for one in report.layers)
    assert len(report.missed()) == missed
