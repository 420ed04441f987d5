"""The op that rounds activations: native kernels and torch code give the same bits, and gradients flow."""

from __future__ import annotations

import pytest
import torch

from paley.core import rounding as reference
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.kernels import available
from paley.kernels import rounding as kernel
from paley.ops import rounding
from paley.ops.attention import kv_attention, pack_kv
from paley.ops.inputs import encode_input, round_input

native = pytest.mark.skipif(not available(), reason="the native kernels were not built")
TURN = Transform(44, 48, 24, seed=2)
UINT4 = ActivationScheme("uint4", clip_ratio=0.95, group_size=12)
SCHEMES = [
    UINT4,
    ActivationScheme("gauss4", "rms"),
    ActivationScheme("p2n16", "rms"),
    ActivationScheme("e8q14k4", "rms"),
]


@pytest.fixture
def taken(monkeypatch):
    """The names of the kernels that ran."""
    names = []
    for name in ("round_trip", "quantize_dynamic", "turn_back"):
        plain = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, n=name, f=plain, **k: (names.append(n), f(*a, **k))[1])
    return names


def by_each_backend(monkeypatch, make):
    made = []
    for backend in ("native", "reference"):
        monkeypatch.setenv("PALEY_BACKEND", backend)
        made.append(make())
    return made


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("outliers", [None, [1, 30, 47]])
@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=str)
def test_inputs_are_the_same_without_native_kernels(monkeypatch, taken, scheme, outliers, dtype):
    g = torch.Generator().manual_seed(0)
    x, diagonal = torch.randn(3, 5, 44, generator=g).to(dtype), torch.rand(44, generator=g) + 0.5
    columns = None if outliers is None else torch.tensor(outliers, dtype=torch.int32)
    linear = LinearScheme(WeightScheme("int4"), scheme, TURN, len(outliers or ()), True)
    a, b = by_each_backend(monkeypatch, lambda: round_input(x, linear, columns, diagonal))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert bool(taken) == (dtype != torch.float64)
    if scheme == UINT4:
        coded = by_each_backend(monkeypatch, lambda: vars(encode_input(x, linear, columns, diagonal)).values())
        for a, b in zip(*coded, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@native
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_keys_and_values_are_the_same_without_native_kernels(monkeypatch, taken, scheme):
    g, turn = torch.Generator().manual_seed(0), Transform(48, 48, 24, seed=2)
    k, v, q = (torch.randn(2, 7, 3, 48, generator=g).transpose(1, 2) for _ in range(3))
    packed = by_each_backend(monkeypatch, lambda: pack_kv(k, scheme, turn).parts())
    assert all(torch.equal(a, b) for a, b in zip(*packed, strict=True))
    module = torch.nn.Module()
    module.is_causal = True
    how = AttentionScheme(scheme, scheme, turn)
    a, b = by_each_backend(monkeypatch, lambda: kv_attention(module, q, k, v, how, None)[0])
    assert torch.equal(a, b)
    assert taken


@pytest.mark.parametrize("scheme", [None, *SCHEMES[:2], ActivationScheme("uint4", refit=True)], ids=str)
def test_gradients_flow(scheme):
    x = torch.randn(5, 44, requires_grad=True)
    rounding.round_trip(x, scheme, transform=TURN).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        without = rounding.round_trip(x, scheme, transform=TURN)
    assert torch.equal(without, rounding.round_trip(x, scheme, transform=TURN))
    torch.testing.assert_close(x.grad, 2 * TURN.adjoint(without))  # of the transform; a rounding passes it on
    kept = x.clone()  # a view or a copy of what wants gradients
    assert rounding.round_trip(kept, scheme, transform=TURN).requires_grad


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_the_torch_code(scheme):
    x = torch.randn(5, 44)
    want = reference.round_trip(TURN.apply(x), scheme)
    assert torch.equal(rounding.round_trip(x, scheme, transform=TURN), want)
    assert torch.equal(rounding.quantize_dynamic(x, scheme, torch.float32, transform=TURN).dequantize(), want)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_turned_back_is_the_same_without_native_kernels(monkeypatch, taken, dtype):
    x = torch.randn(2, 3, 48).to(dtype)
    a, b = by_each_backend(monkeypatch, lambda: rounding.turn_back(x, TURN))
    assert torch.equal(a, b)
    assert torch.equal(a, TURN.adjoint(x))
    assert bool(taken) == (dtype == torch.float32)


def test_nothing_to_do_changes_nothing():
    x = torch.randn(3, 4)
    assert rounding.round_trip(x, None) is x
