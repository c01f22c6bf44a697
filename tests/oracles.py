"""Compare any result of this package with a slow, obvious float64 version of it: the truth that all tests share.

Everything is written from the formulas, in numpy; nothing here imports our code or
torch. Convolutions are sums over lags, attention is a full matrix, no function knows caches, padding or dtypes.
`tests/test_oracles.py` holds these functions against the published reference outputs in `tests/golden`.

Shape letters: B batch, L length, D channels, N order, H heads, P head dim, K taps, E features, F filter width,
V vocabulary. "..." is any number of leading axes. Sequence functions work on (..., L, D), convolutions on (..., C, L).
A linear map is a dict {"weight": (out, in), "bias": (out,) or absent or None}; a block-diagonal weight is the list of
its blocks (N, out / N, in / N).

Real inputs are taken to float64. Complex inputs stay complex, and every function is analytic in its real arguments:
`directional_derivative` therefore differentiates any of them exactly, without step-size error.

Sources: the Hyena operator is Poli et al. 2023, arXiv 2302.10866, Definition 3.1, in the channel order of the
published code; MultiHyena is Massaroli et al. 2023, arXiv 2310.18780.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import erf


Array = np.ndarray


def exact(x: Array) -> Array:
    """`x` in float64, or in complex128 when it is complex."""
    x = np.asarray(x)
    return x.astype(np.result_type(x.dtype, np.float64))


def directional_derivative(function: Callable[[Array], Array], point: Array, direction: Array) -> Array:
    """d/de function(point + e * direction) at e = 0, exact to rounding (complex step: Squire and Trapp 1998).

    The function must be built from this module, or from analytic numpy functions without `abs`, `max` or `conj`.
    """
    step = 1e-30
    return np.imag(function(exact(point) + 1j * step * exact(direction))) / step


def expand_filters(h: Array, channels: int) -> Array:
    """Filters (H, ...) repeated to one per channel (C, ...): channel c uses filter c // (C // H)."""
    h = exact(h)
    if channels % h.shape[0]:
        raise ValueError(f"{channels} channels cannot share {h.shape[0]} filters equally")
    return h[np.arange(channels) // (channels // h.shape[0])]


def causal_conv(u: Array, h: Array, direct: Array | None = None) -> Array:
    """y[..., c, t] = sum_{s <= t} h[f, t - s] u[..., c, s] + direct[f] u[..., c, t] with f = c // (C // H).

    Args: u (..., C, L); h (H, K) with any K >= 1, taps beyond K are zero; direct (H,). Returns (..., C, L). O(L K).
    """
    u = exact(u)
    channels, length = u.shape[-2:]
    taps = expand_filters(h, channels)
    y = np.zeros(u.shape, np.result_type(u, taps))
    if direct is not None:
        y = y + expand_filters(direct, channels)[:, None] * u
    for lag in range(min(length, taps.shape[1])):
        y[..., lag:] += taps[:, lag, None] * u[..., : length - lag]
    return y


def causal_conv_gradients(u: Array, h: Array, direct: Array | None, dy: Array) -> tuple[Array, Array, Array | None]:
    """Adjoint of `causal_conv` at the output cotangent dy (..., C, L).

    du_s = sum_{t >= s} h_{t-s} dy_t + direct dy_s (a correlation); dh_k = sum_t dy_t u_{t-k}, summed over the batch
    and over the channels that share the filter; ddirect likewise at lag 0, None without `direct`.
    Returns du (..., C, L), dh (H, K), ddirect (H,).
    """
    u, dy = exact(u), exact(dy)
    channels, length = u.shape[-2:]
    taps = expand_filters(h, channels)
    filters, num_taps = np.shape(h)
    du = np.zeros(u.shape) if direct is None else expand_filters(direct, channels)[:, None] * dy
    dh = np.zeros((channels, num_taps))
    batch = tuple(range(u.ndim - 2))
    for lag in range(min(length, num_taps)):
        du[..., : length - lag] += taps[:, lag, None] * dy[..., lag:]
        dh[:, lag] = (dy[..., lag:] * u[..., : length - lag]).sum(axis=(*batch, -1))
    ddirect = None if direct is None else (dy * u).sum(axis=(*batch, -1)).reshape(filters, -1).sum(1)
    return du, dh.reshape(filters, -1, num_taps).sum(1), ddirect


def gated_causal_conv(
    u: Array, h: Array, direct: Array | None = None, pregate: Array | None = None, postgate: Array | None = None
) -> Array:
    """y = postgate * (h conv w + direct * w) with w = pregate * u; an absent gate is one. Gates are shaped like u."""
    w = exact(u) if pregate is None else exact(pregate) * exact(u)
    y = causal_conv(w, h, direct)
    return y if postgate is None else exact(postgate) * y


def gated_causal_conv_gradients(
    u: Array, h: Array, direct: Array | None, pregate: Array, postgate: Array, dy: Array
) -> dict[str, Array | None]:
    """Adjoint of `gated_causal_conv` with both gates, as a dict named after the arguments."""
    u, pregate, postgate, dy = exact(u), exact(pregate), exact(postgate), exact(dy)
    dw, dh, ddirect = causal_conv_gradients(pregate * u, h, direct, postgate * dy)
    dpostgate = dy * causal_conv(pregate * u, h, direct)
    return {"u": dw * pregate, "h": dh, "direct": ddirect, "pregate": dw * u, "postgate": dpostgate}


def bidirectional_conv(u: Array, h: Array, h_reverse: Array, direct: Array | None = None) -> Array:
    """y_t = sum_{s <= t} h_{t-s} u_s + sum_{s > t} h_reverse_{s-t-1} u_s + direct * u_t (Monarch Mixer's convention).

    Lag 0 belongs to h alone; h_reverse starts at the next token. Args as in `causal_conv`, h_reverse (H, K').
    """
    y = causal_conv(u, h, direct)
    future = causal_conv(exact(u)[..., ::-1], h_reverse)[..., ::-1]
    y = y.astype(np.result_type(y, future))
    y[..., :-1] += future[..., 1:]
    return y


def short_conv(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Depthwise causal convolution of x (..., L, C): y_t = bias + sum_i weight[:, i] x_{t-(K-1)+i}.

    weight (C, K) in torch's order (a Conv1d's (C, 1, K) is accepted): the last tap multiplies the current token.
    """
    x, weight = exact(x), exact(weight)
    weight = weight.reshape(weight.shape[0], -1)
    y = np.swapaxes(causal_conv(np.swapaxes(x, -1, -2), weight[:, ::-1]), -1, -2)
    return y if bias is None else y + exact(bias)


def float32_linspace(start: float, end: float, count: int, length: int | None = None) -> Array:
    """`torch.linspace(start, end, count)` bit by bit in float32, continued with the same step up to `length` values.

    step = float32((end - start) / (count - 1)); the first half counts from the start, the rest from the end, each
    value rounded once. Values past `count` go on counting from the end, so the first values never depend on `length`.
    """
    length = count if length is None else length
    start, end = np.float32(start), np.float32(end)
    if count == 1:
        if length > 1:
            raise ValueError("one point has no step: nothing to continue")
        return np.full(length, start)
    step = float((end - start) / np.float32(count - 1))
    n = np.arange(length)
    return np.where(n < count // 2, float(start) + step * n, float(end) - step * (count - 1 - n)).astype(np.float32)


def filter_times(trained_length: int, length: int | None = None) -> Array:
    """t_n = n / (M - 1) as float32 values in float64, n < length; M is the trained length. Shape (length,)."""
    return float32_linspace(0.0, 1.0, trained_length, length).astype(np.float64)


def positional_features(trained_length: int, num_bands: int, length: int | None = None) -> Array:
    """z_n = [t_n, cos(theta_n1), ..., cos(theta_nb), -sin(theta_n1), ..., -sin(theta_nb)], shape (length, 2 b + 1).

    theta = f_b * (2 pi n / M) with f = linspace(1e-4, num_bands - 1, num_bands): the real and imaginary parts of
    exp(-i theta). t, f and theta are float32 numbers because the published models hold them so: taken to float64 only
    afterwards. The published tables differ from these by one float32 rounding of some cosines (6e-8).
    """
    length = trained_length if length is None else length
    t = float32_linspace(0.0, 1.0, trained_length, length)
    frequencies = float32_linspace(1e-4, num_bands - 1, num_bands)
    turns = np.float32(2 * np.pi) * np.arange(length, dtype=np.float32) / np.float32(trained_length)
    angles = (frequencies[None, :] * turns[:, None]).astype(np.float64)
    table = np.concatenate([t[:, None].astype(np.float64), np.cos(angles), -np.sin(angles)], axis=1)
    return table.astype(np.float32).astype(np.float64)


def decay_rates(channels: int, fast_decay: float = 0.3, slow_decay: float = 1.5, target: float = 1e-2) -> Array:
    """linspace(log(target) / slow_decay, log(target) / fast_decay, channels): negative float32 values in float64."""
    slow, fast = np.log(target) / slow_decay, np.log(target) / fast_decay
    return float32_linspace(slow, fast, channels).astype(np.float64)


def implicit_filter(
    features: Array,
    linears: list[dict[str, Array | None]],
    frequency: Array,
    times: Array | None = None,
    decays: Array | None = None,
    shift: float = 0.0,
) -> Array:
    """Taps (C, length) of a sine MLP over positional features (length, E), then exponential modulation.

    Every linear but the last is followed by x -> sin(frequency * x); frequency (F,) is shared by all of them.
    h_{c,n} is multiplied by exp(-times_n |decays_c|) + shift; without `decays` there is no modulation.
    """
    x = exact(features)
    for layer in linears[:-1]:
        x = np.sin(exact(frequency).reshape(-1) * linear(x, layer))
    h = linear(x, linears[-1])  # (length, C)
    if decays is not None:
        h = h * (np.exp(-np.outer(exact(times).reshape(-1), np.abs(exact(decays).reshape(-1)))) + shift)
    return h.T


def modal_filter(poles: Array, residues: Array, direct: Array, length: int) -> Array:
    """Taps (..., length) of h_0 = direct, h_t = Re sum_n residues_n poles_n^(t - 1): poles, residues (..., N).

    Massaroli et al. 2023, arXiv 2310.18780, section 3. Powers by repeated multiplication.
    """
    power, taps = np.ones_like(poles), [direct]
    for _ in range(length - 1):
        taps.append((residues * power).sum(-1).real)
        power = power * poles
    return np.stack(taps, axis=-1)


def unpack_channels(packed: Array, order: int, channel_major: bool = False) -> Array:
    """Packed filter channels (D (N - 1), ...) as (N - 1, D, ...).

    (order, channel) packing, row o * D + d: the standalone code, HyenaDNA, and this package. `channel_major`, row
    d * (N - 1) + o: safari. The two differ only for order > 2.
    """
    packed = exact(packed)
    if channel_major:
        return np.swapaxes(packed.reshape(-1, order - 1, *packed.shape[1:]), 0, 1)
    return packed.reshape(order - 1, -1, *packed.shape[1:])


def linear(x: Array, layer: dict[str, Array | None]) -> Array:
    """x (..., in) W^T + b -> (..., out)."""
    weight = exact(layer["weight"])
    if weight.ndim == 3:
        parts = np.split(exact(x), len(weight), axis=-1)
        y = np.concatenate([part @ block.T for part, block in zip(parts, weight, strict=True)], axis=-1)
    else:
        y = exact(x) @ weight.T
    return y if layer.get("bias") is None else y + exact(layer["bias"])


def layer_norm(x: Array, weight: Array, bias: Array | None = None, eps: float = 1e-5) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, biased variance."""
    x = exact(x)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * exact(weight)
    return y if bias is None else y + exact(bias)


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = exact(x)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * exact(weight)


def gelu_tanh(x: Array) -> Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): Hendrycks and Gimpel 2016, the approximation GPT-2 uses."""
    x = exact(x)
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    """x Phi(x) with the exact normal distribution function."""
    x = exact(x)
    return 0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))


def silu(x: Array) -> Array:
    """x sigmoid(x), written with tanh so that large negative x does not overflow."""
    x = exact(x)
    return 0.5 * x * (1.0 + np.tanh(0.5 * x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu,
    "silu": silu,
    "linear": lambda x: x,
}


def mlp(x: Array, params: dict[str, dict[str, Array | None]], hidden_act: str = "gelu_pytorch_tanh") -> Array:
    """down(act(up x)), or down(act(gate x) * up x) when params has a "gate"; all three are linears.

    With a "gate_up" instead, its first half of outputs is the gate and its second is up.
    """
    act = ACTIVATIONS[hidden_act]
    if "gate_up" in params:
        gate, up = np.split(linear(x, params["gate_up"]), 2, axis=-1)
        return linear(act(gate) * up, params["down"])
    up = linear(x, params["up"])
    return linear(act(linear(x, params["gate"])) * up if "gate" in params else act(up), params["down"])


def multihyena_core(q: Array, k: Array, v: Array, h: Array, skip: Array | None = None) -> Array:
    """y_t = q_t^T Z_t with Z_t = sum_{s <= t} h_{t-s} k_s v_s^T + skip k_t v_t^T, one filter and one skip per head.

    q, k, v (..., D, L), channel c belongs to head c // P; h (H, K), skip (H,). The P x P states of a head are formed.
    Source: Massaroli et al. 2023, arXiv 2310.18780 (MultiHyena).
    """
    q, k, v = exact(q), exact(k), exact(v)
    channels, length = q.shape[-2:]
    num_heads = len(h)
    head_dim = channels // num_heads
    if head_dim * num_heads != channels:
        raise ValueError(f"{channels} channels cannot form {num_heads} heads")
    outputs = []
    for head in range(num_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        z = k[..., own, None, :] * v[..., None, own, :]  # (..., P_k, P_v, L)
        flat = z.reshape(*z.shape[:-3], head_dim * head_dim, length)
        state = causal_conv(flat, h[head : head + 1], None if skip is None else skip[head : head + 1])
        outputs.append((q[..., own, None, :] * state.reshape(z.shape)).sum(-3))  # over P_k
    return np.concatenate(outputs, axis=-2)


def hyena_operator(u: Array, params: dict) -> Array:
    """The Hyena operator of any order N >= 2 on u (..., L, D); with MultiHyena heads when it has fewer filters than D.

    params: "in_proj" linear D -> (N + 1) D; "short_conv" {"weight" ((N + 1) D, K), "bias"}; "h" (N - 1, H, taps);
    "skip" (N - 1, H) or absent; "out_proj" linear D -> D; "h_reverse" (N - 1, H, taps) makes it bidirectional;
    "residual" {"h", "h_reverse" (D, taps), "skip" (D,)} adds such a convolution of u before out_proj (Monarch Mixer).
    The projection splits into x_0, x_1, ..., x_{N-1}, v; then v <- h_o conv (x_i v) + skip_o x_i v for the gates
    i = N - 1, ..., 1 with o = 0, ..., N - 2, and the output is out_proj(x_0 v).
    """
    num_steps, num_heads, _ = np.shape(params["h"])
    width = np.shape(u)[-1]
    projected = short_conv(
        linear(u, params["in_proj"]), params["short_conv"]["weight"], params["short_conv"].get("bias")
    )
    *gates, v = np.split(np.swapaxes(projected, -1, -2), num_steps + 2, axis=-2)
    skip = params.get("skip")
    if num_heads < width:
        if num_steps != 1 or "h_reverse" in params:
            raise ValueError("fewer heads than channels are defined for causal order 2 only")
        y = multihyena_core(gates[0], gates[1], v, params["h"][0], None if skip is None else skip[0])
        return linear(np.swapaxes(y, -1, -2), params["out_proj"])
    for step in range(num_steps):
        v = gates[num_steps - step] * v
        direct = None if skip is None else skip[step]
        if "h_reverse" in params:
            v = bidirectional_conv(v, params["h"][step], params["h_reverse"][step], direct)
        else:
            v = causal_conv(v, params["h"][step], direct)
    y = gates[0] * v
    if "residual" in params:
        y = y + bidirectional_conv(np.swapaxes(exact(u), -1, -2), **_taps(params["residual"]))
    return linear(np.swapaxes(y, -1, -2), params["out_proj"])


def _taps(params: dict) -> dict:
    return {"h": params["h"], "h_reverse": params["h_reverse"], "direct": params["skip"]}


def rotary_tables(positions: Array, head_dim: int, theta: float = 10000.0) -> tuple[Array, Array]:
    """cos and sin (L, P) of positions * theta^(-2 i / P), i < P / 2, repeated once (Su et al. 2021, Llama layout).

    Everything in float64; Llama computes the angles in float32, which differs by about 1e-7 times the position.
    """
    rates = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.tile(np.outer(exact(positions), rates), 2)
    return np.cos(angles), np.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x cos + [-second half, first half] sin: rotary positions in the half-split convention, x (..., L, P)."""
    x = exact(x)
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin


def softmax(x: Array) -> Array:
    """Softmax over the last axis; entries of real part -inf get weight zero."""
    weights = np.exp(x - np.real(x).max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, window: int | None = None, causal: bool = True) -> Array:
    """Softmax attention of q (..., H, L, P) over k, v (..., G, L, P); query head i reads group i // (H // G).

    Token t sees s <= t (all s if not causal), and with a window only |t - s| < window: itself and window - 1 before it
    (and after it if not causal).
    Scores are scaled by P^-1/2. Returns (..., H, L, P).
    """
    q, k, v = exact(q), exact(k), exact(v)
    repeats = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, repeats, axis=-3), np.repeat(v, repeats, axis=-3)
    lag = np.subtract.outer(np.arange(q.shape[-2]), np.arange(q.shape[-2]))
    visible = (lag >= 0) | (not causal)
    if window is not None:
        visible &= abs(lag) < window
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    return softmax(np.where(visible, scores, -np.inf)) @ v


def feature_map(x: Array, params: dict) -> Array:
    """phi of heads x (..., H, L, P), (..., H, L, F).

    params: "name" of a map of `hyena_hf.feature_maps`; "weight" (H, P, D), "bias" (H, D) of learned ones; "directions"
    (F, P) of the Performer; "max_length" of the cosformer.
    """
    x, name = exact(x), params["name"]
    if "weight" in params:
        y = np.einsum("...hlp,hpf->...hlf", x, exact(params["weight"])) + exact(params["bias"])[:, None]
        if name == "hedgehog":
            return np.concatenate([np.exp(y), np.exp(-y)], axis=-1)
        if name == "hedgehog_softmax":
            return np.concatenate([softmax(y), softmax(-y)], axis=-1)
        if name == "hedgehog_joint_softmax":
            return softmax(np.concatenate([y, -y], axis=-1))
        return np.maximum(y, 0)
    z = x / x.shape[-1] ** 0.25
    if name == "performer":
        w = exact(params["directions"])
        return np.exp(z @ w.T - (z**2).sum(-1, keepdims=True) / 2) / np.sqrt(len(w))
    if name == "taylor":
        outer = (z[..., :, None] * z[..., None, :]).reshape(*z.shape[:-1], -1)
        return np.concatenate([np.ones_like(z[..., :1]), z, outer / np.sqrt(2)], axis=-1)
    if name == "cosformer":
        angle = (np.pi / 2 / params["max_length"]) * np.arange(x.shape[-2])[:, None]
        return np.concatenate([np.maximum(x, 0) * np.cos(angle), np.maximum(x, 0) * np.sin(angle)], axis=-1)
    if name == "elu":
        return np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0)))
    return np.exp({"exp_1": 1, "exp_2": 2}[name] * x)


def linear_attention(q: Array, k: Array, v: Array, params: dict) -> Array:
    """Linear attention of q (..., H, L, P) over k, v (..., G, L, P), pair by pair; returns (..., H, L, P).

    params: "q_map" and "k_map" as in `feature_map`; "window", 0 or the number of tokens with softmax weights; its
    logit "window_factor" (H,); "joint", whether these weights are on the scale of the scores instead of relative to
    the largest in the window; optional "causal".
    """
    repeats = q.shape[-3] // k.shape[-3]
    keys = np.repeat(feature_map(k, params["k_map"]), repeats, axis=-3)
    k, v = np.repeat(exact(k), repeats, axis=-3), np.repeat(exact(v), repeats, axis=-3)
    lag = np.subtract.outer(np.arange(q.shape[-2]), np.arange(q.shape[-2]))
    visible, window = (lag >= 0) | (not params.get("causal", True)), params["window"]
    weights = np.where(visible & (abs(lag) >= window), feature_map(q, params["q_map"]) @ np.swapaxes(keys, -1, -2), 0)
    if window:
        if params["q_map"]["name"] in ("hedgehog", "exp_1", "exp_2"):
            weights = weights / keys.shape[-1]  # the mean of products of exponentials, on the scale of exp(score)
        near = visible & (abs(lag) < window)
        scores = np.where(near, exact(q) @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]), -np.inf)
        top = 0 if params["joint"] else scores.max(-1, keepdims=True)
        weights = weights + np.exp(scores - top) / (1 + np.exp(-exact(params["window_factor"])))[:, None, None]
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


def attention_mixer(u: Array, params: dict) -> Array:
    """Attention layer on u (..., L, D) with rotary positions.

    params: linears "q_proj", "k_proj", "v_proj", "o_proj"; "num_heads", "num_key_value_heads"; optional "window",
    "causal", "rope_theta" (default 10000), or "rotary" = (cos, sin) to use given tables; "linear", the params
    of linear attention.
    """
    length = np.shape(u)[-2]

    def heads(name: str, count: int) -> Array:
        x = linear(u, params[name])
        return np.swapaxes(x.reshape(*x.shape[:-1], count, -1), -2, -3)

    q = heads("q_proj", params["num_heads"])
    k = heads("k_proj", params["num_key_value_heads"])
    v = heads("v_proj", params["num_key_value_heads"])
    cos, sin = params.get("rotary") or rotary_tables(np.arange(length), q.shape[-1], params.get("rope_theta", 10000.0))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if "linear" in params:
        y = linear_attention(q, k, v, params["linear"])
    else:
        y = attention(q, k, v, params.get("window"), params.get("causal", True))
    y = np.swapaxes(y, -2, -3)
    return linear(y.reshape(*y.shape[:-2], -1), params["o_proj"])


def norm(x: Array, params: dict[str, Array | None], norm_type: str = "layer", eps: float = 1e-5) -> Array:
    """`layer_norm` or `rms_norm`: "layer", "rms", or "rms_outer", whose epsilon is added to the root."""
    if norm_type == "layer":
        return layer_norm(x, params["weight"], params.get("bias"), eps)
    if norm_type == "rms":
        return rms_norm(x, params["weight"], eps)
    if norm_type == "rms_outer":
        root = np.sqrt((exact(x) ** 2).mean(-1, keepdims=True))
        return exact(x) / (root + eps) * exact(params["weight"])
    raise ValueError(f"norm_type {norm_type!r}: expected 'layer', 'rms' or 'rms_outer'")


def mixer(u: Array, params: dict) -> Array:
    """`attention_mixer` if params has a "q_proj", else `hyena_operator`."""
    return attention_mixer(u, params) if "q_proj" in params else hyena_operator(u, params)


def hidden_states(
    input_ids: Array,
    params: dict,
    norm_type: str = "layer",
    eps: float = 1e-5,
    hidden_act: str | list[str] = "gelu_pytorch_tanh",
) -> Array:
    """Pre-norm residual decoder: x += mixer(norm1 x); x += mlp(norm2 x) per layer; final norm. Returns (..., L, D).

    params: "embedding" (V, D); "layers", a list of {"norm1", "mixer", "norm2", "mlp"}; "final_norm"; and for
    `logits` optionally "lm_head" (V, D), the embedding when absent.
    """
    x = exact(params["embedding"])[np.asarray(input_ids)]
    for index, layer in enumerate(params["layers"]):
        act = hidden_act if isinstance(hidden_act, str) else hidden_act[index]
        x = x + mixer(norm(x, layer["norm1"], norm_type, eps), layer["mixer"])
        x = x + mlp(norm(x, layer["norm2"], norm_type, eps), layer["mlp"], act)
    return norm(x, params["final_norm"], norm_type, eps)


def monarch_mixer_states(input_ids: Array, params: dict, types: Array | None = None, eps: float = 1e-12) -> Array:
    """The encoder M2-BERT: y = mixer(x), x = norm(y + mlp(y)) per layer, without a residual around the mixer.

    params: "embedding" (V, D), optionally "types" (T, D) and "positions" (M, D), whose rows are added; "embed_norm",
    which follows; "layers", a list of {"mixer", "mlp", "norm"} and optionally "mixer_norm", which comes before the
    mixer and has the epsilon 1e-5. Returns (..., L, D). The MLP has the exact GELU.
    """
    ids = np.asarray(input_ids)
    x = exact(params["embedding"])[ids]
    if "types" in params:
        x = x + exact(params["types"])[np.zeros_like(ids) if types is None else np.asarray(types)]
    if "positions" in params:
        x = x + exact(params["positions"])[: ids.shape[-1]]
    x = norm(x, params["embed_norm"], eps=eps)
    for layer in params["layers"]:
        y = mixer(norm(x, layer["mixer_norm"]) if "mixer_norm" in layer else x, layer["mixer"])
        x = norm(y + mlp(y, layer["mlp"], "gelu"), layer["norm"], eps=eps)
    return x


def bert_logits(hidden: Array, params: dict, eps: float = 1e-12) -> Array:
    """BERT's head: norm(gelu(dense(x))) against the embedding, and a bias; params "dense", "norm", "bias"."""
    return logits(norm(gelu(linear(hidden, params["dense"])), params["norm"], eps=eps), params) + params["bias"]


def bert_pooler(hidden: Array, pooler: dict, mean: bool = False) -> Array:
    """tanh(dense(x)) of the first token or of the mean over all, (..., L, D) -> (..., D)."""
    return np.tanh(linear(hidden.mean(-2) if mean else hidden[..., 0, :], pooler))


def logits(hidden: Array, params: dict) -> Array:
    """hidden (..., L, D) against every row of the output embedding: (..., L, V)."""
    return exact(hidden) @ exact(params.get("lm_head", params["embedding"])).T


def next_token_loss(scores: Array, labels: Array, ignore_index: int = -100) -> Array:
    """Mean of -log softmax(scores_t)[labels_{t+1}] over t < L - 1 and the batch, skipping ignored labels.

    scores (..., L, V), labels (..., L) unshifted, as transformers takes them.
    """
    scores, targets = exact(scores)[..., :-1, :], np.asarray(labels)[..., 1:]
    kept = targets != ignore_index
    probabilities = softmax(scores[kept])
    return -np.log(probabilities[np.arange(kept.sum()), targets[kept]]).mean()
