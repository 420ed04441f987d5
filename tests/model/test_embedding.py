"""A coded embedding looks up what its codes stand for, turned back, scaled, and turned into the residual stream."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from paley.core.errors import PaleyError
from paley.core.schemes import LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.nearest import quantize_nearest
from paley.model.embedding import QuantEmbedding, scale_of
from paley.model.linear import QuantLinear

IDS = torch.tensor([[3, 0, 39], [7, 7, 1]])
TURN, WIDE = Transform(32, 32, 16, seed=3), Transform(30, 48, 16, seed=3)
STREAM = Transform(32, 48, 48, seed=1)


def embedding_of(width=32, scale=None) -> nn.Embedding:
    made = nn.Embedding(40, width) if scale is None else Gemma3TextScaledWordEmbedding(40, width, 0, embed_scale=scale)
    made.weight.data = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    return made.requires_grad_(False)


def coded(embedding, transform=None, grid="int6", group_size=None, stream=None) -> QuantEmbedding:
    rows = embedding.weight.float() if transform is None else transform.apply(embedding.weight.float())
    weight = WeightScheme("int4", group_size, method="nearest").on_grid(grid)
    q = quantize_nearest(rows, weight)
    return QuantEmbedding.around(embedding, stream, LinearScheme(weight, transform=transform), q)


@pytest.mark.parametrize(("grid", "group_size"), [("int6", None), ("uint4", 16), ("p2n256", 16), ("p4n256", None)])
@pytest.mark.parametrize("transform", [None, TURN, WIDE])
def test_it_looks_up_the_rows_that_its_codes_stand_for(grid, group_size, transform):
    source = embedding_of(30 if transform is WIDE else 32)
    made = coded(source, transform, grid, group_size)
    rows = made.dequantize() if transform is None else transform.adjoint(made.dequantize())
    assert torch.equal(made(torch.arange(40)), rows)
    torch.testing.assert_close(made(IDS), rows[IDS], rtol=1e-6, atol=1e-6)
    assert made(IDS).shape == (2, 3, source.embedding_dim)
    assert (made(IDS) - source(IDS)).square().mean() < 0.15  # of values of size 1, at two bits or more
    assert made(IDS[:, :0]).shape == (2, 0, source.embedding_dim)
    assert made(IDS[0, 0]).shape == (source.embedding_dim,)


def test_rows_of_its_own_stay_the_very_parameter():
    source = embedding_of()
    made = QuantEmbedding.around(source, None)
    assert made.weight is source.weight
    assert torch.equal(made(IDS), source(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_scale_is_applied_as_gemma_does(dtype):
    source = embedding_of(scale=30**0.5).to(dtype)
    kept, made = QuantEmbedding.around(source, None), coded(source, TURN)
    assert scale_of(source) == scale_of(made) == scale_of(kept) == pytest.approx(30**0.5)
    assert torch.equal(kept(IDS), source(IDS))
    source.weight.data = TURN.adjoint(made.dequantize()).to(dtype)
    assert made(IDS).dtype == dtype
    torch.testing.assert_close(made(IDS), source(IDS), rtol=1e-6, atol=1e-6)
    assert scale_of(coded(kept, TURN)) == made.scale  # also in place of one of ours
    assert scale_of(embedding_of()) == 1.0


@pytest.mark.parametrize("scale", [None, 4.0])
def test_what_is_looked_up_is_turned_into_the_stream(scale):
    source = embedding_of(scale=scale)
    for made in (QuantEmbedding.around(source, STREAM), coded(source, TURN, stream=STREAM)):
        plain = QuantEmbedding.around(source, None) if made.weight is not None else coded(source, TURN)
        assert made(IDS).shape == (2, 3, 48)
        assert torch.equal(made(IDS), STREAM.apply(plain(IDS)))
        torch.testing.assert_close(STREAM.adjoint(made(IDS)), plain(IDS), rtol=1e-5, atol=1e-5)


def test_a_cast_changes_what_is_looked_up_and_leaves_the_scales_alone():
    made = coded(embedding_of(), TURN)
    before, scales = made(IDS), made.scales.clone()
    made.to(torch.bfloat16)
    assert torch.equal(made(IDS), before.bfloat16())
    assert made.scales.dtype == torch.float16
    assert torch.equal(made.scales, scales)
    assert torch.equal(made.to(torch.float32)(IDS), before)


def test_it_is_stored_as_a_linear_layer_is():
    made = coded(embedding_of(), TURN, "uint4", 16)
    layer = QuantLinear(32, 40, bias=False, scheme=made.scheme)
    assert {n: (t.shape, t.dtype) for n, t in made.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in layer.state_dict().items()
    }
    fresh = QuantEmbedding(40, 32, made.scheme)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(IDS), made(IDS))


def test_a_head_that_shares_its_codes_multiplies_by_its_rows():
    made = coded(embedding_of(), TURN)
    head = QuantLinear(32, 40, bias=False, scheme=made.scheme, device="meta").share_(made)
    assert head.codes is made.codes
    hidden = torch.randn(5, 32)
    for product in ("packed", "dense"):
        head.prepare_(product)
        torch.testing.assert_close(head(hidden), hidden @ made(torch.arange(40)).T, rtol=1e-5, atol=1e-5)


def test_codes_that_do_not_fit_are_refused():
    made = coded(embedding_of(), TURN)
    with pytest.raises(PaleyError, match=r"codes must have shape \(40, 32\), got \(40, 48\)"):
        made.set_quantized_(coded(embedding_of(30), WIDE).quantized())
