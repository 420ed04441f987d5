"""oneDNN's linears in place of MKL's: the same to float32's rounding, and PyTorch's own wherever they do not apply."""

import pytest
import torch
from torch import nn

from paley.kernels import floats
from paley.kernels.floats import QuickProducts, quickly


@pytest.fixture(params=[True, False], ids=["quick", "as they are"])
def quick(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(floats, "are_quicker", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(9, 40), (1, 40), (3, 5, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_linears(quick, shape, bias):
    layer, x = nn.Linear(40, 24, bias=bias), torch.randn(shape)
    with torch.no_grad(), QuickProducts():
        found, rows = layer(x), layer(x[..., ::2, :])
    assert found.shape == (*shape[:-1], 24)
    torch.testing.assert_close(found, layer(x).detach())
    torch.testing.assert_close(rows, layer(x[..., ::2, :]).detach())
    with QuickProducts():
        turned = nn.functional.linear(x, layer.weight.detach().T.contiguous().T)
    torch.testing.assert_close(turned, x @ layer.weight.detach().T)


def test_what_it_leaves_to_pytorch(quick):
    """Other types, gradients, columns of a larger matrix, named arguments, shapes that do not fit."""
    layer, x = nn.Linear(40, 24), torch.randn(16, 40)
    with QuickProducts():
        layer(x).sum().backward()
        assert layer(x.requires_grad_()).requires_grad
        with torch.no_grad():
            assert torch.equal(layer.double()(x.double()), nn.functional.linear(x.double(), layer.weight, layer.bias))
            wide = torch.randn(24, 100)
            assert torch.equal(nn.functional.linear(x, wide[:, :40]), x @ wide[:, :40].T)
            assert nn.functional.linear(input=x, weight=wide[:, 60:]).shape == (16, 24)
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                nn.functional.linear(x, torch.randn(24, 41))
    assert layer.weight.grad is not None


def test_rows_and_threads_change_no_bit(quick):
    layer, x = nn.Linear(96, 200), torch.randn(64, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad(), QuickProducts():
                found += [layer(x), torch.cat([layer(x[:24]), layer(x[24:])])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found) or not quick


@pytest.mark.parametrize("quicker", [True, False])
def test_a_function_that_computes_quickly(quicker, monkeypatch):
    modes = []

    def work(a, b=2):
        modes.append(torch._C._len_torch_function_stack())
        return nn.functional.linear(torch.ones(a, b), torch.ones(a, b))

    monkeypatch.setattr(floats, "are_quicker", lambda: quicker)
    monkeypatch.setattr(floats, "_product", lambda x, weight: 2 * (x @ weight.T))
    assert quickly(work)(9).eq(4.0 if quicker else 2.0).all()
    assert modes == [int(quicker)]
