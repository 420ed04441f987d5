import pytest
import torch

from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.packing import pack, packed_width, unpack


def codes_of(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bit_stream(row: list[int], bits: int) -> list[int]:
    """The definition, in Python integers: one number with code i at bit i·bits, as little-endian bytes."""
    number = sum(code << i * bits for i, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0x81, 0x01]),
        (2, [0, 1, 2, 3], [0b11_10_01_00]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
        (4, [0xA, 0x5, 0xF], [0x5A, 0x0F]),
        (5, [31, 0, 1], [0x1F, 0x04]),
        (6, [1, 63], [0xC1, 0x0F]),
        (7, [127, 1], [0xFF, 0x00]),
        (8, [0, 255, 7], [0, 255, 7]),
    ],
)
def test_goldens(bits: int, codes: list[int], packed: list[int]):
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed
    assert unpack(torch.tensor(packed, dtype=torch.uint8), bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_is_the_little_endian_bit_stream_and_round_trips_at_every_width(bits: int):
    for n in range(1, 34):
        codes = codes_of(3, n, bits=bits, seed=n)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.is_contiguous()
        assert packed.tolist() == [bit_stream(row, bits) for row in codes.tolist()]
        restored = unpack(packed, bits, n)
        assert restored.is_contiguous()
        assert torch.equal(restored, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_codes_beside_all_codes(bits: int):
    every = torch.arange(2**bits, dtype=torch.uint8)
    pairs = torch.cartesian_prod(every, every) if bits < 8 else torch.stack([every, every.flip(0)], 1)
    for n in (8, 13):
        codes = pairs.repeat(1, 7)[:, :n].contiguous()
        assert torch.equal(unpack(pack(codes, bits), bits, n), codes)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 11), (0, 5), (4, 0), (1, 1)])
def test_any_leading_shape(shape: tuple[int, ...]):
    for bits in (3, 8):
        codes = codes_of(*shape, bits=bits)
        packed = pack(codes, bits)
        assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
        assert torch.equal(unpack(packed, bits, shape[-1]), codes)


def test_more_words_than_are_done_at_a_time():
    codes = codes_of(9, 40_000, bits=5)
    assert torch.equal(unpack(pack(codes, 5), 5, 40_000), codes)


def test_arguments_stay_as_they_are_and_need_not_be_contiguous_or_aligned():
    for bits in (3, 8):
        codes = codes_of(33, 17, bits=bits)
        views = [codes.T, codes[1:, 1:], codes[:, ::2], codes.flatten()[3:19]]
        for view in views:
            before = view.clone()
            packed = pack(view, bits)
            packed_before = packed.clone()
            assert torch.equal(unpack(packed, bits, view.shape[-1]), before)
            assert torch.equal(view, before)
            assert torch.equal(packed, packed_before)


def test_the_result_is_no_view_of_the_argument():
    codes = codes_of(2, 8, bits=8)
    pack(codes, 8).zero_()
    unpack(codes, 8, 8).zero_()
    assert codes.any()


def test_unpack_ignores_what_fills_the_last_byte():
    assert unpack(torch.tensor([0b1111_1101], dtype=torch.uint8), 3, 1).tolist() == [5]


@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_too_large_are_refused(bits: int):
    codes = torch.zeros(2, 9, dtype=torch.uint8)
    codes[1, 8] = 2**bits
    with pytest.raises(PaleyError, match=f"code {2**bits} does not fit in {bits} bits"):
        pack(codes, bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype):
    with pytest.raises(PaleyError, match="must be uint8"):
        pack(torch.zeros(8, dtype=dtype), 4)
    with pytest.raises(PaleyError, match="must be uint8"):
        unpack(torch.zeros(4, dtype=dtype), 4, 8)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(PaleyError, match="between 1 and 8"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(PaleyError, match="between 1 and 8"):
        unpack(torch.zeros(8, dtype=torch.uint8), bits, 8)


@pytest.mark.parametrize("n", [7, 11, -1])
def test_unpack_refuses_a_row_of_the_wrong_length(n: int):
    with pytest.raises(PaleyError, match="bytes a row"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 3, n)


def test_scalars_are_refused():
    with pytest.raises(PaleyError, match="scalar"):
        pack(torch.tensor(1, dtype=torch.uint8), 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_matter():
    codes = codes_of(5, 77, bits=3)
    packed = pack(codes.cuda(), 3)
    assert torch.equal(packed.cpu(), pack(codes, 3))
    assert torch.equal(unpack(packed, 3, 77).cpu(), codes)


@pytest.mark.parametrize("size", [88, 256, 3, 1000])
def test_a_large_matrix_is_packed_a_few_rows_at_a_time(size, monkeypatch):
    codes = torch.randint(size, (37, 29), generator=torch.Generator().manual_seed(0))
    packed = packing.pack_codes(codes, size)
    monkeypatch.setattr(packing, "_AT_ONCE", 100)
    assert torch.equal(packing.pack_codes(codes, size), packed)
    assert torch.equal(packing.unpack_codes(packed, size, 29).long(), codes)
