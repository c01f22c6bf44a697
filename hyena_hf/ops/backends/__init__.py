# SPDX-License-Identifier: Apache-2.0
"""The ways to compute a long convolution, one module each with the same three functions.

    refusal(u, h, direct, pregate, postgate)                  why it cannot serve these tensors, None if it can
    forward(u, h, direct, pregate, postgate)                  y = postgate * (h conv w + direct * w), w = pregate * u
    backward(grad, u, h, direct, pregate, postgate, needs)    gradients of the five tensors where needs[i], else None

`hyena_hf.ops.engine` chooses and calls. `torch` and `blocked` are `fft`; it, `overlap_save` and `matrix` have forms of
their own. Shapes: u, gates (B, C, L), h (H, K), direct (H,).

Beside them stands `triton_linear`, which sums linear attention for `hyena_hf.ops.linear_attention`.
"""
