"""The diagonal: the closed form is the minimum, and channels that say nothing do not decide."""

import torch

from paley.methods.diagonal import balance


def cost(inputs, weight, diagonal):
    """‖W D‖² · ‖D⁻¹ x‖² with rows of unit size, as the docstring has it."""
    rows = weight / weight.square().mean(1, keepdim=True).sqrt()
    return float((rows * diagonal).square().sum() * (inputs / diagonal).square().sum())


def example():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(24, generator=generator).exp().double()
    weight = torch.randn(40, 24, generator=generator).double() * torch.randn(24, generator=generator).exp()
    return sizes, weight * torch.randn(40, 1, generator=generator).exp()


def test_it_is_the_minimum():
    inputs, weight = example()
    d = balance(inputs, weight).double()
    least = cost(inputs, weight, d)
    columns = (weight.square() / weight.square().mean(1, keepdim=True)).sum(0).sqrt()
    bound = float((columns * inputs).sum()) ** 2  # Cauchy-Schwarz
    assert abs(least / bound - 1) < 1e-3  # float16
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = d * (0.2 * torch.randn(24, generator=generator).double()).exp()
        assert cost(inputs, weight, other) > least
    assert cost(inputs, weight, torch.ones(24)) > 1.5 * least


def test_it_does_not_depend_on_the_size_of_inputs_or_rows():
    inputs, weight = example()
    torch.testing.assert_close(balance(inputs * 1e4, weight * torch.rand(40, 1).double()), balance(inputs, weight))


def test_dead_channels_are_left_alone():
    inputs, weight = example()
    inputs[3], weight[:, 7] = 0.0, 0.0
    d = balance(inputs, weight)
    assert d[3] == d[7] == 1
    assert (d > 0).all()
    assert d.isfinite().all()
    rest = [i for i in range(24) if i not in (3, 7)]
    assert abs(float(d[rest].double().log().mean())) < 1e-3
    assert (balance(torch.zeros(24), weight) == 1).all()


def test_its_range_is_bounded():
    inputs = torch.tensor([1e-30, 1.0, 1.0, 1.0])
    d = balance(inputs, torch.ones(5, 4))
    assert d.min() >= 2.0**-10
    assert d.max() <= 2.0**10
