"""Native products of bit planes equal the reference: all paths, levels and threads give the same bits."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paley import kernels
from paley.core import planes
from paley.core.errors import PaleyError
from paley.kernels import native
from plane_examples import binary_arithmetic, example, integers

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"native kernels: {native.why_missing()}")
LEVELS = native.LEVELS[: native.LEVELS.index(native.best_planes_level()) + 1] if kernels.available() else ()
WAYS = list(itertools.product(LEVELS, native.PATHS))
CPUINFO = Path("/proc/cpuinfo")
SHAPES = list(itertools.product((1, 2, 3, 17), (1, 17, 100), (32, 64, 96, 128)))  # tokens, out, group_size
LARGE = [(1, 64, 512), (33, 65, 512), (70, 130, 256)]  # more than a tile of tokens, more than a panel of rows


def whole_numbers(tokens: int, out: int, group_size: int) -> tuple[Tensor, ...]:
    """As `example`, but all that is added up is exact in float32."""
    x_codes, x_scales, x_zeros, codes, centroids = example(tokens, out, 3, group_size)
    x_scales = torch.exp2(integers(-3, 3, *x_scales.shape).float())
    return x_codes, x_scales, x_zeros, codes, integers(-9, 10, *centroids.shape).half()


@pytest.fixture
def subnormals_are_zeros():
    """As some applications set the processor; for the caller's thread and those that it starts."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    torch.set_flush_denormal(False)
    yield lambda: torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)


def products(given: tuple[Tensor, ...], threads: int = 1) -> dict[tuple[str, str], Tensor]:
    """The product by each level and path."""
    blob = native.pack_planes(*given[3:])
    out = len(given[3])
    return {
        (level, path): native.planes_matmul(*given[:3], blob, out, path=path, level=level, threads=threads)
        for level, path in WAYS
    }


def assert_exact(given: tuple[Tensor, ...], threads: int = 1) -> None:
    expected = planes.reference(*given, len(given[3]))
    for way, y in products(given, threads).items():
        assert torch.equal(y, expected), way


def assert_close(given: tuple[Tensor, ...], threads: int = 1) -> None:
    """The norm to 1e-5, each number to 1e-6 of the largest that such inputs give; the same bits each way."""
    expected = binary_arithmetic(*given)
    group_size = given[0].shape[1] // given[1].shape[1]
    most = 15 * group_size * given[1].sum(1).max() * given[4].float().abs().max()
    found = products(given, threads)
    first = next(iter(found.values()))
    assert (first.double() - expected).norm() <= 1e-5 * expected.norm() + 1e-12
    assert (first.double() - expected).abs().max() <= 1e-6 * most
    for way, y in found.items():
        assert torch.equal(y, first), way


@pytest.mark.parametrize(("tokens", "out", "group_size"), SHAPES + LARGE)
def test_whole_numbers_are_exact(tokens, out, group_size):
    assert_exact(whole_numbers(tokens, out, group_size))


@pytest.mark.parametrize(("tokens", "out", "group_size"), SHAPES + LARGE)
def test_random_numbers_are_close_and_the_same_each_way(tokens, out, group_size):
    assert_close(example(tokens, out, 3, group_size))


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_change_nothing(threads):
    given = example(5, 300, 3, 128)
    alone = products(given)
    for way, y in products(given, threads).items():
        assert torch.equal(y, alone[way]), way


@pytest.mark.parametrize("tokens", [1, 5])
def test_mirrored_centroids(tokens):
    """-b, -a, a, b, the paper's two scales: the kernels skip one of three sums."""
    for given in (example(tokens, 100, 3, 128), whole_numbers(tokens, 100, 128)):
        *x, codes, centroids = given
        a, b = centroids[..., 0], centroids[..., 1]
        mirrored = torch.stack([-b, -a, a, b], -1)
        assert_close((*x, codes, mirrored))
        mirrored[-1, -1, 0] += 1  # in one place only: no sum may be skipped
        assert_close((*x, codes, mirrored))


def test_zero_weights_and_zero_inputs():
    x_codes, x_scales, x_zeros, codes, centroids = example(3, 17, 3, 64)
    for given in (
        (x_codes, x_scales, x_zeros, codes, torch.zeros_like(centroids)),
        (x_codes, torch.zeros_like(x_scales), x_zeros, codes, centroids),
        (torch.full_like(x_codes, 7), x_scales, torch.full_like(x_zeros, 7), codes, centroids),
    ):
        for way, y in products(given).items():
            assert torch.equal(y, torch.zeros(3, 17)), way


@pytest.mark.parametrize("group_size", [32, 128, 512])
@pytest.mark.parametrize(("code", "zero"), [(15, 0), (0, 15), (15, 15)])
@pytest.mark.parametrize("weight", [0, 1, 2, 3])
def test_the_largest_sums_do_not_overflow(group_size, code, zero, weight):
    x_codes, x_scales, x_zeros, codes, centroids = whole_numbers(2, 17, group_size)
    full = torch.full_like
    assert_exact((full(x_codes, code), x_scales, full(x_zeros, zero), full(codes, weight), centroids))


def test_tiny_and_large_centroids():
    """Subnormal float16 too, and float16's largest."""
    x_codes, x_scales, x_zeros, codes, centroids = example(2, 40, 3, 64)
    assert_close((x_codes, x_scales, x_zeros, codes, (centroids.float() * 2.0**-20).half()))
    assert_close((x_codes, x_scales, x_zeros, codes, centroids.clamp(-1, 1) * 65504))


@pytest.mark.parametrize("tokens", [1, 5])
def test_subnormal_centroids_count_also_where_subnormals_are_zeros(tokens, subnormals_are_zeros):
    *x, codes, centroids = example(tokens, 40, 3, 64)
    tiny = (centroids.float() * 2.0**-20).half()
    assert (tiny.float().abs() < 2.0**-14).all()
    a, b = tiny[..., 0], tiny[..., 1]
    for given in ((*x, codes, tiny), (*x, codes, torch.stack([-b, -a, a, b], -1))):
        blob, expected = native.pack_planes(*given[3:]), products(given)
        subnormals_are_zeros()
        same_blob, found = native.pack_planes(*given[3:]), products(given) | products(given, threads=3)
        torch.set_flush_denormal(False)
        assert torch.equal(same_blob, blob)  # its header too: whether the centroids are mirrored
        for way, y in found.items():
            assert torch.equal(y, expected[way]), way
            assert y.abs().min() > 0


def test_minus_zero_is_the_same_each_way():
    *x, codes, centroids = example(2, 40, 3, 64)
    assert_close((*x, codes, torch.full_like(centroids, -0.0)))


def test_a_blob_takes_what_codes_and_centroids_take():
    given = example(1, 128, 3, 128)
    assert len(native.pack_planes(*given[3:])) - 64 == 128 * 3 * (128 * 2 + 4 * 16) // 8
    assert native.blob_bytes(128, 3, 128) - 64 == 128 * 3 * (128 * 2 + 4 * 16) // 8


def test_what_fits():
    assert [size for size in range(700) if native.fits(size)] == list(range(32, 513, 32))


@pytest.mark.parametrize("group_size", [16, 40, 544])
def test_other_groups_take_the_reference_and_auto_says_so_once(group_size, monkeypatch, caplog):
    kernels.register()
    kernels._say_misfit.cache_clear()
    monkeypatch.setenv("PALEY_BACKEND", "auto")
    kernels.backend()  # says what it took, before
    given = example(3, 17, 3, group_size)
    with caplog.at_level(logging.INFO, logger="paley"):
        prepared = planes.prepare(*given[3:])
        planes.prepare(*given[3:])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"groups of {group_size} columns" in record.message
    assert prepared.centroids is given[4]
    assert torch.equal(planes.matmul(*given[:3], prepared), planes.reference(*given, 17))
    monkeypatch.setenv("PALEY_BACKEND", "native")
    with pytest.raises(PaleyError, match=f"take no groups of {group_size} columns.*set PALEY_BACKEND=auto"):
        planes.prepare(*given[3:])
    monkeypatch.setenv("PALEY_BACKEND", "reference")
    assert planes.prepare(*given[3:]).centroids is given[4]
    with pytest.raises(PaleyError, match=f"group_size={group_size} is no multiple of 32 up to 512"):
        native.pack_planes(*given[3:])


def test_the_op_runs_the_kernel(monkeypatch):
    kernels.register()
    monkeypatch.setenv("PALEY_BACKEND", "native")
    given = whole_numbers(3, 17, 128)
    expected = planes.reference(*given, 17)
    prepared = planes.prepare(*given[3:])
    assert prepared.centroids is None
    assert prepared.weight.dim() == 1
    assert torch.equal(planes.matmul(*given[:3], prepared), expected)
    with torch.inference_mode():
        assert torch.equal(planes.matmul(given[0], given[1], given[2].float(), prepared), expected)
    assert planes.matmul(*(x[:0] for x in given[:3]), prepared).shape == (0, 17)
    assert planes.matmul(*(x.to("meta") for x in given[:3]), prepared).shape == (3, 17)
    monkeypatch.setenv("PALEY_BACKEND", "reference")
    with pytest.raises(PaleyError, match="packed for native kernels, which are off now"):
        planes.matmul(*given[:3], prepared)
    assert torch.equal(planes.matmul(*given[:3], planes.prepare(*given[3:])), expected)


@pytest.mark.parametrize("backend", ["native", "reference", "auto"])
def test_the_rules_for_ops(backend, monkeypatch):
    kernels.register()
    monkeypatch.setenv("PALEY_BACKEND", backend)
    given = example(3, 17, 3, 64)
    torch.library.opcheck(torch.ops.paley.planes_pack.default, given[3:])
    prepared = planes.prepare(*given[3:])
    weight = (prepared.weight, prepared.centroids, 17)
    torch.library.opcheck(torch.ops.paley.planes_matmul.default, (*given[:3], *weight))
    assert torch.ops.paley.planes_pack(*(x.to("meta") for x in given[3:])).shape == (17, 192)


def test_other_devices_are_refused(monkeypatch):
    kernels.register()
    monkeypatch.setenv("PALEY_BACKEND", "native")
    *x, codes, centroids = example(3, 17, 3, 64)
    blob, elsewhere = native.pack_planes(codes, centroids), [y.to("meta") for y in x]
    with pytest.raises(PaleyError, match="inputs are on meta, but the weight was prepared on cpu; move the inputs"):
        planes.reference(*elsewhere, blob, None, 17)
    with pytest.raises(PaleyError, match="which run on the CPU only, not on meta; prepare it again"):
        planes.reference(*elsewhere, blob.to("meta"), None, 17)
    for given in ((*elsewhere, blob), (*x, blob.to("meta"))):
        with pytest.raises(PaleyError, match="native kernels run on the CPU, got a tensor on meta"):
            native.planes_matmul(*given, 17)
    with pytest.raises(PaleyError, match="native kernels run on the CPU, got a tensor on meta"):
        native.pack_planes(codes.to("meta"), centroids.to("meta"))


def test_inputs_of_another_shape_are_refused():
    x_codes, x_scales, x_zeros, codes, centroids = example(3, 64, 3, 128)
    blob = native.pack_planes(codes, centroids)
    for x in (
        (x_codes[:, :256], x_scales[:, :2], x_zeros[:, :2]),
        (x_codes[:, :192], x_scales, x_zeros),
        (x_codes, x_scales[:, :1], x_zeros[:, :1]),
    ):
        with pytest.raises(PaleyError, match="must have the weight's shape"):
            native.planes_matmul(*x, blob, 64)
    with pytest.raises(PaleyError, match="is not of 100 rows"):
        native.planes_matmul(x_codes, x_scales, x_zeros, blob, 100)
    with pytest.raises(PaleyError, match="bad argument"):  # as many blocks, but fewer rows
        native.planes_matmul(x_codes, x_scales, x_zeros, blob, 63)
    with pytest.raises(PaleyError, match="bad argument"):
        native.planes_matmul(x_codes, x_scales, x_zeros, torch.zeros_like(blob), 64)
    with pytest.raises(PaleyError, match="must have the weight's shape"):
        native.planes_matmul(x_codes, x_scales, x_zeros, codes, 64)


def test_unknown_ways_are_refused():
    given = example(1, 16, 3, 32)
    blob = native.pack_planes(*given[3:])
    with pytest.raises(PaleyError, match="path 'dot' is none of auto, popcount, dots, tables; did you mean 'dots'"):
        native.planes_matmul(*given[:3], blob, 16, path="dot")
    with pytest.raises(PaleyError, match="bad argument"):
        native.planes_matmul(*given[:3], blob, 16, threads=0)
    with pytest.raises(PaleyError, match="level 'avx' is none of portable, avx2, avx512"):
        native.planes_matmul(*given[:3], blob, 16, level="avx")


def test_a_level_that_this_machine_lacks_is_refused(monkeypatch):
    given = example(1, 16, 3, 32)
    blob = native.pack_planes(*given[3:])
    y = native.planes_matmul(*given[:3], blob, 16)
    monkeypatch.setattr(native, "level_number", lambda what, level, best: native.LEVELS.index(best) + 1)
    with pytest.raises(PaleyError, match="paley_planes_matmul failed: bad argument"):  # by the library itself
        native.planes_matmul(*given[:3], blob, 16)
    monkeypatch.undo()
    monkeypatch.setattr(native, "best_planes_level", lambda: "portable")
    with pytest.raises(PaleyError, match="lacks instructions of level 'avx512'; its best is 'portable'"):
        native.planes_matmul(*given[:3], blob, 16, level="avx512")
    assert torch.equal(native.planes_matmul(*given[:3], blob, 16), y)


@pytest.mark.skipif(not CPUINFO.exists(), reason="needs Linux")
def test_the_best_level_for_planes_is_what_the_processor_says():
    flags = set(re.findall(r"\w+", next(iter(re.findall(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.M)), "")))
    needs = {"avx2": {"avx2", "fma", "f16c"}}
    needs["avx512"] = {"avx2", "fma", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_vpopcntdq"}
    has = [level for level in native.LEVELS[:3] if needs.get(level, set()) <= flags]
    assert native.best_planes_level() == has[-1]
    assert native.LEVELS.index(native.best_planes_level()) <= native.LEVELS.index(native.best_level())


def test_the_library_itself_refuses_other_blobs(monkeypatch):
    given = example(1, 17, 3, 64)
    blob = native.pack_planes(*given[3:])
    for byte, value in ((0, 0), (4, 18), (8, 2), (12, 1), (16, 2), (19, 255)):  # magic, out, groups, words, mirrored
        other = blob.clone()
        other[byte] = value
        with pytest.raises(PaleyError, match="paley_planes_matmul failed: bad argument"):
            native.planes_matmul(*given[:3], other, 17)
    for other in (blob[:-1], blob[:64], blob[:3], blob[:0], torch.cat([blob, blob])):
        monkeypatch.setattr(native, "blob_bytes", lambda *shape, other=other: len(other))
        with pytest.raises(PaleyError, match="paley_planes_matmul failed: bad argument"):
            native.planes_matmul(*given[:3], other, 17)
        with pytest.raises(PaleyError, match="paley_pack_planes failed: bad argument"):
            native.pack_planes(*given[3:])
