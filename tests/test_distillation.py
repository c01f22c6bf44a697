"""Fitting filters by few exponentials: exact where that is possible, stable always, and honest about the rest.

.venv/bin/python -m pytest tests/test_distillation.py
"""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch

from hyena_hf.distillation import FitReport, fit_modal, hankel_singular_values, order_for_tolerance
from hyena_hf.distillation.gradient import gradient_poles
from hyena_hf.distillation.modes import PAIR, REAL, Modes, joint_gram, moments, powers, response, taps_of
from hyena_hf.distillation.refine import least_squares, removal_costs
from hyena_hf.ops.modal import NO_POLE, advance_one, canonical_poles, modal_step, modal_system, read_out
from tests import oracles
from tests.filters_to_distil import exponential_like, modal, smoothed_noise


METHODS = ["auto", "era", "pursuit", "balanced"]


def taps_of_fit(poles, residues, direct, length):
    """(C, L) by the oracle."""
    return oracles.modal_filter(poles.numpy(), residues.numpy(), direct.numpy(), length)


def relative_error(h, poles, residues, direct, norm=2):
    h = h.double().numpy()
    error = np.linalg.norm(h - taps_of_fit(poles, residues, direct, h.shape[1]), ord=norm, axis=1)
    return error / np.linalg.norm(h[:, 1:], ord=norm, axis=1)


def states_of(poles):
    used, real = poles != 0, poles.imag == 0
    return torch.where(used, torch.where(real, 1, 2), 0).sum(dim=1)


def difficult(length=300):
    """Filters that no few exponentials match: white noise, an echo, a hump, a chirp, a ramp, signs in turn."""
    lag = np.arange(length)
    rng = np.random.default_rng(0)
    echo = np.zeros(length)
    echo[[1, length // 2, length - 2]] = 1, -1, 2
    return torch.tensor(
        np.stack(
            [
                rng.standard_normal(length),
                echo,
                np.exp(-0.5 * ((lag - length / 2) / 20) ** 2),
                np.cos(1e-2 * lag**2),
                lag / length,
                (-1.0) ** lag,
            ]
        )
    )


def hankel(h, size):
    return scipy.linalg.hankel(h[1 : size + 1], h[size : 2 * size])


@pytest.mark.parametrize("method", ["auto", "era"])
def test_a_filter_of_six_states_is_found_again(method):
    h, poles, _, _ = modal(8, 6, 800)
    found, residues, direct, report = fit_modal(h, state_size=6, method=method)
    assert relative_error(h, found, residues, direct).max() <= 2e-5  # what rounding the poles to float32 leaves
    for mine, truth in zip(found.numpy(), poles, strict=True):
        assert max(min(abs(p - mine)) for p in truth) <= 1e-6
    assert set(report.states.tolist()) == {6}


def test_pursuit_finds_most_filters_of_six_states_by_itself():
    h, _, _, _ = modal(8, 6, 800)
    _, _, _, report = fit_modal(h, state_size=6, method="pursuit")
    assert (report.relative_l2 <= 2e-5).sum() >= 6
    assert report.relative_l2.max() <= 0.05


def test_spare_states_stay_unused_where_fewer_are_exact():
    h, _, _, _ = modal(8, 6, 800)
    _, _, _, report = fit_modal(h, state_size=16)
    assert report.states.tolist() == [6] * 8
    assert report.suggested_order.max() <= 6


def test_poles_that_a_model_can_hold_come_back_bit_for_bit():
    poles, residues, direct, _ = fit_modal(modal(4, 8, 400)[0], state_size=8)
    h = torch.from_numpy(taps_of_fit(poles, residues, direct, 400))
    again, _, _, report = fit_modal(h, state_size=8)
    assert torch.equal(again, poles)
    assert report.relative_l2.max() <= 1e-10


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("method", METHODS)
def test_states_never_exceed_the_size_and_poles_are_canonical_and_stable(size, method):
    h = torch.cat([difficult(), smoothed_noise(3, 300), modal(3, 4, 300)[0]])
    poles, residues, direct, report = fit_modal(h, state_size=size, method=method)
    assert states_of(poles).max() <= size
    assert torch.equal(states_of(poles), report.states)
    assert poles.abs().max() < 1
    assert (poles.imag >= 0).all()
    assert torch.equal(residues[poles == 0], torch.zeros_like(residues[poles == 0]))
    assert torch.equal(residues[poles.imag == 0].imag, torch.zeros_like(residues[poles.imag == 0].imag))
    assert poles.shape[1] == (poles != 0).sum(dim=1).max()
    assert torch.equal(direct, h[:, 0])
    assert (report.relative_l2 <= 1 + 1e-9).all()


def test_float32_log_radius_and_angle_give_back_exactly_the_poles():
    poles, _, _, _ = fit_modal(torch.cat([smoothed_noise(12, 400), difficult(400)]), state_size=16)
    held = canonical_poles(poles.abs().clamp(min=1e-30).log().float(), poles.angle().float())
    assert torch.equal(torch.where(poles == 0, 0, held), poles)


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_of_the_report_are_those_of_the_returned_filters(method):
    h = torch.cat([difficult(), smoothed_noise(3, 300)]).float()
    poles, residues, direct, report = fit_modal(h, state_size=8, method=method)
    for norm, found in ((2, report.relative_l2), (1, report.relative_l1)):
        np.testing.assert_allclose(found, relative_error(h, poles, residues, direct, norm), rtol=1e-6, atol=1e-9)


def test_a_channel_does_not_depend_on_its_batch():
    h = torch.cat([smoothed_noise(5, 500), difficult(500), modal(2, 5, 500)[0]])
    poles, residues, _, report = fit_modal(h, state_size=9)
    for channel in range(0, len(h), 2):
        alone, its_residues, _, its_report = fit_modal(h[channel : channel + 1], state_size=9)
        assert alone.shape[1] <= poles.shape[1]
        # residues in float32 leave some 1e-7 of a filter that is exactly modal
        np.testing.assert_allclose(report.relative_l2[channel], its_report.relative_l2[0], rtol=1e-3, atol=1e-7)
        if report.method[channel] == its_report.method[0] and report.relative_l2[channel] > 1e-6:
            assert (poles[channel, : alone.shape[1]] - alone[0]).abs().max() <= 1e-5
        assert its_residues.shape == alone.shape
    assert residues.shape == poles.shape


@pytest.mark.parametrize("scale", [1e-30, 1e20])  # residues are those of a float32 model
def test_the_scale_of_a_filter_changes_its_residues_only(scale):
    h = smoothed_noise(4, 300)
    poles, residues, _, report = fit_modal(h, state_size=6)
    scaled, their_residues, _, their_report = fit_modal(h * scale, state_size=6)
    assert (poles - scaled).abs().max() <= 1e-5
    assert (their_residues / scale - residues).abs().max() <= 1e-3 * residues.abs().max()
    np.testing.assert_allclose(report.relative_l2, their_report.relative_l2, rtol=1e-4)


def test_real_decays_get_real_poles_and_alternating_ones_negative_poles():
    lag = torch.arange(200, dtype=torch.float64)
    h = torch.stack([0.9**lag + 2 * 0.5**lag, (-0.8) ** lag])
    poles, _, _, report = fit_modal(h, state_size=2)
    assert report.states.tolist() == [2, 1]
    found = sorted(poles[0].real.tolist())
    assert poles.imag.abs().max() == 0
    assert abs(np.array(found) - [0.5, 0.9]).max() <= 1e-7
    assert abs(float(poles[1, 0].real) + 0.8) <= 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_filters_like_exponentials_need_four_states(seed):
    h = exponential_like(16, 1024, seed)
    poles, residues, direct, _ = fit_modal(h, state_size=4)
    assert relative_error(h, poles, residues, direct).max() <= 1e-6


@pytest.mark.parametrize("size", [16, 32])
def test_auto_is_near_the_bound_and_ahead_of_era_with_least_squares_and_of_balanced_truncation(size):
    h = smoothed_noise(16, 1024)
    _, _, _, report = fit_modal(h, state_size=size)
    _, _, _, balanced = fit_modal(h, state_size=size, method="balanced")
    mean = report.relative_l2.mean()
    assert mean <= 4.2 * report.lower_bound.mean()
    assert mean <= 0.8 * balanced.relative_l2.mean()
    assert mean <= 0.85 * np.mean([era_and_least_squares(one.numpy(), size) for one in h])


def era_and_least_squares(h, size):
    """Relative l2 error, independently: eigenvectors of the Hankel matrix, clipped eigenvalues, numpy's lstsq."""
    rows = len(h) // 2
    values, vectors = scipy.sparse.linalg.eigsh(hankel(h, rows), size, which="LM", v0=np.ones(rows))
    observability = vectors * np.sqrt(abs(values))
    poles = np.linalg.eigvals(np.linalg.lstsq(observability[:-1], observability[1:], rcond=None)[0])
    poles = poles / np.maximum(1, abs(poles) / (1 - 1e-7))
    columns = poles ** np.arange(len(h) - 1)[:, None]
    columns = np.concatenate([columns.real, columns.imag], axis=1)
    fit = columns @ np.linalg.lstsq(columns, h[1:], rcond=1e-13)[0]
    return np.linalg.norm(h[1:] - fit) / np.linalg.norm(h[1:])


def test_auto_is_ahead_of_the_gradient_fit():
    h = smoothed_noise(6, 256)
    _, _, _, report = fit_modal(h, state_size=8)
    _, _, _, gradient = fit_modal(h, state_size=8, method="gradient")
    assert gradient.method == ["gradient"] * 6
    assert gradient.relative_l2.max() < 0.9
    assert report.relative_l2.mean() <= 0.8 * gradient.relative_l2.mean()


def test_the_gradient_fit_keeps_to_its_size_too():
    taps = taps_of(smoothed_noise(2, 40)[:, 1:].contiguous())
    for size, used in ((1, 1), (2, 2), (5, 4)):
        modes = gradient_poles(taps, size, steps=20)
        assert modes.states.tolist() == [used, used]
        assert (modes.log_pole.real < 0).all()
    for changed in ({"steps": 21}, {"learning_rate": 0.02}, {"start": "random"}):
        assert not torch.equal(gradient_poles(taps, 5, **{"steps": 20, **changed}).log_pole, modes.log_pole)


def test_auto_is_never_worse_than_either_of_its_starts():
    h = torch.cat([difficult(), smoothed_noise(6, 300)])
    auto, era, pursuit = (fit_modal(h, state_size=8, method=m)[3].relative_l2 for m in ("auto", "era", "pursuit"))
    assert (auto <= torch.minimum(era, pursuit) * 1.02 + 1e-9).all()


def test_long_filters_are_fitted_without_a_square_matrix():
    h = smoothed_noise(4, 16384)[1:3]
    poles, residues, direct, report = fit_modal(h, state_size=16)
    np.testing.assert_allclose(report.relative_l2, relative_error(h, poles, residues, direct), rtol=1e-6)
    assert report.relative_l2.max() <= 0.2
    assert (report.lower_bound <= report.relative_l2).all()


@pytest.mark.parametrize(("length", "count"), [(2, 1), (3, 1), (40, 12), (513, 20), (700, 20)])
def test_hankel_singular_values_are_those_of_the_matrix(length, count):
    h = smoothed_noise(3, length) if length > 8 else torch.randn(3, length, dtype=torch.float64)
    found = hankel_singular_values(h, min(count, length // 2))
    assert found.dtype == torch.float64
    for mine, taps in zip(found, h, strict=True):
        truth = np.linalg.svd(hankel(taps.numpy(), length // 2), compute_uv=False)[: len(mine)]
        assert abs(mine.numpy() - truth).max() <= 1e-6 * truth[0]
        assert (mine.numpy() <= truth * (1 + 1e-12) + 1e-14 * truth[0]).all()


def test_all_hankel_singular_values_show_the_rank_of_a_modal_filter():
    sigma = hankel_singular_values(modal(3, 6, 200)[0])
    assert sigma.shape == (3, 100)
    assert order_for_tolerance(sigma, 1e-12).tolist() == [6, 6, 6]
    assert order_for_tolerance(torch.tensor([1.0, 0.1, 0.01]), 0.05).item() == 2
    assert order_for_tolerance(torch.tensor([1.0, 0.1, 0.01]), 1e-3).item() == 3


@pytest.mark.parametrize("length", [40, 700])
def test_no_filter_of_so_many_states_is_below_the_lower_bound(length):
    h = torch.cat([smoothed_noise(4, length), torch.randn(2, length, dtype=torch.float64)])
    for size in (1, 4, 8):
        reports = [fit_modal(h, state_size=size, method=m)[3] for m in ("auto", "balanced")]
        for report in reports:
            assert (report.lower_bound <= report.relative_l2 + 1e-12).all()
        for bound, taps in zip(reports[0].lower_bound, h.numpy(), strict=True):
            rows = length // 2
            rest = np.linalg.svd(hankel(taps, rows), compute_uv=False)[size:]
            truth = np.sqrt((rest**2).sum() / rows) / np.linalg.norm(taps[1:])
            assert truth * 0.99 - 1e-9 <= float(bound) <= truth * (1 + 1e-9)


def test_gains_and_sums_of_the_report_bound_the_error_of_any_convolution():
    length = 150
    h = torch.cat([difficult(length), smoothed_noise(3, length)])
    poles, residues, direct, report = fit_modal(h, state_size=4)
    error = h.numpy() - taps_of_fit(poles, residues, direct, length)
    peak = abs(np.fft.rfft(error, n=2**17)).max(axis=1)
    assert (peak <= report.h_infinity.numpy()).all()
    assert (report.h_infinity.numpy() <= 1.03 * peak + 1e-15).all()
    sum_of_errors = report.relative_l1 * h[:, 1:].abs().sum(dim=1)
    inputs = np.random.default_rng(0).standard_normal((50, length))
    for taps, gain, total in zip(error, report.h_infinity, sum_of_errors, strict=True):
        for w in [*inputs, np.sign(taps[::-1])]:
            out = np.convolve(w, taps)
            assert np.linalg.norm(out) <= float(gain) * np.linalg.norm(w) + 1e-12
            assert abs(out[:length]).max() <= float(total) * abs(w).max() + 1e-12


def test_the_tail_of_the_report_bounds_what_a_fit_adds_beyond_the_last_tap():
    h = smoothed_noise(6, 200)
    poles, residues, direct, report = fit_modal(h, state_size=6)
    beyond = abs(taps_of_fit(poles, residues, direct, 20_000)[:, 200:]).sum(axis=1)
    assert (beyond <= report.tail.numpy() * (1 + 1e-9)).all()
    assert report.tail.max() > 0


def random_modes(channels=3, count=4):
    rng = np.random.default_rng(0)
    log_pole = -0.3 * rng.random((channels, count)) ** 3 + 1j * rng.uniform(0.1, 3, (channels, count))
    residue = rng.standard_normal((channels, count)) + 1j * rng.standard_normal((channels, count))
    kind = np.full((channels, count), PAIR)
    log_pole[:, -1], residue[:, -1], kind[:, -1] = -0.01, residue[:, -1].real, REAL
    return Modes(torch.tensor(log_pole), torch.tensor(residue), torch.tensor(kind))


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000, 4097])
def test_closed_forms_are_the_sums_over_all_lags(count):
    modes = random_modes()
    lag = np.arange(count)
    basis = np.exp(modes.log_pole.numpy()[..., None] * lag)
    slopes = modes.residue.numpy()[..., None] * lag * basis
    columns = np.concatenate([basis, slopes], axis=1)
    columns = np.concatenate([columns.real, -columns.imag], axis=1)
    truth = columns @ columns.swapaxes(1, 2)
    limit = 1e-10 if count > 3 else 1e-6  # 1 / (M |1 - w|)^2 of rounding, and a pole is 2e-5 from the circle
    assert abs(joint_gram(modes.log_pole, modes.residue, count).numpy() - truth).max() <= limit * abs(truth).max()
    x = np.random.default_rng(1).standard_normal((3, count))
    taps = taps_of(torch.tensor(x))
    power = powers(modes.log_pole, taps.blocks)
    plain, sloped = moments(power, taps.blocks, slopes=True)
    assert abs(plain.numpy() - (basis * x[:, None]).sum(-1)).max() <= 1e-10
    assert abs(sloped.numpy() - (lag * basis * x[:, None]).sum(-1)).max() <= 1e-9 * count
    sums = response(power, modes.residue, count).flatten(1)
    assert abs(sums[:, :count].numpy() - (modes.residue.numpy()[..., None] * basis).sum(1).real).max() <= 1e-11
    assert not sums[:, count:].any()


@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-7, 1e-11, 0.0])
def test_residues_are_those_of_least_squares_even_for_poles_that_nearly_agree(gap):
    h = smoothed_noise(2, 400)[:, 1:].contiguous()
    log_pole = torch.tensor([[-0.02 + 0.1j, -0.02 + (0.1 + gap) * 1j, -0.5]], dtype=torch.complex128).expand(2, -1)
    kind = torch.tensor([[PAIR, PAIR, REAL]]).expand(2, -1)
    free = taps_of(h)._replace(rounding=0.0)  # however badly float32 steps would follow
    fit = least_squares(free, Modes(log_pole, torch.zeros_like(log_pole), kind))
    columns = np.exp(log_pole[0].numpy() * np.arange(399)[:, None])
    columns = np.concatenate([columns.real, columns[:, :2].imag], axis=1)
    for cost, taps in zip(fit.cost, h.numpy(), strict=True):
        best = taps - columns @ np.linalg.lstsq(columns, taps, rcond=1e-13)[0]
        np.testing.assert_allclose(float(cost), (best**2).sum(), rtol=1e-4)
    assert torch.isfinite(torch.view_as_real(fit.modes.residue)).all()


def test_the_price_of_a_mode_is_what_leaving_it_out_costs():
    taps = taps_of(smoothed_noise(3, 400)[:, 1:].contiguous())
    modes = random_modes()
    fit = least_squares(taps, modes)
    price = removal_costs(taps, fit.modes)
    for slot in range(4):
        kept = [n for n in range(4) if n != slot]
        without = least_squares(taps, Modes(*(part[:, kept] for part in modes)))
        np.testing.assert_allclose(price[:, slot], without.cost - fit.cost, rtol=1e-6, atol=1e-12)


def test_zero_filters_have_no_poles_and_no_error():
    h = torch.zeros(3, 64)
    h[1] = smoothed_noise(1, 64)[0]
    h[2, 0] = 5.0
    poles, residues, direct, report = fit_modal(h, state_size=4)
    assert not poles[[0, 2]].any()
    assert not residues[[0, 2]].any()
    assert direct.tolist()[2] == 5
    assert report.relative_l2[[0, 2]].tolist() == [0, 0]
    assert report.method[0] == "none"
    assert fit_modal(torch.zeros(2, 9), state_size=4)[0].shape == (2, 0)


def test_one_tap_is_the_direct_tap_and_two_taps_are_exact():
    poles, residues, direct, report = fit_modal(torch.tensor([[3.0], [0.0]]))
    assert poles.shape == residues.shape == (2, 0)
    assert direct.tolist() == [3, 0]
    assert report.relative_l2.tolist() == [0, 0]
    h = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    for length in (2, 3, 4):
        h = torch.randn(5, length)
        parts = fit_modal(h, state_size=length - 1)
        assert relative_error(h, *parts[:3]).max() <= 1e-5


def test_a_constant_is_a_pole_just_inside_the_circle():
    poles, residues, direct, _ = fit_modal(torch.full((1, 1000), 0.7), state_size=2)
    assert 0.99999 < float(poles.abs().max()) < 1
    assert relative_error(torch.full((1, 1000), 0.7), poles, residues, direct).max() <= 1e-4


def test_a_report_reads_as_a_table_and_other_dtypes_are_taken():
    h = smoothed_noise(3, 100)
    before = h.clone()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        poles, residues, direct, report = fit_modal(h.to(dtype), state_size=4)
        assert (poles.dtype, residues.dtype, direct.dtype) == (torch.complex128, torch.complex128, torch.float64)
    assert torch.equal(h, before)
    text = str(report)
    for word in ("3 filters", "relative_l2", "h_infinity", "lower_bound", "suggested_order", "method"):
        assert word in text
    assert isinstance(report, FitReport)


def test_progress_is_shown_only_when_asked_for(capsys):
    h = smoothed_noise(2, 64)
    fit_modal(h, state_size=2)
    assert capsys.readouterr() == ("", "")
    fit_modal(h, state_size=2, progress=True)
    assert "filters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("h", "options", "message"),
    [
        (torch.tensor([[1.0, float("nan"), 0.0]]), {"state_size": 1}, "channel 0 has NaN"),
        (torch.tensor([[1.0, 2.0], [1.0, float("inf")]]), {"state_size": 1}, "channel 1 has NaN or infinite"),
        (torch.ones(4), {}, r"\(channels, length\), got \(4,\)"),
        (torch.ones(2, 0), {}, "got"),
        (torch.ones(2, 40, dtype=torch.complex64), {}, "real taps"),
        (torch.ones(2, 40, dtype=torch.int64), {}, "real taps"),
        (torch.ones(2, 9), {"state_size": 9}, r"state_size \(9\) is above the 8 taps.*choose 8"),
        (torch.ones(2, 40), {"state_size": 0}, "at least 1"),
        (torch.ones(2, 40), {"state_size": 2.5}, "whole number"),
        (torch.ones(2, 40), {"state_size": True}, "whole number"),
        (torch.ones(2, 40), {"method": "magic"}, "must be one of 'auto', 'era'"),
        (1.1 ** torch.arange(200.0).repeat(2, 1), {}, "channels 0, 1 have taps that grow.*window"),
    ],
)
def test_filters_that_make_no_sense_are_refused_with_what_to_do(h, options, message):
    with pytest.raises(ValueError, match=message):
        fit_modal(h, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hankel_singular_values(torch.ones(3, 1)), "at least 2 lags"),
        (lambda: hankel_singular_values(torch.ones(3, 10), 6), r"count \(6\) must be from 1 to 5"),
        (lambda: order_for_tolerance(torch.ones(3), -1.0), "0 or more"),
    ],
)
def test_a_hankel_analysis_without_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def awkward(length=256):
    """Smooth filters that nearly equal poles with huge residues fit best."""
    lag = torch.arange(length, dtype=torch.float64)
    return torch.stack(
        [lag * torch.exp(-lag / 20) / 7, (1 - lag / length) ** 2, lag**3 * torch.exp(-lag / 20) / 11000]
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_of_the_report_are_those_of_residues_that_a_float32_model_holds(method):
    h = torch.cat([awkward(), smoothed_noise(4, 256)])
    poles, residues, direct, report = fit_modal(h, state_size=4, method=method)
    stored = residues.to(torch.complex64).to(torch.complex128)
    assert torch.equal(stored, residues)
    for norm, found in ((2, report.relative_l2), (1, report.relative_l1)):
        np.testing.assert_allclose(relative_error(h, poles, stored, direct, norm), found, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "era", "pursuit"])
def test_float32_steps_of_a_fit_are_as_exact_as_its_report_says(method):
    """Residues of 1e8 with opposite signs once made steps that were wrong by more than the whole output."""
    h = torch.cat([awkward(1024), smoothed_noise(8, 1024)])
    poles, residues, _, report = fit_modal(h, state_size=8, method=method)
    log_radius = torch.where(poles == 0, NO_POLE, poles.abs().clamp(min=1e-30).log())
    system = modal_system(log_radius, poles.angle(), residues.real, residues.imag)
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        step, state, found = modal_step(system, len(h), dtype), torch.zeros(1, system.size, len(h), dtype=dtype), []
        for _ in range(1024):
            found.append(read_out(state, step))
            state = advance_one(state, torch.randn(1, len(h), generator=generator).to(dtype), step)
        outputs[dtype] = torch.cat(found).double()
    truth = outputs[torch.float64]
    error = (outputs[torch.float32] - truth).norm(dim=0) / truth.norm(dim=0)
    assert error.max() <= 2e-5
    assert ((error <= 5 * report.step_error) & (report.step_error <= 5 * error)).all()
