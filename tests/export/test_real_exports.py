"""Real models in each format, opened by the tools of the format: the same text, and the logits that we have.

Set PALEY_MODELS to checkpoint folders, with colons between them (bench/models.py makes some).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import paley
from gguf_models import file_of
from llama_cpp import open_llama_cpp
from paley.recipe import apply_settings, preset

MODELS = [path for path in os.environ.get("PALEY_MODELS", "").split(os.pathsep) if path]
# Format -> preset, and the KL that it may have: llama.cpp rounds inputs to 8 bits, and MLX the offsets to float16.
# Scales by the largest value, as searching them takes minutes.
TARGETS = {"gguf": ("gguf-q4_0", 0.02), "compressed-tensors": ("ct-w4g128", 1e-6), "mlx": ("mlx-4", 1e-4),
           "plain": ("ct-w4g128", 1e-3)}  # fmt: skip
GREEDY = 10
PROMPT = "The river rises in the hills north of the town. In spring, when the snow melts, the water"


def transformers(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(torch.tensor([ids]), use_cache=False).logits[0]


@contextmanager
def opened(to: str, folder: Path):
    """-> what makes logits [tokens, vocabulary] of ids."""
    if to == "gguf":
        with open_llama_cpp(file_of(folder)) as peer:
            yield peer.logits
    elif to == "mlx":
        mx = pytest.importorskip("mlx.core", reason='pip install "mlx[cpu]"')
        utils = pytest.importorskip("mlx_lm.utils", reason="pip install mlx-lm")
        mx.set_default_device(mx.cpu)
        model, _ = utils.load_model(folder)
        yield lambda ids: torch.from_numpy(np.array(model(mx.array([ids])).astype(mx.float32))[0])
    else:
        if to == "compressed-tensors":
            pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
        yield transformers(folder)


def continued(logits: Callable[[list[int]], torch.Tensor], ids: list[int]) -> list[int]:
    """The ids and a greedy text behind them."""
    for _ in range(GREEDY):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    return ids


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason="set PALEY_MODELS to checkpoint folders, with colons between them")
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: Path(folder).name)
def test_the_tool_reads_what_we_read(folder, to, tmp_path, record_property):
    name, most = TARGETS[to]
    quick = ["weights.scale_search=absmax", *(["weights.grid=int4"] if to == "gguf" else [])]
    recipe = apply_settings(preset(name), ["test=null", "weights.method=nearest", "fit_groups=true", *quick])
    out = paley.quantize(folder, recipe, output=tmp_path / "out").output
    made = paley.export_to(out, to, output=tmp_path / to)
    model, ids = paley.load(out, product="dense"), AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    ids = continued(lambda ids: model(torch.tensor([ids]), use_cache=False).logits[0], ids)
    ours = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    with opened(to, made.output) as logits:
        theirs = logits(ids).double().log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    written = theirs[-GREEDY - 1 : -1]
    behind = float((written.amax(-1) - written[range(GREEDY), ids[-GREEDY:]]).max())  # 0: it writes the same text
    print(f"{Path(folder).name} {name} {to}: KL {kl:.2e}, {len(ids)} tokens, text {behind:.3f}, {made.bytes:,} bytes")
    assert kl < most
    assert behind < 0.2
