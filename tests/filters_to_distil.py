"""Filters that show what a distillation is worth, the same ones in tests and in benchmarks.

smoothed_noise(16, 1024)     noise of different smoothness times exponentials: neither short nor low-rank
modal(6, 5, 1000)            exact sums of exponentials with their poles and residues
exponential_like(8, 1024)    filters that `ImplicitFilter` holds at random initialisation, one band and frequency 1
"""

import numpy as np
import torch
from torch import Tensor

from hyena_hf import HyenaConfig
from hyena_hf.filters import ImplicitFilter
from tests import oracles


def smoothed_noise(channels: int, length: int, seed: int = 0) -> Tensor:
    """Gaussian noise, smoothed, times exp(-t / tau): (channels, length) float64, each of norm 1.

    Time constants tau run from 4 to length / 2 in equal ratios. Each filter is smoothed by a Gaussian kernel whose
    width is tau / 16, at least half a tap: about as many humps lie within every time constant.
    """
    rng = np.random.default_rng(seed)
    lag = np.arange(length)
    filters = []
    for tau in np.geomspace(4, length / 2, channels):
        width = max(0.5, tau / 16)
        reach = int(np.ceil(4 * width))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
        noise = np.convolve(rng.standard_normal(length + 2 * reach), kernel, mode="valid")
        taps = noise * np.exp(-lag / tau)
        filters.append(taps / np.linalg.norm(taps))
    return torch.from_numpy(np.stack(filters))


def modal(channels: int, states: int, length: int, seed: int = 0) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Filters (channels, length) of exactly so many states, their poles and residues (channels, N), and direct taps.

    Half of the states are pairs, time constants lie between 3 and length / 4, angles are well apart.
    """
    rng = np.random.default_rng(seed)
    pairs = states // 3
    reals = states - 2 * pairs
    constants = 3 * (length / 12) ** rng.random((channels, pairs + reals))
    angles = (np.arange(pairs) + 0.3 + 0.4 * rng.random((channels, pairs))) * 3 / max(pairs, 1) + 0.05
    turn = np.concatenate([angles, np.zeros((channels, reals))], axis=1)
    # real poles a ratio apart, so that no two agree
    constants[:, pairs:] = 3 * (length / 12) ** ((np.arange(reals) + 0.5 * rng.random((channels, reals))) / reals)
    poles = np.exp(-1 / constants + 1j * turn)
    residues = rng.standard_normal(poles.shape) + 1j * rng.standard_normal(poles.shape) * (turn > 0)
    direct = rng.standard_normal(channels)
    return torch.from_numpy(oracles.modal_filter(poles, residues, direct, length)), poles, residues, direct


def exponential_like(channels: int, length: int, seed: int = 0) -> Tensor:
    """Filters (channels, length) of a random `ImplicitFilter` with one band and sine frequency 1, all in float64.

    In float32 their rounding is up to 1e-5 of the smallest ones, and no 4 states hold that.
    """
    torch.manual_seed(seed)
    config = HyenaConfig(
        hidden_size=channels, num_hidden_layers=1, max_position_embeddings=length, filter_num_bands=1, sine_frequency=1
    )
    with torch.no_grad():
        return ImplicitFilter(config, 0).double()(length)[0]
