"""ggml's blocks: what the gguf package decodes from the bytes are the grid's own values, to the bit."""

import pytest
import torch

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.metrics import rel_error
from paley.core.rounding import Quantized
from paley.core.schemes import WeightScheme
from paley.export.blocks import TYPES, fitting, pack
from paley.methods.nearest import quantize_nearest

gguf = pytest.importorskip("gguf")


def decoded(packed: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), getattr(gguf.GGMLQuantizationType, kind)).copy())


def weight(grid: str, group_size: int, zeros: torch.Tensor | None) -> Quantized:
    """Every code of a grid in every group of two rows."""
    generator = torch.Generator().manual_seed(0)
    size, width = grids.load(grid).size, 512
    codes = torch.stack([torch.randperm(width, generator=generator) % size for _ in range(2)]).to(torch.uint8)
    scales = torch.rand(2, width // group_size, generator=generator).half() + 0.01
    if zeros is not None:
        zeros = zeros.repeat(2 * width)[: 2 * width // group_size].view(2, -1).to(torch.uint8)
    return Quantized(codes, scales, zeros, grids.load(grid), width)


@pytest.mark.parametrize("group_size", [32, 64, 512])
@pytest.mark.parametrize(
    ("grid", "zeros", "kind"),
    [
        ("int4", None, "Q4_0"), ("int3", None, "Q4_0"), ("int2", None, "Q4_0"), ("int5", None, "Q5_0"),
        ("int6", None, "Q8_0"), ("int8", None, "Q8_0"), ("uint4", (7, 8), "Q4_0"), ("uint4", (8,), "Q4_0"),
        ("uint3", (0, 7), "Q4_0"), ("uint5", (14, 16), "Q5_1"), ("uint5", (15, 16), "Q5_0"),
        ("uint7", (0, 127), "Q8_0"),
    ],
)  # fmt: skip
def test_values_are_the_same_to_the_bit(grid, zeros, kind, group_size):
    q = weight(grid, group_size, None if zeros is None else torch.tensor(zeros))
    found = fitting(q.grid, q.zeros)
    assert found is not None
    assert found.name == kind
    packed = pack(q, found)
    assert packed.shape == (2, 512 // 32 * found.block_bytes)
    if found.zero is not None:
        assert torch.equal(decoded(packed, kind), q.dequantize())
    else:
        assert (decoded(packed, kind) - q.dequantize()).abs().max() <= 2**-11 * q.dequantize().abs().max()


@pytest.mark.parametrize(("grid", "kind"), [("uint4", "Q4_1"), ("uint5", "Q5_1"), ("odd4", "Q4_1"), ("odd5", "Q5_1")])
def test_offsets_are_rounded_to_float16_alone(grid, kind):
    affine = grids.load(grid).affine
    q = weight(grid, 32, torch.arange(16) if affine else None)
    found = fitting(q.grid, q.zeros)
    assert found is not None
    assert found.name == kind
    first = float(q.grid.points[0]) - (q.zeros.float() if q.zeros is not None else 0)
    bound = (q.scales.float() * first).abs().repeat_interleave(32, 1) * 2**-11
    assert ((decoded(pack(q, found), kind) - q.dequantize()).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize("grid", ["gauss4", "nf4", "p2n256", "e8q14k4", "odd6", "free2", "trellis4"])
def test_other_grids_fit_no_type(grid):
    assert fitting(grids.load(grid), None) is None


def test_zeros_too_far_apart_fit_no_type():
    assert fitting(grids.load("uint8"), torch.tensor([0, 255])) is None
    assert fitting(grids.load("uint6"), torch.tensor([0, 63])).name == "Q8_0"


def test_a_block_by_hand():
    """Codes 0 to 15 twice, scale -1/2 as the zero is 7: d · (c - 8) with c = 15 - code."""
    codes = torch.arange(16).repeat(2)[None].to(torch.uint8)
    zeros = torch.full((1, 1), 7, dtype=torch.uint8)
    q = Quantized(codes, torch.full((1, 1), 0.5).half(), zeros, grids.load("uint4"), 32)
    packed = pack(q, TYPES[0])[0].tolist()
    assert packed == [0x00, 0xB8, *((15 - c) | (15 - c) << 4 for c in range(16))]


def test_a_signed_scale_reaches_the_larger_end_with_the_longer_side():
    """-8 d to 7 d: a group whose largest value is positive takes d < 0, and is exact."""
    rows = torch.cat([torch.arange(-7.0, 9), torch.arange(-8.0, 8)])[None]
    for columns, zero in ((slice(0, 16), 7), (slice(16, 32), 8)):
        group = rows[:, columns].repeat(1, 2)
        q = quantize_nearest(group, WeightScheme("uint4", 32, "nearest", "signed"))
        assert q.zeros.tolist() == [[zero]]
        assert torch.equal(q.dequantize(), group)
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    schemes = [WeightScheme("int4", 32, "nearest", "mse"), WeightScheme("uint4", 32, "nearest", "signed")]
    errors = [rel_error(weight, quantize_nearest(weight, scheme).dequantize()) for scheme in schemes]
    assert errors[1] < 0.97 * errors[0]


def test_signed_scales_need_a_zero_point():
    with pytest.raises(PaleyError, match="'int4' has no zero point, which scale_search 'signed' chooses; set 'mse'"):
        WeightScheme("int4", 32, "nearest", "signed")
