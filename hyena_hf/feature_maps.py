# SPDX-License-Identifier: Apache-2.0
"""Feature maps of linear attention: phi with phi(q) . phi(k) in the place of exp(q . k / sqrt(P)).

| name | phi(x) | source |
|---|---|---|
| hedgehog | [exp(y), exp(-y)], y = W^T x + b | Zhang et al. 2024, arXiv 2402.04347 |
| hedgehog_softmax | [softmax(y), softmax(-y)] | LoLCATs, Zhang et al. 2024, arXiv 2410.10254 |
| hedgehog_joint_softmax | softmax([y, -y]) | flash-linear-attention's form, with its factor 2 in W |
| relu | relu(y) | T2R, Kasai et al. 2021, arXiv 2103.13076 |
| elu | 1 + elu(x) | Katharopoulos et al. 2020, arXiv 2006.16236 |
| exp_1, exp_2 | exp(t x), t = 1, 2 | a baseline of the Hedgehog paper |
| cosformer | relu(x) [cos(a), sin(a)], a = pi i / 2 M at position i | Qin et al. 2022, arXiv 2202.08791 |
| performer | exp(w^T z - z.z / 2) / sqrt(F), w normal | Choromanski et al. 2021, arXiv 2009.14794 |
| taylor | [1, z, z z^T / sqrt(2)] | Hedgehog paper; Arora et al. 2024, arXiv 2402.18668 |

In the last two z = x / P^(1/4), so that they estimate exp(s), and 1 + s + s^2 / 2, of the scaled score s.
W and b belong to one head of one layer, with one map for queries and one for keys; W starts as a multiple of the
identity (with more features than the head is wide, beside orthogonal matrices). Maps act after the rotary embedding
and hold no scaling of scores. Exponential maps give logarithms of features (`hyena_hf.ops.linear_attention`); features
are computed in float32 at least.

B batch, H heads, n tokens, P head width, D outputs of a learned map, F features.
"""

import math

import torch
from torch import Tensor, nn

from hyena_hf.ops.precision import outside_autocast


class FeatureMap(nn.Module):
    """phi for all heads of the queries, or of the keys, of one layer.

    Args:
        num_heads: H.
        head_dim: P.
        feature_dim: Width of what is learned or drawn (D); None: P. Maps without any refuse a number.
        max_length: Positions that a map of positions covers.
        initial_scale: Factor on the first weights of a learned map. With P^(1/4) the logarithm of a weight begins as
            softmax attention's does for small queries and keys, with q . k / sqrt(P); with 1 it is q . k / P, so that
            weights of untrained queries and keys differ sqrt(P) times less, and learning them takes longer.
    """

    is_log = False  # whether logarithms of features come out
    has_feature_dim = False
    sums_exponentials = False  # whether phi(q) . phi(k) is a sum of exponentials without a factor
    num_features: int

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        max_length: int = 1,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not self.has_feature_dim and feature_dim is not None:
            raise ValueError(f"{type(self).__name__} has a fixed number of features, got feature_dim={feature_dim}")
        if feature_dim is not None and feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, got {feature_dim}")
        self.num_heads, self.head_dim, self.max_length = num_heads, head_dim, max_length
        self.feature_dim = head_dim if feature_dim is None else feature_dim
        self.initial_scale = initial_scale
        self.num_features = self.count_features()
        self.add_tensors()

    def count_features(self) -> int:
        """F."""
        return self.feature_dim

    def add_tensors(self) -> None:
        """Give the module what it learns or keeps."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Features of queries or keys.

        Args:
            x: (B, H, n, P).
            positions: Index of every token in its sequence (n,) or (B, n); only the cosformer's map reads it.

        Returns:
            Features or their logarithms (B, H, n, F), in float32 at least.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shape of the map."""
        return f"{self.num_heads} heads, {self.head_dim} -> {self.num_features}"


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _orthogonal_matrix(width: int, generator: torch.Generator) -> Tensor:
    """A uniform orthogonal matrix, in float32 on the CPU, whatever the dtype and device that a model is made in."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, device="cpu", dtype=torch.float32))
    # without the signs of r, q is not uniform: its first column always points against the first axis
    return q * r.diagonal().sign()


class LearnedMap(FeatureMap):
    """y = W^T x + b in every head."""

    has_feature_dim = True

    def add_tensors(self) -> None:
        """W and b."""
        self.weight = nn.Parameter(self.initial_weight())
        self.bias = nn.Parameter(torch.zeros(self.num_heads, self.feature_dim))

    def initial_weight(self) -> Tensor:
        """`initial_scale` times the identity in every head (H, P, D).

        It is cut to D columns, or followed by orthogonal matrices where D is more. Not by zeros: a column of zeros in
        both maps has no gradient in [exp(y), exp(-y)], and several have the same in the other maps, so they would stay
        one feature. The matrices are alike in all maps of these widths.
        """
        generator = torch.Generator().manual_seed(0)
        blocks = [torch.eye(self.head_dim)]
        for _ in range(1, -(-self.feature_dim // self.head_dim)):
            blocks.append(_orthogonal_matrix(self.head_dim, generator).to(blocks[0]))
        one_head = torch.cat(blocks, dim=1)[:, : self.feature_dim]
        return self.initial_scale * one_head.repeat(self.num_heads, 1, 1)

    @outside_autocast
    def project(self, x: Tensor) -> Tensor:
        """W^T x + b for x (B, H, n, P), (B, H, n, D)."""
        exact = _exact(x)
        # one product of a head for all rows: matmul would copy the weights for each of them
        by_head = exact.transpose(0, 1).flatten(1, 2)
        y = torch.baddbmm(self.bias.to(exact.dtype).unsqueeze(1), by_head, self.weight.to(exact.dtype))
        return y.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


class HedgehogMap(LearnedMap):
    """[exp(y), exp(-y)]."""

    is_log = True
    sums_exponentials = True

    def count_features(self) -> int:
        """Two of every y."""
        return 2 * self.feature_dim

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Logarithms of features, as in `FeatureMap.forward`."""
        y = self.project(x)
        return torch.cat([y, -y], dim=-1)


class HedgehogSoftmaxMap(HedgehogMap):
    """[softmax(y), softmax(-y)]."""

    is_log = False
    sums_exponentials = False

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Features, as in `FeatureMap.forward`."""
        y = self.project(x)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


class HedgehogJointSoftmaxMap(HedgehogMap):
    """softmax([y, -y])."""

    is_log = False
    sums_exponentials = False

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Features, as in `FeatureMap.forward`."""
        y = self.project(x)
        return torch.cat([y, -y], dim=-1).softmax(-1)


class ReluMap(LearnedMap):
    """relu(y)."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Features, as in `FeatureMap.forward`."""
        return self.project(x).relu()


class EluMap(FeatureMap):
    """1 + elu(x)."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Features, as in `FeatureMap.forward`."""
        # exp below zero, written so that it does not round 1 + (exp(x) - 1) to 0
        x = _exact(x)
        return torch.where(x > 0, 1 + x, x.clamp(max=0).exp())


class ExpMap(FeatureMap):
    """exp(x)."""

    is_log = True
    sums_exponentials = True
    temperature = 1.0

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Logarithms of features, as in `FeatureMap.forward`."""
        return self.temperature * _exact(x)


class SharperExpMap(ExpMap):
    """exp(2 x)."""

    temperature = 2.0


class CosformerMap(FeatureMap):
    """relu(x) [cos(a), sin(a)], a = pi i / 2 M: phi(q) . phi(k) = relu(q) . relu(k) cos(pi (i - j) / 2 M)."""

    def count_features(self) -> int:
        """Two of every coordinate."""
        return 2 * self.head_dim

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Features, as in `FeatureMap.forward`."""
        if positions is None:
            raise ValueError("the cosformer map weighs keys by their distance: pass positions")
        x = _exact(x).relu()
        angle = positions.to(x.dtype) * (math.pi / 2 / self.max_length)
        angle = angle[..., None, :, None]
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


class PerformerMap(FeatureMap):
    """exp(w^T z - z.z / 2) / sqrt(F) for random w, in expectation the kernel of softmax."""

    is_log = True
    has_feature_dim = True
    directions: Tensor

    def add_tensors(self) -> None:
        """Directions w."""
        # saved with the model: other directions are another map, and queries and keys must share theirs
        self.register_buffer("directions", self.initial_directions().to(torch.get_default_dtype()))

    def initial_directions(self) -> Tensor:
        """Directions w (F, P), alike in all maps of these widths: orthogonal in blocks of P, with random lengths."""
        generator = torch.Generator().manual_seed(0)
        blocks = []
        for _ in range(-(-self.feature_dim // self.head_dim)):
            directions = _orthogonal_matrix(self.head_dim, generator).mT
            normal = torch.randn(self.head_dim, self.head_dim, generator=generator, device="cpu", dtype=torch.float32)
            blocks.append(directions * normal.norm(dim=1, keepdim=True))
        return torch.cat(blocks)[: self.feature_dim]

    @outside_autocast
    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Logarithms of features, as in `FeatureMap.forward`."""
        z = _exact(x) * self.head_dim**-0.25
        constant = z.square().sum(-1, keepdim=True) / 2 + math.log(self.num_features) / 2
        return z @ self.directions.to(z.dtype).mT - constant


class TaylorMap(FeatureMap):
    """[1, z, z z^T / sqrt(2)]; products of two coordinates once, with weight 1, instead of twice."""

    def count_features(self) -> int:
        """One, all coordinates, all products of two."""
        return 1 + self.head_dim + self.head_dim * (self.head_dim + 1) // 2

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # noqa: ARG002 (one interface)
        """Features, as in `FeatureMap.forward`."""
        z = _exact(x) * self.head_dim**-0.25
        first, second = torch.triu_indices(self.head_dim, self.head_dim, offset=1, device=z.device)
        squares = z.square() * 0.5**0.5
        return torch.cat([torch.ones_like(z[..., :1]), z, squares, z[..., first] * z[..., second]], dim=-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "hedgehog": HedgehogMap,
    "hedgehog_softmax": HedgehogSoftmaxMap,
    "hedgehog_joint_softmax": HedgehogJointSoftmaxMap,
    "relu": ReluMap,
    "elu": EluMap,
    "exp_1": ExpMap,
    "exp_2": SharperExpMap,
    "cosformer": CosformerMap,
    "performer": PerformerMap,
    "taylor": TaylorMap,
}


def make_feature_map(
    name: str,
    num_heads: int,
    head_dim: int,
    feature_dim: int | None = None,
    max_length: int = 1,
    initial_scale: float = 1.0,
) -> FeatureMap:
    """A feature map by its name in the table; the other arguments as in `FeatureMap`.

    Raises:
        ValueError: No map has that name, or this one takes no `feature_dim`.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"no feature map is called {name!r}; known are {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name](num_heads, head_dim, feature_dim, max_length, initial_scale)


__all__ = ["FEATURE_MAPS", "FeatureMap", "LearnedMap", "PerformerMap", "make_feature_map"]
