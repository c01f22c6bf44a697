# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors: the mathematics of the Hyena family.

Layout: (B, L, D) at module edges, (B, D, L) inside convolutions. Letters, the same in every file: B batch, L length,
D channels, H heads, P head width, K taps. Time index `t`, lag `lag`.

| function | task |
|---|---|
| causal_fftconv | long causal convolution, gated, by FFT |
| bidirectional_fftconv | the same with a second filter over later tokens |
| short_conv | depthwise causal convolution with a few taps |
| multihead_conv | MultiHyena: one filter a head on outer products of keys and values |
| over_rows | run a sequence operator on dense rows, whatever the batch looks like |
"""

from .bidirectional import bidirectional_fftconv
from .fftconv import causal_fftconv
from .multihead import multihead_conv
from .segments import Rows, Segments, over_rows
from .short_conv import short_conv


__all__ = ["Rows", "Segments", "bidirectional_fftconv", "causal_fftconv", "multihead_conv", "over_rows", "short_conv"]
