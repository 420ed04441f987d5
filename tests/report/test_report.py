"""The report: its figures' data against the folder's, its page in a real browser, and what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import pytest

import paley
from browser import chromium
from command_line import paley_
from paley.eval.reference import Reference
from paley.model.folders import load_tokenizer
from paley.recipe import apply_settings
from paley.report import Report, gather, write_page
from paley.report.charts import bars, dots, heat_map
from paley.report.figures import slopes
from paley.report.page import render
from tiny_models import save_tiny

SIZES = [f"{part}.{key}" for part in ("calibration", "search", "test") for key in ("sequences=2", "seq_len=48")]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> SimpleNamespace:
    """A model whose clip ratios were searched, its slopes, and the report of both."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} is a <number> & {n * n} is its square." for n in range(900)))
    model = save_tiny(folder / "model", tiny_tokenizer)
    search = ["search.method=gbs", "search.iterations=2", "weights.group_size=null", f"calibration.source={text}"]
    paley.quantize(model, apply_settings(paley.preset("rtn-w4a4kv4"), [*search, *SIZES]), output=folder / "out")
    alpha = folder / "alpha.json"
    slopes = paley.measure_sensitivity(model, source=str(text), sequences=2, seq_len=32)
    alpha.write_text(json.dumps(slopes.model_dump(mode="json")))
    report = gather(folder / "out", model)
    return SimpleNamespace(folder=folder, model=model, out=folder / "out", alpha=alpha, report=report)


def figure(report, name: str):
    return next(figure for figure in report.figures if figure.id == name)


def test_figures_hold_what_the_folder_says(made):
    report, inspection = made.report, paley.inspect(made.out)
    plan = paley.Plan.load(made.out / "plan.json")
    assert [f.id for f in report.figures if f.missing] == ["sensitivity", "budget"]
    size = figure(report, "size")
    assert sum(row[1] for row in size.rows) == inspection.bytes
    assert {row[0]: float(row[1]) for row in figure(report, "error").rows} == pytest.approx(
        {n: linear.rel_error for n, linear in inspection.linears.items() if linear.rel_error is not None}, rel=1e-4
    )
    assert [row[1:] for row in figure(report, "search").rows] == [
        (t.slot, f"{t.clip_ratio:.4f}", f"{t.objective:.5g}") for t in plan.trace
    ]
    bits = {(row[0], row[1]): row[2] for row in figure(report, "bits").rows}
    assert bits["model.layers.1.self_attn", "keys"] == 4
    assert bits["model.layers.0.mlp.down_proj", "down_proj"] == 4
    assert dict(report.facts)["bytes, all tensors"] == f"{inspection.bytes:,}"


def test_slopes_are_shown_against_bits(made):
    sensitivity = paley.Sensitivity.load(made.alpha)
    first, second = slopes(paley.inspect(made.out), sensitivity, [(2.0, 0.5), (4.0, 0.03)])
    alphas = sensitivity.alphas()
    assert {row[0]: float(row[1]) for row in first.rows} == pytest.approx(alphas, rel=1e-4)
    assert first.svg.count("<circle") == 16
    assert second.rows == (("2.000", "0.5"), ("4.000", "0.03"))
    (alone,) = (f for f in gather(made.out, sensitivity=made.alpha).figures if f.id == "sensitivity")
    assert alone.rows == first.rows


def test_what_is_measured_agrees_with_the_score(made):
    score = paley.score(made.out, made.model, sequences=4)
    assert float(made.report.measured.kl.mean()) == pytest.approx(score.kl, rel=1e-3)
    worst = made.report.measured.worst
    assert worst[0].kl == pytest.approx(float(made.report.measured.kl.max()))
    assert [w.kl for w in worst] == sorted((w.kl for w in worst), reverse=True)
    assert made.report.measured.concentration()[-1] == (1.0, pytest.approx(1.0))
    assert len(made.report.measured.peaks) == 14


@pytest.fixture(scope="module")
def page_file(made) -> Path:
    file = made.folder / "page.html"
    write_page([made.report], file)
    return file


def test_the_page_in_a_browser_draws_each_figures_data(made, page_file):
    with chromium() as page:
        page.goto(page_file.as_uri())
        (data,) = json.loads(page.locator("#data").text_content())
        assert data["name"] == "out"
        for name, held in data["figures"].items():
            if "missing" in held:
                continue
            section = page.locator(f"#{name}-0")
            assert section.locator("h2").inner_text()
            section.locator("summary").click()
            assert section.locator("tbody tr").count() == len(held["rows"])
            first = [cell.inner_text() for cell in section.locator("tbody tr").first.locator("td").all()]
            assert first == [str(value) for value in held["rows"][0]]
            assert section.locator("svg").get_attribute("aria-label")
        rows = data["figures"]["search"]["rows"]
        assert page.locator("#search-0 circle").count() == 2 * len(rows)
        assert page.locator("#size-0 rect").count() == len(data["figures"]["size"]["rows"]) + 2
        assert page.locator("#clips-0 circle").count() == len(data["figures"]["clips"]["rows"])
        assert page.locator("#worst-0 tbody mark").count() == len(made.report.measured.worst)
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0


def test_the_page_is_readable_at_400_pixels_in_the_dark_and_by_keyboard(page_file):
    with chromium(width=400, dark=True) as page:
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(230, 232, 234)"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#size-0"
        summary = page.locator("#size-0 summary")
        summary.focus()
        page.keyboard.press("Enter")
        assert page.locator("#size-0 tbody tr").first.is_visible()


def test_text_of_a_model_is_no_markup(made, page_file):
    text = page_file.read_text()
    assert "<number>" not in text
    assert "&lt;number&gt;" in text or "\\u003cnumber" in text or "&lt;" in text
    assert text.count("</script>") == 1
    hostile = Report("<!--<script>", (), "", (), None, "", "")
    embedded = render([hostile]).split('id="data">')[1].split("</script>")[0]
    assert "<" not in embedded
    assert json.loads(embedded)[0]["name"] == "<!--<script>"


@pytest.fixture(scope="module")
def unscored(made) -> Path:
    paley.quantize(
        made.model, apply_settings(paley.preset("rtn-w4a16"), ["test=null"]), output=made.folder / "unscored"
    )
    return made.folder / "unscored"


def test_what_is_missing_is_told_with_the_command(unscored):
    shown = paley_("report", unscored).out
    page = unscored.with_name("unscored-report.html")
    assert f"written to {page}" in shown
    assert "not in it: KL divergence by token position; `paley report … --against ORIGINAL`" in shown
    assert "not in it: Sensitivity against bits; `paley sensitivity ORIGINAL --output alpha.json`" in shown
    text = page.read_text()
    assert "This model was never scored; <code>paley eval unscored --against ORIGINAL</code>" in text
    paley_("report", unscored)  # replaces its own page
    page.write_text("mine")
    assert "is no report; name another file with --output" in paley_("report", unscored, code=2).err


def test_compare(made, unscored, tmp_path):
    args = ["compare", made.out, unscored]
    shown = paley_(*args, "--output", tmp_path / "both.html").out
    assert "bits a weight" in shown
    assert str(unscored) in shown
    found = json.loads(paley_(*args, "--json").out)
    assert (found["a"]["name"], found["b"]["name"]) == ("out", "unscored")
    text = (tmp_path / "both.html").read_text()
    assert "Where the bytes are: out" in text
    assert 'id="size-1"' in text


def test_compare_measures_the_original_once_and_opens_the_page(made, tmp_path, monkeypatch):
    measured, opened = [], []
    of = Reference.of
    monkeypatch.setattr(Reference, "of", lambda model, blocks: (measured.append(1), of(model, blocks))[1])
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = tmp_path / "both.html"
    args = ["compare", made.out, made.out, "--against", made.model]
    found = json.loads(paley_(*args, "--output", page, "--open", "--json").out)
    assert len(measured) == 1
    assert opened == [page.as_uri()]
    rows = figure(made.report, "positions").rows
    assert found["a"]["figures"]["positions"]["rows"] == found["b"]["figures"]["positions"]["rows"]
    assert len(found["b"]["figures"]["positions"]["rows"]) == len(rows)
    assert "name a page with --output, or give --json" in paley_(*args, code=2).err
    assert len(measured) == 1


def test_bad_input(made, tmp_path):
    assert "is no Paley checkpoint" in paley_("report", made.model, code=2).err
    assert "give --against as well" in paley_("report", made.out, "--data", "x", code=2).err
    assert "is a folder" in paley_("report", made.out, "--output", tmp_path, code=2).err
    assert "name one with --output" in paley_("compare", made.out, made.out, "--open", code=2).err
    other = save_tiny(tmp_path / "other", load_tokenizer(made.model), intermediate_size=40)
    assert "was made from a model with fingerprint" in paley_("report", made.out, "--against", other, code=2).err


def test_charts_take_odd_data():
    assert "nothing to show" in dots({"a": []}, "t", x_name="x", y_name="y")
    assert "nothing to show" in dots({"a": [(1, 0.0, "zero")]}, "t", x_name="x", y_name="y", log=True)
    assert dots({"a": [(1, 5.0, "<one>")]}, "t", x_name="x", y_name="y").count("&lt;one&gt;") == 1
    assert "<rect" in bars([("a", 0, 0, "0")], "t")
    assert heat_map(["0"], {"a": [None], "b": [4.0]}, "t").count("<rect") == 1


def test_a_page_without_an_original_takes_no_seconds_of_imports(made, tmp_path):
    """Nor do the other verbs that read a folder's files alone."""
    runs = [
        ["report", str(made.out), "--output", str(tmp_path / "page.html")], ["inspect", str(made.out)],
        ["verify", str(made.out)], ["compare", str(made.out), str(made.out)],
    ]  # fmt: skip
    code = f"""if True:
        import sys
        from paley_command import main
        for args in {runs!r}:
            sys.argv[1:] = args
            try:
                main()
            except SystemExit as end:
                assert not end.code
        print("LOADED", "paley.kernels" in sys.modules, "transformers" in sys.modules)"""
    source = str(Path(paley.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": source},
    )  # fmt: skip
    assert done.stdout.endswith("LOADED True False\n")
