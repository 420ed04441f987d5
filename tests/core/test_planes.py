"""Bit planes: the formula of arXiv:2504.05352 equals the dequantized product, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import plane_examples
from paley.core import planes
from paley.core.errors import PaleyError
from plane_examples import example, integers

SHAPES = [(1, 1, 1, 1), (2, 3, 2, 5), (3, 17, 4, 32), (17, 20, 3, 96)]  # tokens, out, groups, group_size


def by_hand(x_codes, x_scales, x_zeros, codes, centroids) -> Tensor:
    """float64 [tokens, out], a product after the other."""
    size = x_codes.shape[1] // x_scales.shape[1]
    y = torch.zeros(len(x_codes), len(codes), dtype=torch.float64)
    for t in range(len(x_codes)):
        for r in range(len(codes)):
            for i in range(x_codes.shape[1]):
                g = i // size
                x = float(x_scales[t, g]) * (int(x_codes[t, i]) - int(x_zeros[t, g]))
                y[t, r] += x * float(centroids[r, g, int(codes[r, i])])
    return y


def test_planes_are_the_bits():
    codes = integers(0, 16, 3, 50).to(torch.uint8)
    bits = plane_examples.bit_planes(codes)
    assert (bits.shape, bits.dtype) == ((4, 3, 50), torch.bool)
    assert torch.equal(sum(plane.int() << a for a, plane in enumerate(bits)), codes.int())


def test_the_reference_is_the_definition(monkeypatch):
    monkeypatch.setenv("PALEY_BACKEND", "auto")  # native kernels, asked for by name, refuse groups as small as these
    for shape in SHAPES[:3]:
        given = example(*shape)
        expected = by_hand(*given)
        for y in (planes.reference(*given, shape[1]), planes.matmul(*given[:3], planes.prepare(*given[3:]))):
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_the_sums_of_codes_under_each_map(shape):
    x_codes, x_scales, _, codes, _ = example(*shape)
    groups = x_scales.shape[1]
    x = x_codes.unflatten(1, (groups, -1)).long()
    q, s = (codes & 1).unflatten(1, (groups, -1)).long(), (codes >> 1).unflatten(1, (groups, -1)).long()
    for found, m in zip(plane_examples.plane_sums(x_codes, codes, groups), (s, q, s * q), strict=True):
        assert found.dtype == torch.int64
        assert torch.equal(found, (x[:, None] * m).sum(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_binary_arithmetic_equals_the_reference(shape):
    given = example(*shape)
    y = plane_examples.binary_arithmetic(*given)
    assert y.dtype == torch.float64
    torch.testing.assert_close(planes.reference(*given, shape[1]).double(), y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        plane_examples.binary_arithmetic(*given, dtype=torch.float32).double(), y, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_small_whole_numbers_are_exact(shape):
    x_codes, x_scales, x_zeros, codes, centroids = example(*shape)
    x_scales = torch.exp2(integers(-3, 3, *x_scales.shape).float())
    given = (x_codes, x_scales, x_zeros, codes, integers(-9, 10, *centroids.shape).half())
    y = planes.reference(*given, shape[1])
    assert torch.equal(y.double(), plane_examples.binary_arithmetic(*given))
    assert torch.equal(y, plane_examples.binary_arithmetic(*given, dtype=torch.float32))


def test_mirrored_centroids_need_no_sum_of_both(monkeypatch):
    x_codes, x_scales, x_zeros, codes, centroids = example(3, 17, 4, 32)
    a, b = centroids[..., 0], centroids[..., 1]
    given = (x_codes, x_scales, x_zeros, codes, torch.stack([-b, -a, a, b], -1))
    y = plane_examples.binary_arithmetic(*given)
    sums = plane_examples.plane_sums
    monkeypatch.setattr(plane_examples, "plane_sums", lambda *args: (*sums(*args)[:2], torch.tensor(12345)))
    assert torch.equal(plane_examples.binary_arithmetic(*given), y)


def test_a_block_of_rows_at_a_time_is_the_same(monkeypatch):
    given = example(3, 17, 4, 32)
    whole = planes.reference(*given, 17)
    monkeypatch.setattr(planes, "_BLOCK", 5 * 128)
    torch.testing.assert_close(planes.reference(*given, 17), whole)


def test_zeros_may_be_whole_numbers_of_any_dtype():
    x_codes, x_scales, x_zeros, codes, centroids = example(3, 17, 4, 32)
    prepared = planes.prepare(codes, centroids)
    y = planes.matmul(x_codes, x_scales, x_zeros, prepared)
    assert torch.equal(planes.matmul(x_codes, x_scales, x_zeros.float(), prepared), y)
    assert torch.equal(planes.matmul(x_codes, x_scales, x_zeros.long(), prepared), y)


def test_no_tokens_and_no_layout_matter():
    x_codes, x_scales, x_zeros, codes, centroids = example(6, 17, 4, 32)
    prepared = planes.prepare(codes, centroids)
    y = planes.matmul(x_codes, x_scales, x_zeros, prepared)
    assert planes.matmul(x_codes[:0], x_scales[:0], x_zeros[:0], prepared).shape == (0, 17)
    strided = planes.prepare(codes.T.contiguous().T, centroids.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(planes.matmul(x_codes.T.contiguous().T, x_scales, x_zeros, strided), y)


def test_meta_tensors_and_the_rules_for_ops():
    x_codes, x_scales, x_zeros, codes, centroids = example(3, 17, 4, 32)
    meta = (x.to("meta") for x in (x_codes, x_scales, x_zeros))
    y = torch.ops.paley.planes_matmul(*meta, codes.to("meta"), centroids.to("meta"), 17)
    assert (y.shape, y.dtype, y.device.type) == ((3, 17), torch.float32, "meta")
    torch.library.opcheck(torch.ops.paley.planes_matmul.default, (x_codes, x_scales, x_zeros, codes, centroids, 17))
    torch.library.opcheck(torch.ops.paley.planes_pack.default, (codes, centroids))


def test_inputs_on_another_device_are_refused():
    *x, codes, centroids = example(3, 17, 4, 32)
    elsewhere = [y.to("meta") for y in x]
    with pytest.raises(PaleyError, match="inputs are on meta, but the weight was prepared on cpu"):
        planes.reference(*elsewhere, codes, centroids, 17)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_product():
    x_codes, x_scales, x_zeros, codes, centroids = example(17, 100, 3, 96)
    y = plane_examples.binary_arithmetic(x_codes, x_scales, x_zeros, codes, centroids)
    prepared = planes.prepare(codes.cuda(), centroids.cuda())
    found = planes.matmul(x_codes.cuda(), x_scales.cuda(), x_zeros.cuda(), prepared).cpu()
    torch.testing.assert_close(found.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("codes", "centroids", "complaint"),
    [
        (torch.full((2, 64), 4, dtype=torch.uint8), torch.zeros(2, 1, 4).half(), "must be 0 to 3, got 4"),
        (torch.zeros(2, 64).long(), torch.zeros(2, 1, 4).half(), "codes uint8 and centroids float16, got torch.int64"),
        (torch.zeros(2, 64).byte(), torch.zeros(2, 1, 4), "centroids float16, got torch.uint8 and torch.float32"),
        (torch.zeros(64).byte(), torch.zeros(1, 1, 4).half(), r"must be \[out, n\].*got \[64\]"),
        (torch.zeros(2, 64).byte(), torch.zeros(3, 1, 4).half(), r"got \[2, 64\] and \[3, 1, 4\]"),
        (torch.zeros(2, 64).byte(), torch.zeros(2, 1, 3).half(), r"centroids \[out, groups, 4\]"),
        (torch.zeros(2, 64).byte(), torch.zeros(2, 3, 4).half(), "64 columns do not make 3 equal groups"),
        (torch.zeros(0, 64).byte(), torch.zeros(0, 1, 4).half(), "in 0 rows"),
        (torch.zeros(2, 64).byte(), torch.full((2, 1, 4), math.inf).half(), "NaN or infinities; give finite"),
    ],
)
def test_bad_weights_are_refused(codes, centroids, complaint):
    with pytest.raises(PaleyError, match=complaint):
        planes.prepare(codes, centroids)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c, s, z: (c.int(), s, z), "input codes uint8, scales float32 and zeros uint8, got torch.int32"),
        (lambda c, s, z: (c, s.double(), z), "got torch.uint8, torch.float64"),
        (lambda c, s, z: (c[0], s, z), r"codes must be \[tokens, n\].*got \[128\]"),
        (lambda c, s, z: (c[:2], s, z), r"got \[2, 128\], \[3, 4\] and \[3, 4\]"),
        (lambda c, s, z: (c, s, z[:, :2]), r"scales and zeros \[tokens, groups\]"),
        (lambda c, s, z: (c[:, :127], s, z), "127 input columns do not make 4 equal groups"),
        (lambda c, s, z: (c[:, :64], s, z), r"= \(64, 4, 17\), but the weight is of \(128, 4, 17\)"),
        (lambda c, s, z: (c, s[:, :2], z[:, :2]), r"= \(128, 2, 17\), but the weight is of \(128, 4, 17\)"),
    ],
)
def test_bad_inputs_are_refused(change, complaint):
    *x, codes, centroids = example(3, 17, 4, 32)
    with pytest.raises(PaleyError, match=complaint):
        planes.reference(*change(*x), codes, centroids, 17)
