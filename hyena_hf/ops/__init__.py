# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors: the mathematics of the Hyena family.

Layout: (B, L, D) at module edges, (B, D, L) inside convolutions. Letters, the same in every file: B batch, L length,
D channels, H heads, P head width, K taps. Time index `t`, lag `lag`.

| function | task |
|---|---|
| causal_fftconv | long causal convolution, gated, by FFT |
| bidirectional_fftconv | the same with a second filter over later tokens |
| filter_spectrum | transform filters once for many convolutions |
| use_backend | compute all long convolutions in a `with` block by one backend |
| short_conv | depthwise causal convolution with a few taps |
| hyena_conv | an order-2 operator between its projections, in one pass |
| multihead_conv | MultiHyena: one filter a head on outer products of keys and values |
| over_rows | run a sequence operator on dense rows, whatever the batch looks like |
"""

from .bidirectional import bidirectional_fftconv
from .engine import BACKENDS, use_backend
from .fftconv import FilterSpectrum, causal_fftconv, filter_spectrum
from .hyena_conv import hyena_conv
from .multihead import multihead_conv
from .segments import Rows, Segments, over_rows
from .short_conv import short_conv


__all__ = [
    "BACKENDS",
    "FilterSpectrum",
    "Rows",
    "Segments",
    "bidirectional_fftconv",
    "causal_fftconv",
    "filter_spectrum",
    "hyena_conv",
    "multihead_conv",
    "over_rows",
    "short_conv",
    "use_backend",
]
