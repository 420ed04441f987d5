"""Grids of vectors through the rounding, packing and storing that scalar grids go through."""

import pytest
import torch

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.metrics import rel_error
from paley.core.packing import pack_codes, packed_bytes, stored_bits, symbol, unpack_codes
from paley.core.rounding import codes_per_row, quantize_dynamic, round_trip
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.format.spec import decode_linear, encode_linear
from paley.methods.nearest import gaussian_error, gaussian_spread, quantize_nearest

VECTORS = ["p2n16", "p2n88", "p2n256", "p3n64", "p4n256", "e8q3k9"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize(("n", "group_size"), [(48, None), (48, 16), (35, 7), (5, None)])
def test_the_same_values_come_back_by_both_paths_and_from_the_file(name, n, group_size):
    grid, x = grids.load(name), normal(3, n)
    scheme = ActivationScheme(name, "rms", group_size=group_size)
    q = quantize_dynamic(x, scheme)
    assert q.codes.shape == (3, codes_per_row(n, grid.p))
    assert (q.width, q.group_size) == (n, group_size or n)
    assert torch.equal(q.dequantize(), round_trip(x, scheme, torch.float16))
    slot = LinearScheme(WeightScheme(name, group_size, "nearest", "rms"))
    stored = encode_linear("layer", q)
    assert stored["layer.codes"].shape == (3, packed_bytes(codes_per_row(n, grid.p), grid.size))
    assert torch.equal(decode_linear("layer", stored, slot, n).dequantize(), q.dequantize())


@pytest.mark.parametrize("name", ["p2n16", "p2n88", "p3n64", "p4n256"])
def test_no_point_is_nearer(name):
    grid, x = grids.load(name), normal(64, 12)
    q = quantize_dynamic(x, ActivationScheme(name, "rms"), torch.float32)
    scaled = (x / q.scales).unflatten(-1, (-1, grid.p)).double()
    every = torch.cdist(scaled.flatten(0, 1), grid.points.float().double())
    taken = every.gather(1, q.codes.flatten().long()[:, None])[:, 0]
    assert (taken - every.amin(1)).abs().max() < 1e-6


@pytest.mark.parametrize("name", VECTORS)
def test_gaussian_weights_have_the_error_of_the_grid(name):
    scheme = WeightScheme(name, 256, "nearest", "rms")
    weight = normal(256, 1024)
    q = quantize_nearest(weight, scheme)
    error = float((q.dequantize() - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(gaussian_error(scheme, 1024), rel=0.02)


@pytest.mark.parametrize("name", ["p2n16", "p2n256", "p3n64", "p4n256", "gauss3", "e8q3k9"])
def test_the_error_of_the_grid_is_the_limit_of_large_groups(name):
    t2 = grids.load(name).mse
    for scale_search, limit in (("rms", t2), ("unbiased", t2 / (1 - t2))):
        if name.startswith("e8") and scale_search == "unbiased":
            continue  # its points are no means of their cells
        scheme = WeightScheme(name, 2**20, "nearest", scale_search)
        assert gaussian_error(scheme, 2**20) == pytest.approx(limit, rel=0.003)


@pytest.mark.parametrize("scale_search", ["rms", "unbiased"])
@pytest.mark.parametrize(("name", "group_size"), [("p2n256", 64), ("p2n16", 50), ("p4n256", 128), ("p1n4", 64),
                                                  ("p3n64", 64), ("p2n64", 320), ("p2n256", 16)])  # fmt: skip
def test_small_groups_have_less_error_than_their_grid(name, group_size, scale_search):
    scheme = WeightScheme(name, group_size, "nearest", scale_search)
    lost = 0.0
    for seed in range(8):
        weight = normal(2**18 // group_size, 2 * group_size, seed=100 + seed)
        lost += rel_error(weight, quantize_nearest(weight, scheme).dequantize())
    by_chance = 2 * gaussian_spread(grids.load(name)) / 2**11
    assert gaussian_error(scheme, 2 * group_size) == pytest.approx(lost / 8, rel=0.003 + by_chance)


def test_how_far_gaussian_weights_are_off_by_chance():
    scheme = WeightScheme("p2n64", 64, "nearest", "rms")
    weights = [normal(64, 64, seed=seed) for seed in range(100)]
    errors = torch.tensor([rel_error(weight, quantize_nearest(weight, scheme).dequantize()) for weight in weights])
    measured = float(errors.std() / errors.mean())
    assert measured == pytest.approx(gaussian_spread(grids.load("p2n64")) / 64, rel=0.25)


def test_gptq_refits_scales_so_that_none_is_stretched():
    errors = [
        gaussian_error(WeightScheme("p2n16", 64, *how), 256) for how in (("gptq", "unbiased"), ("nearest", "rms"))
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("size", [2, 3, 5, 9, 16, 45, 88, 256, 354, 830, 4096, 2**18, 13**8 * 5])
def test_codes_of_any_size_are_packed_within_their_bits(size):
    k, bits = symbol(size)
    assert size**k <= 2**bits
    assert bits / k < torch.log2(torch.tensor(float(size))) + 0.34
    for n in (1, 2, 7, 8, 9, 33, 100):
        codes = torch.randint(0, size, (3, n), generator=torch.Generator().manual_seed(n))
        codes[0], codes[1] = 0, size - 1
        packed = pack_codes(codes.to(torch.uint8) if size <= 256 else codes, size)
        assert packed.shape == (3, packed_bytes(n, size))
        assert torch.equal(unpack_codes(packed, size, n).long(), codes)


def test_wide_symbols_are_the_little_endian_bit_stream():
    codes = [4095, 1, 2730, 77, 0, 3000, 9, 511, 1234]
    number = sum(code << 12 * i for i, code in enumerate(codes))
    expected = list(number.to_bytes(-(-len(codes) * 12 // 8), "little"))
    assert pack_codes(torch.tensor(codes), 4096).tolist() == expected
    # In base 88, the first of two codes counts ones: 13 bits for both.
    assert pack_codes(torch.tensor([5, 87], dtype=torch.uint8), 88).tolist() == list(
        (5 + 87 * 88).to_bytes(2, "little")
    )


def test_what_a_value_takes_on_disk():
    taken = {name: stored_bits(grids.load(name)) for name in ("int3", "p2n16", "p2n88", "p2n256", "p4n256")}
    assert taken == {"int3": 3, "p2n16": 2, "p2n88": 3.25, "p2n256": 4, "p4n256": 2}


def test_vectors_need_a_scale_by_rms():
    with pytest.raises(PaleyError, match="vectors of 2 values and needs scale_search 'rms'"):
        WeightScheme("p2n16")
    with pytest.raises(PaleyError, match="vectors of 2 values and needs scale 'rms'"):
        ActivationScheme("p2n16")


def test_a_grid_of_ones_own_is_its_points():
    points = normal(6, 2)
    grid = grids.custom(points)
    assert grid == grids.custom(points.clone())
    assert len({grid, grids.custom(points.clone()), grids.custom(points + 1)}) == 2
    assert 0 < grid.mse < 1
    scheme = ActivationScheme(grid, "rms")
    assert round_trip(normal(4, 8), scheme).shape == (4, 8)
    with pytest.raises(PaleyError, match="its points are not known here; give the grid's file with --grid"):
        grids.load(grid.name)


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        (torch.zeros(4), r"must be floats \[n, p\], got torch.float32 \[4\]"),
        (torch.zeros(4, 2, dtype=torch.int64), r"must be floats"),
        (torch.randn(1, 2), r"needs 2 to 4096 points in 1 to 8 dimensions, got shape \[1, 2\]"),
        (torch.randn(16, 9), r"got shape \[16, 9\]"),
        (torch.tensor([[1.0], [float("nan")]]), "NaN or infinite"),
        (torch.ones(3, 2), "same point twice"),
    ],
)
def test_a_bad_grid_is_refused(points, complaint):
    with pytest.raises(PaleyError, match=complaint):
        grids.custom(points, "my.safetensors")


@pytest.mark.parametrize(
    ("points", "error"),
    [
        (torch.linspace(-2, 2, 8)[:, None] * 100, r"\d{3}"),
        (normal(16, 2) * 1e30, r"\S+e\+\d\d"),
        (normal(16, 2) * 1e-3, "0.99"),
        (normal(16, 2) + 9, r"\d{2}"),
    ],
)
def test_points_for_another_variance_are_refused_where_scales_are_by_rms(points, error):
    grid = grids.custom(points)
    complaint = rf"relative squared error on N\(0, 1\) is {error}.*scale the points to unit variance"
    with pytest.raises(PaleyError, match="my.safetensors: its points do not fit.*" + complaint):
        grid.check_scaled("my.safetensors")
    for make in (lambda: WeightScheme(grid, 8, "nearest", "unbiased"), lambda: ActivationScheme(grid, "rms")):
        with pytest.raises(PaleyError, match=complaint):
            make()


def test_to_other_scales_any_multiple_of_the_points_is_the_same():
    weight, found = normal(8, 64), []
    for factor in (1e-3, 1.0, 256.0):
        grid = grids.custom(torch.arange(-8.0, 8.0)[:, None] * factor)
        for scale_search in ("absmax", "mse"):
            found.append(quantize_nearest(weight, WeightScheme(grid, 32, "nearest", scale_search)).codes)
    assert all(torch.equal(codes, found[i % 2]) for i, codes in enumerate(found))
    grids.custom(torch.arange(-8.0, 8.0)[:, None]).check_scaled("integers have an error of 1/12")


@pytest.mark.parametrize("size", [88, 255, 3, 3000, 9 * 3**8])
def test_symbols_that_no_codes_make_are_refused(size):
    k, bits = symbol(size)
    packed = torch.tensor(list((size**k).to_bytes(-(-bits // 8), "little")), dtype=torch.uint8)
    with pytest.raises(PaleyError, match="the file is damaged"):
        unpack_codes(packed, size, 1)


@pytest.mark.parametrize("points", [[-3.0, -1.0, 0.0], [-3.0, 0.0, 0.1], [1e-9, 2e-9, 5e-9, 1.1e-8], [-0.3, 0.77]])
def test_any_points_on_a_line_are_a_grid(points):
    grid = grids.custom(torch.tensor(points)[:, None])
    assert grid.gaussian_scale == 1
    assert grid.peak == max(map(abs, grid.points.flatten().tolist()))
    x = normal(64, 16) * grid.peak
    nearest = (x[..., None] - grid.points[:, 0].float()).abs().argmin(-1)
    assert torch.equal(grid.nearest(x.reshape(-1, 1).clone()).long(), nearest.flatten())
    assert torch.equal(grid.round(x.reshape(-1, 1).clone()), grid.decode(nearest.flatten()))


@pytest.mark.parametrize("name", ["p2n16", "p2n88", "p3n64", "p4n256", "gauss2", "int3"])
def test_unbiased_scales_give_every_group_its_length_along_itself(name):
    scheme, weight = WeightScheme(name, 64, "nearest", "unbiased"), normal(128, 512)
    weight[3] = 0
    q = quantize_nearest(weight, scheme)
    along = (q.dequantize() * weight).unflatten(-1, (-1, 64)).sum(-1)
    assert torch.allclose(along, weight.unflatten(-1, (-1, 64)).square().sum(-1), rtol=1e-3)  # float16 scales
    by_rms = quantize_nearest(weight, WeightScheme(name, 64, "nearest", "rms"))
    assert torch.equal(q.codes, by_rms.codes)
    rows = WeightScheme(name, None, "nearest", "unbiased")
    error = float((quantize_nearest(weight, rows).dequantize() - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(gaussian_error(rows, 512), rel=0.03)
