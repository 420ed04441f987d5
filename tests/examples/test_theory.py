"""Theorems 3.1 and 3.2 and the lemmas of arXiv:2504.13989, numerically."""

import builtins
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from paley.core.errors import PaleyError
from paley.core.hadamard import hadamard, transform

SCRIPT = Path(__file__).parents[2] / "examples" / "theory.py"
spec = importlib.util.spec_from_file_location("theory", SCRIPT)
assert spec is not None
assert spec.loader is not None
theory = sys.modules["theory"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theory)
PeakPoint, check_figure, draw, flatness = theory.PeakPoint, theory.check_figure, theory.draw, theory.flatness
hadamard_peak, measure_peaks, random_peak = theory.hadamard_peak, theory.measure_peaks, theory.random_peak
random_orthogonal, spiked_vector = theory.random_orthogonal, theory.spiked_vector


@pytest.mark.parametrize("dim", [64, 128, 172, 256, 512])
def test_theorem_3_1_one_outlier(dim):
    """A Hadamard rotation leaves c/√n; a random one more, about c·√(2 ln n / n)."""
    (point,) = measure_peaks([dim], peak=200.0, noise=1e-3, seeds=range(12))
    assert point.hadamard == pytest.approx(200 / math.sqrt(dim), rel=1e-2)
    assert point.hadamard < point.random
    assert 0.8 < point.random / point.random_predicted < 1.1


@pytest.mark.parametrize("outliers", [2, 4])
def test_lemmas_k_outliers(outliers):
    dim = 256
    (point,) = measure_peaks([dim], peak=200.0, noise=0.0, outliers=outliers, seeds=range(12))
    assert point.hadamard <= hadamard_peak(dim, 200.0, outliers) * (1 + 1e-12)
    assert 0.8 < point.random / random_peak(dim, 200.0, outliers) < 1.1


def test_lemma_3_1_is_reached():
    """Outliers whose signs match a row of H meet the bound k·c/√n."""
    row = hadamard(28)[5].double()
    x = torch.zeros(28, dtype=torch.float64)
    x[:3] = 200 * row[:3]
    assert transform(x, 28).abs().max().item() == pytest.approx(hadamard_peak(28, 200.0, 3), rel=1e-12)


@pytest.mark.parametrize("dim", [3, 12, 28, 100])
def test_theorem_3_2_no_orthogonal_matrix_is_flatter(dim):
    generator = torch.Generator().manual_seed(dim)
    q = random_orthogonal(dim, generator)
    assert (q @ q.T - torch.eye(dim, dtype=torch.float64)).abs().max() < 1e-12
    assert flatness(q) > 1.05
    assert flatness(torch.eye(dim)) == pytest.approx(math.sqrt(dim))
    if dim % 4 == 0:
        assert flatness(hadamard(dim).double() / math.sqrt(dim)) == pytest.approx(1, abs=1e-12)


def test_spiked_vectors_have_their_spikes():
    x = spiked_vector(64, torch.Generator().manual_seed(0), peak=200.0, noise=0.1, outliers=3)
    assert (x.abs() == 200).sum() == 3
    assert (x.abs() < 1).sum() == 61


def test_the_same_seeds_give_the_same_points():
    assert measure_peaks([28, 64], seeds=[0, 1]) == measure_peaks([28, 64], seeds=[0, 1])


def test_an_unreachable_dimension_is_refused():
    with pytest.raises(PaleyError, match="order 30"):
        measure_peaks([30])


def test_figure_3_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "peaks.png"
    draw(measure_peaks([16, 28, 64, 128], seeds=range(2)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    for refused in (
        lambda: check_figure(tmp_path / "x.png"),
        lambda: draw([PeakPoint(16, 1.0, 1.0, 1.0, 1.0)], tmp_path / "x.png"),
    ):
        with pytest.raises(PaleyError, match="pip install matplotlib"):
            refused()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("figure.xyz", r"figure\.xyz: no picture format '\.xyz'; known: .*png.*svg"),
        ("figure.pgn", r"did you mean 'png'\?"),
        ("figure", r"figure: has no suffix .*png"),
        ("none/figure.png", r"figure\.png: there is no folder .*none; make it first"),
        ("folder.png", r"folder\.png: is a folder"),
    ],
)
def test_a_figure_that_cannot_be_written_is_refused(tmp_path, name, complaint):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    for refused in (check_figure, lambda path: draw([PeakPoint(16, 1.0, 1.0, 1.0, 1.0)], path)):
        with pytest.raises(PaleyError, match=complaint):
            refused(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_a_suffix_in_capitals_is_one_too(tmp_path):
    pytest.importorskip("matplotlib")
    draw([PeakPoint(16, 1.0, 1.0, 1.0, 1.0)], tmp_path / "x.PNG")
    assert (tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")


def test_the_script_measures_draws_and_prints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(theory, "DIMS", (16, 64))
    theory.main(["--output", str(tmp_path / "figure.svg")])
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["16", "64"]
    assert "25.00" in shown[2]  # 200 / sqrt(64)


@pytest.mark.parametrize("name", ["figure.xyz", "none/figure.svg"])
def test_the_script_refuses_a_figure_before_it_measures(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(theory, "measure_peaks", None)  # would fail if anything was measured
    with pytest.raises(SystemExit, match="2"):
        theory.main(["--output", str(tmp_path / name)])
    assert name.split("/")[-1] in capsys.readouterr().err
