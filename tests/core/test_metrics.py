import pytest
import torch

from paley.core import metrics
from paley.core.errors import PaleyError
from paley.core.metrics import kl_divergence


@pytest.mark.parametrize("shape", [(11, 7), (2, 3, 7), (1, 7), (7,), (0, 7), (2, 0, 7)])
def test_divergences_in_parts_are_those_of_the_formula(shape, monkeypatch):
    monkeypatch.setattr(metrics, "_VALUES", 4 * 7)  # four rows at a time
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(2))
    found = kl_divergence(p, q)
    wanted = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert found.shape == shape[:-1]
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(x.sum(), (p, q), retain_graph=True) for x in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_divergences_of_some_tokens_and_of_16_bits(monkeypatch):
    monkeypatch.setattr(metrics, "_VALUES", 2 * 7)
    p, q = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(kl_divergence(p[:, :-1], q[:, :-1]), kl_divergence(p, q)[:, :-1])
    found = kl_divergence(p.bfloat16(), q.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kl_divergence(p.bfloat16().float(), q.bfloat16().float()))


def test_tokens_must_be_paired():
    with pytest.raises(PaleyError, match=r"got \[3, 2, 7\] and \[2, 3, 7\]"):
        kl_divergence(torch.zeros(3, 2, 7), torch.zeros(2, 3, 7))
