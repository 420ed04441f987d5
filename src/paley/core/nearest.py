"""The nearest point of a grid, exactly: the op `paley::nearest_points` and its reference.

The code of a vector x is the index of the greatest score -|c|²/2 + x₀c₀ + x₁c₁ + …, summed in float64 in this order,
and the lowest index of equal scores. A product of two float32 is exact in float64, so only these few sums round. Every
device and every kernel therefore gives the same codes and the same checkpoint bytes. Infinities count as the largest
float32, NaN as 0. Native kernels (`paley.kernels`) can replace the code here and must agree with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["MAX_DIM", "MAX_POINTS", "check", "nearest_points", "prepare", "reference"]

MAX_DIM, MAX_POINTS = 8, 65536
_BLOCK = 2**17  # scores at a time: 1 MB stays in a CPU's cache
_GPU_BLOCK = 2**22


def nearest_points(x: Tensor, points: Tensor) -> Tensor:
    """x [..., p], points [n, p], any floating dtypes, compared as float32 -> int32 [...]: indices of nearest points.

    p <= 8, n <= 65536, points finite. Errors: PaleyError. Not differentiable.
    """
    return torch.ops.paley.nearest_points(x, points)


def prepare(x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., p], points [n, p] -> what kernels read: x [N, p] and points, float32 and contiguous."""
    x, points = x.reshape(-1, x.shape[-1]).float().contiguous(), points.float().contiguous()
    if not points.isfinite().all():
        raise PaleyError("nearest_points: the points hold NaN or infinities; give finite points")
    return x, points


def reference(x: Tensor, points: Tensor) -> Tensor:
    """`nearest_points` in plain torch, on any device, a block of vectors at a time."""
    check(x, points)
    shape = x.shape[:-1]
    x, points = prepare(x, points)
    largest = torch.finfo(torch.float32).max
    x = x.nan_to_num(nan=0.0, posinf=largest, neginf=-largest)
    coordinates = points.double().unbind(1)
    squares = torch.zeros_like(coordinates[0])
    for c in coordinates:
        squares += c * c
    block = _BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    codes = [_codes(part, squares, coordinates) for part in x.split(max(1, block // len(points)))]
    return torch.cat(codes).view(shape)


def _codes(x: Tensor, squares: Tensor, coordinates: tuple[Tensor, ...]) -> Tensor:
    """x [block, p], squares and each of the p coordinates [n] -> int32 [block]."""
    scores = (squares * -0.5).expand(len(x), -1).contiguous()
    for a, c in zip(x.double().unbind(1), coordinates, strict=True):
        scores.addcmul_(a[:, None], c)  # no matmul: its order of summation depends on the library
    return scores.max(1).indices.int()  # the first of equal scores


def check(x: Tensor, points: Tensor) -> None:
    if not (x.is_floating_point() and points.is_floating_point()):
        raise PaleyError(f"nearest_points: takes floating-point tensors, got {x.dtype} and {points.dtype}")
    if points.dim() != 2 or not 1 <= points.shape[0] <= MAX_POINTS or not 1 <= points.shape[1] <= MAX_DIM:
        raise PaleyError(
            f"nearest_points: points must be [n, p] with n <= {MAX_POINTS} and p <= {MAX_DIM}, got {list(points.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != points.shape[1]:
        raise PaleyError(
            f"nearest_points: x must be [..., {points.shape[1]}], as the points are, got {list(x.shape)}; reshape it"
        )
    if x.device != points.device:
        raise PaleyError(f"nearest_points: x is on {x.device} and the points on {points.device}; move one")


# A fragment, as other files declare ops in the same namespace. It must stay alive: the op is removed with it.
_LIBRARY = torch.library.Library("paley", "FRAGMENT")
_LIBRARY.define("nearest_points(Tensor x, Tensor points) -> Tensor")
_LIBRARY.impl("nearest_points", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("paley::nearest_points", lib=_LIBRARY)
def _shape(x: Tensor, points: Tensor) -> Tensor:
    check(x, points)
    return x.new_empty(x.shape[:-1], dtype=torch.int32)
