"""Hadamard matrices in exact integers, and the fast transform against the matrix."""

import json
import math
from importlib import resources

import pytest
import torch

from paley.core import hadamard as module
from paley.core.errors import PaleyError
from paley.core.hadamard import factor, hadamard, nearest_orders, transform

TABLE = json.loads(resources.files("paley.core").joinpath("tables/hadamard.json").read_text("utf-8"))

# Sizes of real models and their dense factors (methods/gbs.md, section 2; 172 and 428 come from tables).
FACTORS = {
    896: (28, 5), 3584: (28, 7), 14336: (28, 9), 768: (12, 6), 1536: (12, 7), 2560: (20, 7), 5120: (20, 8),
    576: (36, 4), 2304: (36, 6), 960: (60, 4), 3840: (60, 6), 5376: (84, 6), 4864: (76, 6), 9728: (76, 7),
    17408: (68, 8), 25600: (100, 8), 18944: (148, 7), 29568: (924, 5), 13824: (108, 7), 8960: (140, 6),
    11008: (172, 6), 5632: (44, 7), 10944: (684, 4), 2880: (180, 4), 53248: (52, 10), 172: (172, 0),
    13696: (428, 5), 4096: (1, 12), 128: (1, 7), 2: (1, 1), 1: (1, 0), 144: (36, 2), 344: (172, 1),
}  # fmt: skip


def reachable(n):
    try:
        return factor(n) is not None
    except PaleyError:
        return False


def assert_hadamard(h, n):
    assert h.shape == (n, n)
    assert h.dtype == torch.int8
    assert (h.abs() == 1).all()
    wide = h.double()  # exact: every partial sum is an integer below 2^53
    assert torch.equal(wide @ wide.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", sorted(FACTORS))
def test_factor_takes_the_smallest_dense_part(n):
    m, k = factor(n)
    assert (m, k) == FACTORS[n]
    assert m << k == n


@pytest.mark.parametrize("m", sorted({m for m, _ in FACTORS.values()} | {344, 28, 100, 52, 36}))
def test_dense_factors_are_hadamard_in_integers(m):
    assert_hadamard(hadamard(m), m)


def test_every_multiple_of_four_up_to_256_is_hadamard_in_integers():
    for n in [1, 2, *range(4, 257, 4)]:
        assert_hadamard(hadamard(n), n)


@pytest.mark.parametrize("n", [int(n) for n in TABLE["orders"]])
def test_tabled_orders(n):
    assert_hadamard(hadamard(n), n)
    assert len(TABLE["orders"][str(n)]["source"]) > 10


def test_tables_hold_only_what_nothing_else_reaches(monkeypatch):
    monkeypatch.setattr(module, "_tables", dict)
    module._construction.cache_clear()
    superfluous = [n for n in map(int, TABLE["orders"]) if module._construction(n)]
    module._construction.cache_clear()
    assert superfluous == []


def test_orders_below_1000_that_are_out_of_reach():
    # 668, 716 and 892 are open problems; the others would need Miyamoto's construction (orders 4q).
    missing = [n for n in range(4, 1001, 4) if not reachable(n)]
    assert missing == [596, 668, 716, 772, 892, 932]


def test_the_matrix_is_sylvester_times_dense():
    h = hadamard(112)
    assert torch.equal(h, torch.kron(hadamard(4), hadamard(28)))
    assert torch.equal(hadamard(8), torch.kron(hadamard(2), hadamard(4)))


def test_a_caller_cannot_corrupt_the_cache():
    for n in (1, 28, 56):
        hadamard(n).zero_()
        assert_hadamard(hadamard(n), n)


def test_a_meta_default_device_or_inference_mode_leaves_no_trace_in_the_caches():
    x = torch.randn(2, 104, requires_grad=True)
    with torch.inference_mode(), torch.device("meta"):
        assert hadamard(52).device.type == "cpu"
        transform(x.detach(), 104)
    transform(x, 104).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("order", [1, 2, 12, 16, 28, 52, 64, 96, 112, 128, 172, 344, 768, 896, 1024, 2304])
@pytest.mark.parametrize("batch", [(), (1,), (17,), (2, 3)])
def test_transform_is_the_matrix(order, batch):
    x = torch.randn(*batch, order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    expected = x @ hadamard(order).double().T / math.sqrt(order)
    back = x @ hadamard(order).double() / math.sqrt(order)
    assert (transform(x, order) - expected).abs().max() < 1e-12
    assert (transform(x, order, inverse=True) - back).abs().max() < 1e-12


def test_blocks_are_transformed_one_by_one():
    x = torch.randn(3, 5 * 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([transform(block, 28) for block in x.split(28, dim=-1)], dim=-1)
    assert torch.allclose(transform(x, 28), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("order", [20, 896, 4096, 11008, 13696, 18944])
def test_inverse_undoes_and_norms_stay(order):
    x = torch.randn(3, order, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = transform(x, order)
    assert (transform(y, order, inverse=True) - x).abs().max() < 1e-12
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_cast_once(dtype):
    x = torch.randn(4, 896, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = transform(x, 896)
    assert y.dtype == dtype
    assert torch.equal(y, transform(x.float(), 896).to(dtype))


@pytest.mark.parametrize("order", [1, 2, 12, 64, 96, 112, 172, 288, 1536])
@pytest.mark.parametrize("inverse", [False, True])
def test_sums_of_floats_are_exact_whatever_their_order(order, inverse):
    g = torch.Generator().manual_seed(order)
    x = torch.randn(3, order, generator=g) * torch.logspace(-9, 6, order)[torch.randperm(order, generator=g)]
    h = hadamard(order).double()
    far = x.double().abs().amax(1, keepdim=True) * 3 * order
    steps = (x.double() + far) - far
    assert (steps - x).abs().max() <= float(far.max()) * 2**-53
    terms = steps[:, None] * (h.T if inverse else h)
    sums = torch.tensor([[math.fsum(row) for row in rows] for rows in terms.tolist()], dtype=torch.float64)
    assert torch.equal(terms.flip(-1).cumsum(-1)[..., -1], sums)  # a plain loop from the end is exact as well
    assert torch.equal(transform(x, order, inverse=inverse), (sums * (1 / math.sqrt(order))).float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_not_finite_becomes_nan(value):
    x = torch.randn(2, 3 * 12)
    x[0, 17] = value
    y = transform(x, 12)
    assert y[0, 12:24].isnan().all()
    assert torch.equal(y[1], transform(x[1], 12))
    assert torch.equal(y[0, :12], transform(x[0, :12], 12))


def test_a_long_input_is_transformed_in_parts(monkeypatch):
    x = torch.randn(7, 3 * 28)
    whole = transform(x, 28), transform(x.double(), 28)
    monkeypatch.setattr(module, "_PART", 100)
    assert torch.equal(transform(x, 28), whole[0])
    torch.testing.assert_close(transform(x.double(), 28), whole[1], rtol=0, atol=1e-14)


def test_transform_of_a_transposed_and_an_empty_input():
    x = torch.randn(28, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).T
    assert torch.equal(transform(x, 28), transform(x.contiguous(), 28))
    assert transform(torch.empty(0, 28), 28).shape == (0, 28)


@pytest.mark.parametrize(
    ("n", "why", "near"),
    [
        (3, "divisible by 4", "2 and 4"),
        (6, "divisible by 4", "4 and 8"),
        (4097, "divisible by 4", "4096 and 4100"),
        (668, "no construction here", "664 and 672"),
    ],
)
def test_an_unreachable_order_says_why_and_where_to_go(n, why, near):
    for call in (factor, hadamard, lambda n: transform(torch.zeros(n), n)):
        with pytest.raises(PaleyError) as caught:
            call(n)
        text = str(caught.value)
        assert f"order {n}:" in text
        assert why in text
        assert f"nearest reachable sizes are {near}" in text
        assert "expand the dimension" in text


def test_the_hint_is_a_size_with_a_fast_transform():
    with pytest.raises(PaleyError, match="for instance to 13824"):
        factor(13698)
    with pytest.raises(PaleyError, match=r"for instance to 4$"):
        factor(3)


def test_nearest_orders_are_strict():
    assert nearest_orders(668) == (664, 672)
    assert nearest_orders(128) == (124, 132)
    assert nearest_orders(2) == (1, 4)


@pytest.mark.parametrize("n", [0, -4])
def test_orders_below_one(n):
    with pytest.raises(PaleyError, match="positive whole number"):
        factor(n)


def test_a_width_that_is_no_multiple_is_refused():
    with pytest.raises(PaleyError, match=r"shape \(2, 100\) is not a multiple of order=28"):
        transform(torch.zeros(2, 100), 28)
    with pytest.raises(PaleyError, match=r"torch\.int64"):
        transform(torch.zeros(28, dtype=torch.long), 28)
