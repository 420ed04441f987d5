"""FP8 and MXFP4 weights against a second decoder, in Python's own numbers, and against transformers'."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from paley.core.errors import PaleyError
from paley.format.decoding import Fp8, Mxfp4, decode
from paley.format.header import read_header

GENERATOR = torch.Generator().manual_seed(0)


def stored(tmp_path, **tensors):
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, tmp_path / "w.safetensors")
    return read_header(tmp_path / "w.safetensors")


def e4m3(byte: int) -> Fraction:
    """OCP 8-bit floats: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    value = Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 8) / 64
    return sign * value


def e2m1(code: int) -> Fraction:
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (Fraction(2 + mantissa, 2) * 2 ** (exponent - 1) if exponent else Fraction(mantissa, 2))


def fp8(rows: int, columns: int) -> torch.Tensor:
    codes = torch.randint(0, 256, (rows, columns), generator=GENERATOR)
    return torch.where(codes & 127 == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    ("shape", "scales", "block", "each"),
    [
        ((256, 384), (2, 3), None, (128, 128)),
        ((200, 130), (2, 2), None, (128, 128)),  # the last blocks are cut off
        ((200, 130), (2, 2), (128, 128), (128, 128)),
        ((48, 40), (3, 5), (16, 8), (16, 8)),
        ((48, 40), (), None, (48, 40)),
        ((48, 40), (1,), None, (48, 40)),
        ((48, 40), (48, 1), None, (1, 40)),
        ((48, 40), (48,), (128, 128), (1, 40)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_the_nearest_float32_of_the_product(tmp_path, end, shape, scales, block, each, dtype):
    values, factors = fp8(*shape), (torch.rand(scales, generator=GENERATOR) * 3 + 0.01).to(dtype)
    made = decode(stored(tmp_path, **{"a.weight": values, "a.weight" + end: factors, "b": torch.ones(3)}), block)
    assert made.infos.keys() == {"a.weight", "b"}
    assert made.kinds == {"FP8": 1}
    info, found = made.infos["a.weight"], made.infos["a.weight"].read()
    assert isinstance(info, Fp8)
    assert (info.shape, info.dtype, found.dtype) == (shape, torch.float32, torch.float32)
    assert info.nbytes == values.nbytes + factors.nbytes
    grid = factors.float().reshape(-(-shape[0] // each[0]), -(-shape[1] // each[1]))
    codes = values.view(torch.uint8)
    for _ in range(200):
        i, j = random.randrange(shape[0]), random.randrange(shape[1])
        exact = e4m3(int(codes[i, j])) * Fraction(float(grid[i // each[0], j // each[1]]))
        assert float(found[i, j]) == float(torch.tensor(float(exact), dtype=torch.float64).float())


def test_fp8_is_what_transformers_makes_of_it(tmp_path):
    values, factors = fp8(256, 384), torch.rand(2, 3, generator=GENERATOR)
    found = decode(stored(tmp_path, **{"a.weight": values, "a.weight_scale_inv": factors}), (128, 128)).infos[
        "a.weight"
    ]
    theirs = Fp8Dequantize(None)._dequantize_one(values, factors, torch.float32)
    assert torch.equal(found.read(), theirs)


def test_a_stack_of_experts_in_fp8(tmp_path):
    values, factors = torch.stack([fp8(32, 48), fp8(32, 48)]), torch.rand(2, 2, 3, generator=GENERATOR)
    infos = stored(tmp_path, experts=values, experts_scale_inv=factors)
    found = decode(infos, (16, 16)).infos["experts"].read()
    wide = factors.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(found, values.float() * wide)


def test_mxfp4_is_exact_and_what_transformers_makes_of_it(tmp_path):
    blocks = torch.randint(0, 256, (3, 6, 2, 16), generator=GENERATOR).to(torch.uint8)
    scales = torch.randint(0, 252, (3, 6, 2), generator=GENERATOR).to(torch.uint8)
    made = decode(stored(tmp_path, up_blocks=blocks, up_scales=scales), None)
    found = made.infos["up"].read()
    assert isinstance(made.infos["up"], Mxfp4)
    assert made.kinds == {"MXFP4": 1}
    assert made.infos["up"].shape == tuple(found.shape) == (3, 64, 6)
    assert found.dtype == made.infos["up"].dtype == torch.bfloat16
    for expert, row, column in ((0, 0, 0), (1, 3, 31), (2, 5, 32), (2, 4, 63), (0, 1, 17)):
        byte = int(blocks[expert, row, column // 32, column % 32 // 2])
        exact = e2m1(byte >> 4 if column % 2 else byte & 15) * Fraction(2) ** (
            int(scales[expert, row, column // 32]) - 127
        )
        assert Fraction(float(found[expert, column, row])) == exact
    normal = scales.clamp(20, 240)  # theirs flush what is subnormal
    infos = stored(tmp_path, up_blocks=blocks, up_scales=normal)
    assert torch.equal(decode(infos, None).infos["up"].read(), convert_moe_packed_tensors(blocks, normal))


@pytest.mark.parametrize("value", [255])
def test_an_mxfp4_scale_that_is_no_number_is_refused(tmp_path, value):
    infos = stored(
        tmp_path, up_blocks=torch.zeros(1, 2, 1, 16).byte(), up_scales=torch.full((1, 2, 1), value, dtype=torch.uint8)
    )
    with pytest.raises(PaleyError, match=r"w.safetensors: a weight decodes to nan"):
        decode(infos, None).infos["up"].read()


def test_fp8_that_overflows_is_refused(tmp_path):
    infos = stored(tmp_path, a=torch.full((2, 2), 448.0).to(torch.float8_e4m3fn), a_scale=torch.tensor(3e38))
    with pytest.raises(PaleyError, match=r"a weight decodes to inf at \[0, 0\]"):
        decode(infos, None).infos["a"].read()


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(4, 6).to(torch.float8_e4m3fn), "a_scale": torch.ones(3, 2)},
        {"a": torch.zeros(4, 6).to(torch.float8_e4m3fn), "a_scale": torch.ones(6)},
        {"a": torch.zeros(4, 6).to(torch.float8_e4m3fn), "a_scale": torch.ones(4).int()},
        {"a": torch.zeros(4).to(torch.float8_e4m3fn), "a_scale": torch.ones(4)},
        {"a_blocks": torch.zeros(2, 3, 1, 16).byte(), "a_scales": torch.zeros(2, 3, 2).byte()},
        {"a_blocks": torch.zeros(2, 3, 1, 16), "a_scales": torch.zeros(2, 3, 1).byte()},
        {"a_blocks": torch.zeros(3, 1, 16).byte(), "a_scales": torch.zeros(3, 1).byte()},
    ],
)
def test_scales_that_fit_nothing_are_refused(tmp_path, tensors):
    with pytest.raises(PaleyError, match=r"w\.safetensors: .*(fits no blocks|only matrices|MXFP4 has bytes)"):
        decode(stored(tmp_path, **tensors), None)


def test_scales_of_inputs_and_caches_are_left_out_of_such_models_alone(tmp_path):
    scale = torch.ones(1)
    plain = {"x.weight": torch.ones(2, 2), "x.input_scale": scale, "attn.k_scale": scale}
    assert decode(stored(tmp_path, **plain), None).left_out == []
    coded = plain | {"x.weight": fp8(2, 2), "x.weight_scale": scale}
    made = decode(stored(tmp_path, **coded), None)
    assert sorted(made.left_out) == ["attn.k_scale", "x.input_scale"]
    assert list(made.infos) == ["x.weight"]
    assert not math.isnan(float(made.infos["x.weight"].read().sum()))
