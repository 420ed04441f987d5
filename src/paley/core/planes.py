"""Products of two-bit weights and four-bit inputs by bit planes: the op `paley::planes_matmul` and its reference.

A weight is one of four values for its row and group of columns, c[q + 2s]; an input is scale · (code - zero), its code
in 0..15. With the bit maps Q and S of a row, the planes X_a of a token's codes, and P for popcount, a group's part of
the product is (W(1+1)A(1×4), arXiv:2504.05352)

    scale · { Σ_a 2^a · [ c₀·P(X_a) + (c₂-c₀)·P(X_a&S) + (c₁-c₀)·P(X_a&Q) + (c₃-c₂-c₁+c₀)·P(X_a&S&Q) ] - zero · Σw }

`reference` defines the result: it writes the weight out and multiplies. Native kernels (`paley.kernels`) compute this
formula in integers, and the tests compare them with it. The paper's two-scale weights are mirrored centroids
-b, -a, a, b. Their last coefficient is zero, so that a kernel needs only two of the three sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = [
    "PreparedWeight",
    "check_inputs",
    "check_weight",
    "matmul",
    "prepare",
    "reference",
]

_BLOCK = 2**22  # weights that the reference writes out at a time


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in the backend's layout: `prepare` makes it, `matmul` takes it.

    weight: codes uint8 [out, n] with centroids float16 [out, groups, 4]; for native kernels, uint8 [bytes].
    """

    weight: Tensor
    centroids: Tensor | None
    out: int


def prepare(codes: Tensor, centroids: Tensor) -> PreparedWeight:
    """codes uint8 [out, n] in 0..3, centroids float16 [out, groups, 4] -> the weight for `matmul`, on their device.

    W[r, i] = centroids[r, i // group_size, codes[r, i]] with group_size = n / groups. Call it once a weight.
    Errors: PaleyError for other shapes and dtypes, larger codes, and centroids that are not finite.
    """
    check_weight(codes, centroids)
    if codes.numel() and (largest := int(codes.max())) > 3:
        raise PaleyError(f"planes: weight codes must be 0 to 3, got {largest}")
    if not centroids.isfinite().all():
        raise PaleyError("planes: the centroids hold NaN or infinities; give finite ones")
    weight = torch.ops.paley.planes_pack(codes, centroids)
    return PreparedWeight(weight, centroids if weight.dim() == 2 else None, len(codes))


def matmul(x_codes: Tensor, x_scales: Tensor, x_zeros: Tensor, prepared: PreparedWeight) -> Tensor:
    """x_codes uint8 [tokens, n], x_scales float32 and x_zeros [tokens, groups] -> float32 [tokens, out]: y = X Wᵀ.

    X[t, i] = x_scales[t, g] · (x_codes[t, i] - x_zeros[t, g]) with g = i // group_size. Zeros are uint8, or whole
    numbers of any dtype. Codes and zeros must be 0 to 15. This is not checked, as the check would take as
    long as some products; larger ones may give wrong numbers. Errors: PaleyError. Not differentiable.
    """
    if x_zeros.dtype != torch.uint8:
        x_zeros = x_zeros.to(torch.uint8)
    return torch.ops.paley.planes_matmul(x_codes, x_scales, x_zeros, prepared.weight, prepared.centroids, prepared.out)


def reference(
    x_codes: Tensor, x_scales: Tensor, x_zeros: Tensor, weight: Tensor, centroids: Tensor | None, out: int
) -> Tensor:
    """As `matmul`, from codes and centroids, in plain torch on any device: both sides dequantized to float32."""
    check_inputs(x_codes, x_scales, x_zeros)
    _check_devices(x_codes, weight)
    if centroids is None:
        why = "are off now" if weight.device.type == "cpu" else f"run on the CPU only, not on {weight.device}"
        raise PaleyError(f"planes: this weight was packed for native kernels, which {why}; prepare it again")
    check_weight(weight, centroids)
    _check_pair(x_codes, x_scales, weight, centroids, out)
    groups = x_scales.shape[1]
    x = (x_codes.unflatten(1, (groups, -1)).float() - x_zeros.float()[..., None]) * x_scales[..., None]
    y = x_codes.new_empty(len(x_codes), out, dtype=torch.float32)
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    for row in range(0, out, step):
        rows = slice(row, row + step)
        columns = weight[rows].unflatten(1, (groups, -1)).long()
        y[:, rows] = x.flatten(1) @ centroids[rows].float().gather(2, columns).flatten(1).T
    return y


def check_weight(codes: Tensor, centroids: Tensor) -> None:
    if codes.dtype != torch.uint8 or centroids.dtype != torch.float16:
        raise PaleyError(f"planes: takes codes uint8 and centroids float16, got {codes.dtype} and {centroids.dtype}")
    if codes.dim() != 2 or centroids.dim() != 3 or centroids.shape[2] != 4 or len(codes) != len(centroids):
        raise PaleyError(
            "planes: codes must be [out, n] and centroids [out, groups, 4], "
            f"got {list(codes.shape)} and {list(centroids.shape)}"
        )
    n, groups = codes.shape[1], centroids.shape[1]
    if 0 in codes.shape or groups == 0 or n % groups:
        raise PaleyError(f"planes: {n} columns do not make {groups} equal groups in {len(codes)} rows; pad the weight")
    if codes.device != centroids.device:
        raise PaleyError(f"planes: codes are on {codes.device} and centroids on {centroids.device}; move one")


def check_inputs(x_codes: Tensor, x_scales: Tensor, x_zeros: Tensor) -> None:
    if (x_codes.dtype, x_scales.dtype, x_zeros.dtype) != (torch.uint8, torch.float32, torch.uint8):
        raise PaleyError(
            "planes: takes input codes uint8, scales float32 and zeros uint8, "
            f"got {x_codes.dtype}, {x_scales.dtype} and {x_zeros.dtype}"
        )
    if x_codes.dim() != 2 or x_scales.dim() != 2 or x_scales.shape != x_zeros.shape or len(x_codes) != len(x_scales):
        raise PaleyError(
            "planes: input codes must be [tokens, n], scales and zeros [tokens, groups], "
            f"got {list(x_codes.shape)}, {list(x_scales.shape)} and {list(x_zeros.shape)}"
        )
    n, groups = x_codes.shape[1], x_scales.shape[1]
    if groups == 0 or n == 0 or n % groups:
        raise PaleyError(f"planes: {n} input columns do not make {groups} equal groups")
    if not x_codes.device == x_scales.device == x_zeros.device:
        raise PaleyError(f"planes: inputs are on {x_codes.device}, {x_scales.device} and {x_zeros.device}; move them")


def _check_devices(x_codes: Tensor, weight: Tensor) -> None:
    if x_codes.device != weight.device:
        raise PaleyError(
            f"planes: the inputs are on {x_codes.device}, but the weight was prepared on {weight.device}; "
            "move the inputs, or prepare the weight where they are"
        )


def _check_pair(x_codes: Tensor, x_scales: Tensor, codes: Tensor, centroids: Tensor, out: int) -> None:
    _check_devices(x_codes, codes)
    have, want = (x_codes.shape[1], x_scales.shape[1], out), (codes.shape[1], centroids.shape[1], len(codes))
    if have != want:
        raise PaleyError(f"planes: the inputs are for (columns, groups, out) = {have}, but the weight is of {want}")


def _as_they_are(codes: Tensor, centroids: Tensor) -> Tensor:
    """The reference packs nothing. It returns a copy, as an op may not return its own argument."""
    check_weight(codes, centroids)
    return codes.clone()


# A fragment, as other files declare ops in the same namespace. It must stay alive: the ops are removed with it.
_LIBRARY = torch.library.Library("paley", "FRAGMENT")
_LIBRARY.define("planes_pack(Tensor codes, Tensor centroids) -> Tensor")
_LIBRARY.define(
    "planes_matmul(Tensor x_codes, Tensor x_scales, Tensor x_zeros, "
    "Tensor weight, Tensor? centroids, int out) -> Tensor"
)
_LIBRARY.impl("planes_pack", _as_they_are, "CompositeExplicitAutograd")
_LIBRARY.impl("planes_matmul", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("paley::planes_matmul", lib=_LIBRARY)
def _shape(
    x_codes: Tensor, x_scales: Tensor, x_zeros: Tensor, weight: Tensor, centroids: Tensor | None, out: int
) -> Tensor:
    check_inputs(x_codes, x_scales, x_zeros)
    return x_codes.new_empty(len(x_codes), out, dtype=torch.float32)
