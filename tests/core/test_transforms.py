"""Transforms are isometries with the adjoint as their inverse, and the same ones on every machine."""

from __future__ import annotations

import math

import pytest
import torch

from paley.core.errors import PaleyError
from paley.core.hadamard import hadamard
from paley.core.transforms import Transform, random_signs

TRANSFORMS = [
    Transform(8, 8, 8),
    Transform(8, 8, 1, seed=3),
    Transform(24, 24, 12, seed=0),
    Transform(40, 40, 20, seed=7),
    Transform(64, 64, 16),
    Transform(20, 24, 24, seed=1),
    Transform(1, 4, 4, seed=2),
    Transform(33, 56, 28, seed=5),
]
each_transform = pytest.mark.parametrize("t", TRANSFORMS, ids=str)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@each_transform
def test_it_is_an_isometry(t):
    x, y = normal(3, 5, t.in_dim), normal(3, 5, t.in_dim, seed=1)
    assert t.apply(x).shape == (3, 5, t.out_dim)
    torch.testing.assert_close(t.apply(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close((t.apply(x) * t.apply(y)).sum(-1), (x * y).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(t.adjoint(t.apply(x)), x, rtol=0, atol=1e-12)


@each_transform
def test_the_adjoint_is_the_transpose(t):
    x, y = normal(5, t.in_dim), normal(5, t.out_dim, seed=1)
    torch.testing.assert_close((t.apply(x) * y).sum(-1), (x * t.adjoint(y)).sum(-1), rtol=0, atol=1e-12)
    matrix = t.apply(torch.eye(t.in_dim, dtype=torch.float64))  # T^T: row i is T e_i
    transpose = t.adjoint(torch.eye(t.out_dim, dtype=torch.float64))
    torch.testing.assert_close(matrix, transpose.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(t.in_dim, dtype=torch.float64), rtol=0, atol=1e-12)


@each_transform
def test_it_is_pad_then_signs_then_hadamard_blocks(t):
    x = normal(4, t.in_dim)
    padded = torch.cat([x, torch.zeros(4, t.out_dim - t.in_dim, dtype=torch.float64)], -1)
    if t.seed is not None:
        padded = padded * random_signs(t.out_dim, t.seed)
    h = hadamard(t.order).double() / math.sqrt(t.order)
    expected = (padded.unflatten(-1, (-1, t.order)) @ h.T).flatten(-2)
    torch.testing.assert_close(t.apply(x), expected, rtol=0, atol=1e-12)


def test_linear_layers_keep_their_outputs():
    """(W T^T)(T x) = W x, what every fold of a rotation rests on."""
    t = Transform(20, 28, 28, seed=4)
    weight, x = normal(6, 20), normal(3, 20, seed=1)
    torch.testing.assert_close(t.apply(x) @ t.apply(weight).T, x @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype):
    t = Transform(20, 24, 12, seed=1)
    x = normal(3, 20).to(dtype)
    assert t.apply(x).dtype == t.adjoint(t.apply(x)).dtype == dtype
    torch.testing.assert_close(t.adjoint(t.apply(x)), x, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)


# SplitMix64's published outputs for these seeds (Vigna's splitmix64.c).
GOLDEN = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
}


@pytest.mark.parametrize("seed", GOLDEN)
def test_signs_are_the_bits_of_splitmix64(seed):
    bits = [word >> i & 1 for word in GOLDEN[seed] for i in range(64)]
    assert random_signs(192, seed).tolist() == [2.0 * bit - 1 for bit in bits]
    assert torch.equal(random_signs(70, seed), random_signs(192, seed)[:70])
    assert random_signs(70, seed).dtype == torch.float64


def test_golden_signs():
    assert random_signs(16, 0).tolist() == [1, 1, 1, 1, -1, 1, -1, 1, 1, -1, 1, 1, -1, -1, 1, 1]
    assert random_signs(8, 1).tolist() != random_signs(8, 2).tolist()
    assert abs(float(random_signs(4096, 3).mean())) < 4 / 64  # four sigma


def test_seeds_draw_and_no_seed_does_not():
    x = normal(2, 32)
    first, again, other, plain = (Transform(32, 32, 32, seed).apply(x) for seed in (1, 1, 2, None))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    # Without signs a constant vector falls onto the row of ones: one peak of sqrt(n).
    assert float(Transform(32, 32, 32).apply(torch.ones(32)).abs().max()) == pytest.approx(math.sqrt(32))
    assert not torch.allclose(first, plain)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((8, 4, 4), "needs 1 <= in_dim <= out_dim, got 8 -> 4"),
        ((0, 4, 4), "got 0 -> 4"),
        ((8, 8, 3), "order=3 does not divide out_dim=8"),
        ((8, 8, 0), "order=0 does not divide"),
        ((8, 8, -2), "order=-2 does not divide"),
        ((8, 8, 16), "order=16 does not divide out_dim=8"),
        ((12, 12, 6), "order 6"),
    ],
)
def test_impossible_transforms_are_refused(sizes, complaint):
    with pytest.raises(PaleyError, match=complaint):
        Transform(*sizes)


def test_inputs_of_another_width_are_refused():
    t = Transform(20, 24, 24)
    with pytest.raises(PaleyError, match="last dimension is 24, expected in_dim=20"):
        t.apply(torch.zeros(2, 24))
    with pytest.raises(PaleyError, match="last dimension is 20, expected out_dim=24"):
        t.adjoint(torch.zeros(2, 20))
