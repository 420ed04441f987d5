"""K-quants: the gguf package decodes what was fitted, and the error is that of a good quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paley.export.k_quants import fit_q4_k, fit_q6_k

gguf = pytest.importorskip("gguf")

FITS = {"Q4_K": fit_q4_k, "Q6_K": fit_q6_k}


def decoded(data: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def error(weight: torch.Tensor, kind: str) -> float:
    return float((decoded(FITS[kind](weight), kind) - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize(("kind", "most"), [("Q4_K", 0.00522), ("Q6_K", 0.000307)])
def test_gaussian_weights(kind, most):
    """No worse than ggml's own search, by its function ggml_quantize_chunk."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert error(weight, kind) < most
    assert error(weight * 1e-2, kind) < 1.1 * most


@pytest.mark.parametrize("kind", FITS)
def test_what_the_type_holds_is_kept(kind):
    """Random blocks are decoded, fitted and decoded again."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (8, size), dtype=np.uint8)
    halves = slice(0, 4) if kind == "Q4_K" else slice(size - 2, size)
    blocks[:, halves] = np.tile(np.frombuffer(np.float16(0.01).tobytes(), np.uint8), (halves.stop - halves.start) // 2)
    weight = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).copy())
    assert error(weight, kind) < 1e-3


@pytest.mark.parametrize("kind", FITS)
def test_rows_of_zeros_of_one_value_and_of_one_outlier(kind):
    weight = torch.zeros(4, 256)
    weight[1], weight[2, 7], weight[3] = 0.25, -1000.0, -0.25
    found = decoded(FITS[kind](weight), kind)
    assert torch.equal(found[0], weight[0])
    assert torch.allclose(found[[1, 3]], weight[[1, 3]], rtol=2e-3)
    assert found[2, 7] == pytest.approx(-1000, rel=2e-2)
    assert bool((found[2].abs() <= 1000 * 1.02).all())
