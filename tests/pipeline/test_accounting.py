"""One account of the bits that a quantized weight takes: of files, results, curves and budgets alike."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint
from paley.model.loading import open_source
from paley.model.sensitivity import KINDS, noise_kind, noise_sites
from paley.pipeline import make_plan, quantize
from paley.pipeline.accounting import quantized_bits
from paley.pipeline.curve import accuracy_size_curve
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.recipe import apply_settings, preset
from paley.sensitivity import MeasuredSlot, MeasuredText, Sensitivity

SHORT = [f"{part}.{size}" for part in ("calibration", "search", "test") for size in ("sequences=2", "seq_len=24")]
LINEARS = {"q": 64 * 64, "k": 64 * 32, "v": 64 * 32, "o": 64 * 64, "gate": 64 * 96, "up": 64 * 96, "down": 96 * 64}
OUTER = 2 * 260 * 64  # embedding and head


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def slopes(folder) -> Sensitivity:
    source = open_source(folder)
    found = {
        name: MeasuredSlot(kind=noise_kind(site), numel=site.numel, alpha=1.0, stderr=0.0, levels=())
        for name, site in noise_sites(source.sites, KINDS).items()
    }
    text = MeasuredText(source="random", sha256="0", tokens=1)
    return Sensitivity(
        fingerprint=source.fingerprint, model_type="llama", metric="kl", text=text, seed=0, baseline=0.0,
        folded=False, slots=found,
    )  # fmt: skip


def weight_bits(path: Path, without: str = "?") -> int:
    """Bits of every tensor of the weights, as the files hold them."""
    infos = Checkpoint.open(path).infos.items()
    return 8 * sum(
        info.nbytes
        for name, info in infos
        if not name.endswith(("norm.weight", "key_mean", "key_offset")) and without not in name
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_budget_a_curve_and_the_files_agree(folder, slopes, dtype, tmp_path):
    keep = "overrides=[{pattern: '*.1.mlp.up_proj', keep: true}]"
    settings = ["budget={weights: 8.5, grids: [p2n16, keep]}", keep, "test=null", f"dtype={dtype}"]
    wanted = apply_settings(preset("higgs-4"), settings)
    done = quantize(folder, wanted, output=tmp_path / "out", sensitivity=slopes)
    kept = [name for name, scheme in done.plan.linears.items() if scheme.weight is None]
    assert len(kept) > 1
    weights = 2 * sum(LINEARS.values()) - LINEARS["up"] + OUTER
    bits = weight_bits(tmp_path / "out", without="1.mlp.up_proj") / weights
    assert done.results.bits_per_quantized_weight == pytest.approx(bits, rel=1e-12)
    (point,) = accuracy_size_curve(folder, wanted, [8.5], sensitivity=slopes)
    assert point.bits_per_weight == pytest.approx(bits, rel=1e-12)
    assert bits <= 8.5


def test_what_expansion_adds_is_counted(folder, tmp_path):
    wanted = apply_settings(preset("w4a4kv4"), [*SHORT, "search.method=none", "expand=16", "expand_mlp=16"])
    done = quantize(folder, wanted, output=tmp_path / "out")
    assert done.results.bits_per_quantized_weight == weight_bits(tmp_path / "out") / (2 * sum(LINEARS.values()) + OUTER)


def test_without_quantized_weights_there_are_no_bits(folder):
    wanted = apply_settings(preset("w16a4"), [*SHORT, "search.method=none"])
    assert quantized_bits(resolve(open_source(folder), wanted)) is None


@pytest.mark.parametrize(
    ("dtype", "centered"), [("float16", "mean"), ("float32", "mean"), ("float16", "true"), ("float16", "false")]
)
def test_a_size_is_that_of_the_files(folder, slopes, dtype, centered, tmp_path):
    settings = ["rotate=none", "expand_mlp=0", "search.method=none", f"center_keys={centered}", f"dtype={dtype}"]
    settings.append("overrides=[{pattern: '*.0.self_attn.k_proj', keep: true}]")
    wanted = apply_settings(preset("w4a16kv4"), [*SHORT, *settings, "budget={size: 600000, grids: [gauss4]}"])
    size = quantize(folder, wanted, output=tmp_path / "out", sensitivity=slopes).results.bytes
    make_plan(folder, apply_settings(wanted, [f"budget.size={size}"]), sensitivity=slopes)
    with pytest.raises(PaleyError, match=f"{size - 1:,} bytes are out of reach; {size:,} to {size:,}"):
        make_plan(folder, apply_settings(wanted, [f"budget.size={size - 1}"]), sensitivity=slopes)


class Listener(Monitor):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("name", "noted"), [("rtn-w4a16", True), ("higgs-4", False)])
def test_a_budget_for_what_nothing_rotates_is_mentioned(folder, slopes, name, noted):
    wanted, listener = apply_settings(preset(name), [*SHORT, "budget={weights: 4.5}"]), Listener()
    make_plan(folder, wanted, sensitivity=slopes, monitor=listener)
    assert any("Gaussian" in note for note in listener.notes) == noted
