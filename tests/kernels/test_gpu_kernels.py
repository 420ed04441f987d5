"""Triton's kernels against the ops' meaning, by Triton's interpreter, which needs no GPU; and compiled for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_native_matmul import scheme_of, weight_of

import paley
from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme
from paley.core.transforms import Transform
from paley.kernels import gpu
from paley.kernels.stored import StoredWeight
from paley.model.coded import Coded
from paley.model.decoder import ModelDecoder
from paley.ops import attention, matmul
from tiny_models import higgs, save_tiny

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install --no-deps triton", allow_module_level=True)
if not gpu.interpreted():
    pytest.skip("runs with TRITON_INTERPRET=1, which is read when triton is first imported", allow_module_level=True)

CPU = torch.device("cpu")
GRIDS = ["int4", "uint4", "gauss2", "gauss3", "gauss4", "uint8", "p2n16", "p2n64", "p2n256", "p2n1024", "p2n4096"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor, error: float = 2e-6) -> bool:
    return float((found - wanted).norm()) <= error * float(wanted.norm())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize(("rows", "width", "group"), [(37, 96, 48), (64, 52, None), (5, 200, 20)])
def test_products_are_those_of_the_decoded_weight(grid, tokens, rows, width, group):
    from paley.kernels.gpu.matmul import matmul as product
    from paley.kernels.gpu.matmul import prepare, takes

    scheme = scheme_of(grid, group)
    assert takes(scheme, width)
    q = weight_of(scheme, rows, width)
    matrix = prepare(StoredWeight("w", packing.pack_codes(q.codes, q.grid.size), q.scales, q.zeros, q.grid, width))
    x = gaussian(tokens, width)
    assert close(product(x, matrix), x @ q.dequantize().T)
    half = product(x.half(), matrix)
    assert half.dtype == torch.float16
    assert close(half.float(), x @ q.dequantize().T, 2e-3)


@pytest.mark.parametrize("tokens", [2, 16, 33, 64, 70])
def test_any_number_of_tokens(tokens):
    from paley.kernels.gpu.matmul import matmul as product
    from paley.kernels.gpu.matmul import prepare

    scheme = scheme_of("p2n256", 64)
    q = weight_of(scheme, 40, 128)
    matrix = prepare(StoredWeight("w", packing.pack_codes(q.codes, 256), q.scales, None, q.grid, 128))
    x = gaussian(tokens, 128)
    assert close(product(x, matrix), x @ q.dequantize().T)
    assert product(x[:0], matrix).shape == (0, 40)
    with pytest.raises(PaleyError, match=r"read floats \[tokens, 128\] on cpu, got torch.float32 \[3, 64\]"):
        product(x[:3, :64], matrix) if tokens > 2 else product(torch.zeros(3, 64), matrix)


def test_what_it_does_not_take():
    from paley.kernels.gpu.matmul import takes

    for grid in ("p2n88", "p3n512", "p4n256", "free2", "e8q14k4", "trellis2"):
        assert not takes(scheme_of(grid), 96), grid
    assert not takes(scheme_of("gauss4", None, ActivationScheme("int8"), outliers=2), 96)
    assert not takes(LinearScheme(), 96)


def test_the_product_of_that_name_is_the_op(monkeypatch):
    """With a transform and rounded inputs, as a layer calls it."""
    scheme = LinearScheme(scheme_of("p2n256", 48).weight, ActivationScheme("int8"), Transform(90, 96, 12, seed=5))
    layer = Coded(23, 96, scheme, dtype=torch.float32, device="cpu", name="layer")
    layer.set_quantized_(weight_of(scheme, 23, 96))
    x = gaussian(2, 7, 90)
    made = matmul.choose(layer, 96, CPU, torch.float32, "triton")
    assert made.name == "triton"
    assert close(made.run(made.encode(x), x), matmul.grid_matmul(x, layer))
    monkeypatch.setattr(matmul, "PRODUCTS", {"triton": matmul.Triton, "dense": matmul.Dense})
    for wanted, name in (("", "dense"), ("1", "triton")):
        monkeypatch.setenv("PALEY_TRITON", wanted)
        assert matmul.choose(layer, 96, CPU, torch.float32).name == name


SIDES = {
    "uint4": ActivationScheme("uint4"), "uint2 in groups": ActivationScheme("uint2", group_size=8),
    "gauss4": ActivationScheme("gauss4", scale="rms"), "uint8": ActivationScheme("uint8"),
    "gauss3": ActivationScheme("gauss3", scale="rms"),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Calls of the kernel so far."""
    from paley.kernels.gpu import attention as kernel

    found, run = [], kernel._run
    monkeypatch.setattr(kernel, "_run", lambda *args: found.append(1) or run(*args))
    return found


@pytest.mark.parametrize(("keys", "values"), [("uint4", "uint4"), ("gauss4", "uint2 in groups"), ("uint8", "gauss3")])
@pytest.mark.parametrize("shape", [(2, 6, 2, 1, 70), (1, 4, 4, 1, 1), (1, 9, 3, 5, 33)])
def test_attention_is_that_over_the_decoded_cache(keys, values, shape, monkeypatch, calls):
    batch, heads, kv_heads, n, tokens = shape
    turn = Transform(24, 24, 8, seed=1)
    scheme = AttentionScheme(SIDES[keys], SIDES[values], turn, rotate_values=True)
    k = attention.pack_kv(gaussian(batch, kv_heads, tokens, 24), SIDES[keys], scheme.key_transform)
    v = attention.pack_kv(gaussian(batch, kv_heads, tokens, 24, seed=1), SIDES[values], scheme.value_transform)
    q = gaussian(batch, heads, n, 24, seed=2)
    seen = torch.ones(n, tokens, dtype=torch.bool).tril(tokens - n)[None, None]
    added = gaussian(batch, heads, n, tokens, seed=3).masked_fill(~seen, -torch.inf)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)
    for mask in (seen.expand(batch, 1, n, tokens), added, *([None] if n == 1 else [])):
        monkeypatch.setenv("PALEY_TRITON", "")
        wanted = attention.kv_attention(module, q, k, v, scheme, mask, scaling=0.3)[0]
        assert not calls
        monkeypatch.setenv("PALEY_TRITON", "1")
        assert close(attention.kv_attention(module, q, k, v, scheme, mask, scaling=0.3)[0], wanted, 1e-5)
        assert calls
        calls.clear()


def test_long_texts_are_shared_among_programs(monkeypatch, calls):
    from paley.kernels.gpu import attention as kernel

    monkeypatch.setattr(kernel, "_SHARE", 64)
    k, v = (attention.pack_kv(gaussian(1, 1, 300, 16, seed=i), SIDES["uint4"]) for i in range(2))
    q = gaussian(1, 70, 1, 16, seed=2)  # more queries than a program takes
    mask = torch.arange(300)[None, None, None] >= 130  # whole shares see nothing
    module = SimpleNamespace(num_key_value_groups=70, is_causal=True, training=False)
    found = kernel.attention(q, k, v, mask, 0.25)
    wanted = attention._attend(module, q, k.dequantize(), v.dequantize(), mask, scaling=0.25)
    assert close(found.transpose(1, 2), wanted, 1e-5)
    assert len(calls) == 2


def test_what_the_kernel_does_not_compute_is_left_to_the_reference(monkeypatch, calls):
    monkeypatch.setenv("PALEY_TRITON", "1")
    scheme = AttentionScheme(SIDES["uint4"], SIDES["uint4"])
    k, v = (attention.pack_kv(gaussian(1, 2, 9, 16, seed=i), SIDES["uint4"]) for i in range(2))
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    q = gaussian(1, 2, 1, 16)
    attention.kv_attention(module, q, k, v, scheme, None, scaling=0.25, softcap=5.0)
    attention.kv_attention(module, q, k, v, scheme, None, base=gaussian(1, 2, 9, 16), scaling=0.25)
    attention.kv_attention(module, gaussian(1, 2, 9, 16), k, v, scheme, None, scaling=0.25)  # causal, without a mask
    assert not calls
    with pytest.raises(PaleyError, match="the cache holds keys as"):
        attention.kv_attention(module, q, k, v, AttentionScheme(SIDES["uint8"], SIDES["uint4"]), None)


@pytest.mark.slow
def test_they_compile_for_a_gpu(tmp_path):
    """In a process without the interpreter: NVIDIA's compute capability 8.0 and 9.0; no GPU is needed."""
    code = "from paley.kernels.gpu.compiling import compiled\n" + "\n".join(
        f"assert all(found['code_bytes'] for found in compiled({how}).values())"
        for how in ("4, 1, 1, affine=True, capability=80", "8, 2, 16, kind='bf16'")
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parents[2])


def test_a_whole_model_runs_on_them(tmp_path, tiny_tokenizer, monkeypatch, calls):
    """A prompt, then tokens one by one through the packed cache, beside the reference."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    paley.quantize(model, higgs("center_keys=false", name="higgs-w4a16kv4"), output=tmp_path / "out")
    tokens, logits = [1, 7, 30, 9, 11], []
    for product, wanted in (("dense", ""), ("triton", "1")):
        monkeypatch.setenv("PALEY_TRITON", wanted)
        decoder = ModelDecoder(paley.load(tmp_path / "out", product=product))
        context = decoder.start()
        parts = [tokens[:2], *([token] for token in tokens[2:])]
        logits.append(torch.stack([decoder.read([(context, part)])[0] for part in parts]))
    assert calls
    assert close(logits[1], logits[0], 1e-3)  # a value of the cache may fall on the other side of a step
