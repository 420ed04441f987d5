"""An input is transformed and rounded once for all that read it, and then let go."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from paley.core.schemes import ActivationScheme, LinearScheme
from paley.core.transforms import Transform
from paley.model.linear import QuantLinear
from paley.ops import rounding
from paley.ops.inputs import SharedInput

READERS = ("q", "k", "v")


class Maker:
    """Doubles its input, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return 2 * x


def test_it_is_made_once_for_all_readers_and_then_let_go():
    shared, make, x = SharedInput(3), Maker(), torch.ones(2, 4)
    taken = [shared.take(reader, x, "values", make) for reader in READERS]
    assert make.calls == 1
    assert all(made is taken[0] for made in taken)
    assert torch.equal(taken[0], 2 * x)
    gone = [weakref.ref(tensor) for tensor in (x, taken[0])]
    del x, taken
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_another_input_is_another_even_if_it_is_equal():
    shared, make, x = SharedInput(3), Maker(), torch.ones(2, 4)
    shared.take("q", x, "values", make)
    assert torch.equal(shared.take("k", x + 1, "values", make), 2 * x + 2)
    shared.take("v", x.clone(), "values", make)
    assert make.calls == 3


def test_a_reader_that_comes_again_gets_it_made_anew():
    """A forward that ended early took it away from nobody; the tensor may have been written to since."""
    shared, make, x = SharedInput(3), Maker(), torch.ones(2, 4)
    shared.take("q", x, "values", make)
    x += 1
    assert torch.equal(shared.take("q", x, "values", make), 2 * x)
    shared.take("k", x, "values", make)
    assert make.calls == 2


def test_each_way_of_making_it_is_one_and_the_last_reader_takes_all_away():
    shared, values, codes, x = SharedInput(4), Maker(), Maker(), torch.ones(2, 4)
    for reader, how, make in (("q", "a", values), ("k", "b", codes), ("v", "a", values), ("w", "b", codes)):
        shared.take(reader, x, how, make)
    assert (values.calls, codes.calls) == (1, 1)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_the_readers_of_a_copy_stay_together_and_leave_the_others_alone():
    layers = nn.ModuleList(QuantLinear(4, 4, bias=False, scheme=LinearScheme()) for _ in READERS)
    shared = SharedInput(3)
    for layer in layers:
        layer.shared_input = shared
    shared.take(layers[0], torch.ones(2, 4), "values", Maker())
    copies = copy.deepcopy(layers)
    (of_copies,) = {layer.shared_input for layer in copies}
    assert of_copies is not shared
    assert of_copies.readers == 3
    assert of_copies._x is None  # a copy of a model holds none of its activations
    assert {layer.shared_input for layer in layers} == {shared}
    make, x = Maker(), torch.ones(2, 4)
    for layer in copies:
        of_copies.take(layer, x, "values", make)
    assert make.calls == 1


@pytest.mark.parametrize("transform", [None, Transform(8, 8, 8, seed=1)])
@torch.no_grad()
def test_linears_round_what_they_share_once(monkeypatch, transform):
    calls, plain = [], rounding.round_trip
    monkeypatch.setattr(rounding, "round_trip", lambda *a, **k: calls.append(0) or plain(*a, **k))
    scheme, shared = LinearScheme(input=ActivationScheme("int2"), transform=transform), SharedInput(2)
    source, x = nn.Linear(8, 4), torch.randn(3, 8)
    layers = [QuantLinear.from_linear(source, scheme, None) for _ in range(2)]
    for layer in layers:
        layer.shared_input = shared
    want = plain(x, scheme.input, transform=transform) @ source.weight.T + source.bias
    for rounds in (1, 2):  # the second forward makes it anew
        for layer in layers:
            torch.testing.assert_close(layer(x), want)
        assert len(calls) == rounds
    layers[1].set_input_(ActivationScheme("int8"))
    outputs = [layer(x) for layer in layers]
    assert len(calls) == 4
    torch.testing.assert_close(outputs[0], want)
    assert not torch.allclose(outputs[1], want)
