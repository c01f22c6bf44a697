# SPDX-License-Identifier: Apache-2.0
"""LaughingHyena: long filters into recurrences, with certificates.

- `distill`: a trained model into one that generates in constant memory, with a `DistillationReport`.
- `fit_modal`: poles and residues of filters, with a `FitReport`.
- `input_spectra`: which frequencies the inputs of filters have, to fit where it matters.
- `HankelPenalty`, `RoughnessPenalty`: for training losses, so that few states hold the filters that come out.
- `hankel_singular_values`, `order_for_tolerance`: how many states a filter needs.
"""

from .compressibility import HankelPenalty, RoughnessPenalty
from .fit import FitReport, fit_modal
from .hankel import hankel_singular_values, order_for_tolerance
from .model import compare, distill
from .report import Calibration, DistillationReport, LayerReport
from .spectra import input_spectra


__all__ = [
    "Calibration",
    "DistillationReport",
    "FitReport",
    "HankelPenalty",
    "LayerReport",
    "RoughnessPenalty",
    "compare",
    "distill",
    "fit_modal",
    "hankel_singular_values",
    "input_spectra",
    "order_for_tolerance",
]
