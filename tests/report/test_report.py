"""The report: its figures' data against the folder's, what is missing, and the verbs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest
import torch
import transformers

import paley
from command_line import paley_
from paley.eval.reference import Reference
from paley.model.folders import load_tokenizer
from paley.report import gather
from paley.report.charts import Bar, bars, dots, heat_map
from paley.report.making import Making
from paley.report.page import render
from tiny_models import save_tiny


def test_figures_hold_what_the_folder_says(made):
    report, inspection = made.report, paley.inspect(made.out)
    plan = paley.Plan.load(made.out / "plan.json")
    assert [f.id for f in report.figures if f.missing] == []
    size = report.figure("size")
    assert sum(row[1] for row in size.rows) == inspection.bytes
    assert {row[0]: float(row[1]) for row in report.figure("error").rows} == pytest.approx(
        {n: linear.rel_error for n, linear in inspection.linears.items() if linear.rel_error is not None}, rel=1e-4
    )
    assert [row[1:] for row in report.figure("search").rows] == [
        (t.slot, f"{t.clip_ratio:.4f}", f"{t.objective:.5g}") for t in plan.trace
    ]
    bits = {(row[0], row[1]): row[2] for row in report.figure("bits").rows}
    assert bits["model.layers.1.self_attn", "keys"] == 4
    assert bits["model.layers.0.mlp.down_proj", "down_proj"] == 4
    assert dict(report.facts)["bytes, all tensors"] == f"{inspection.bytes:,}"


def test_slopes_are_shown_against_bits_and_the_budgets_curve_falls(made):
    first, second = made.report.figure("sensitivity"), made.report.figure("budget")
    alphas = paley.Sensitivity.load(made.alpha).alphas()
    assert {row[0]: float(row[1]) for row in first.rows} == pytest.approx(alphas, rel=1e-4)
    assert first.svg.count('class="mark') == 16
    points = [(float(bits), float(loss)) for bits, loss in second.rows]
    assert len(points) == second.svg.count('class="mark') == 7
    assert points == sorted(points)
    assert [loss for _, loss in points] == sorted((loss for _, loss in points), reverse=True)
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


def test_what_is_missing_is_told_with_the_command(unscored):
    shown = paley_("report", unscored).out
    page = unscored.with_name("unscored-report.html")
    assert f"written to {page}" in shown
    assert "not in it: KL divergence by token position; `paley report … --against ORIGINAL`" in shown
    assert "not in it: Sensitivity against bits; `paley sensitivity ORIGINAL --output alpha.json`" in shown
    commands = "`paley bench unscored --json > speed.json`, then `paley report unscored --speed speed.json`"
    assert f"not in it: Speed; {commands}" in shown
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
    rows = made.report.figure("positions").rows
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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda data: data.pop("speed"),
            "speed: is required and missing; `paley bench out --json > speed.json` writes it",
        ),
        (lambda data: data["speed"].update(decode=0), "speed.decode: should be greater than or equal to 0.001"),
        (lambda data: data.update(threads=-3), "threads: should be greater than or equal to 1"),
        (lambda data: data.update(share=-7.0), "share: should be greater than 0"),
        (lambda data: data["rivals"].update({"this model": data["speed"]}), "rivals: none is called 'this model'"),
        (lambda data: data["rivals"].update(bf16={}), "rivals.bf16.prefill: is required and missing"),
        (lambda data: data.update(folder="/x/other"), "has the speed of other, this folder is out; `paley bench out"),
    ],
)
def test_a_file_that_holds_no_speed_of_this_folder_is_refused(made, tmp_path, change, complaint):
    data = json.loads(made.speed.read_text())
    change(data)
    (tmp_path / "speed.json").write_text(json.dumps(data))
    assert complaint in paley_("report", made.out, "--speed", tmp_path / "speed.json", code=2).err


def test_a_link_to_a_folder_has_two_names(made, tmp_path):
    (tmp_path / "latest").symlink_to(made.out)
    data = json.loads(made.speed.read_text())
    for name in ("latest", "out"):
        (tmp_path / "speed.json").write_text(json.dumps(data | {"folder": name}))
        found = gather(tmp_path / "latest", speed=tmp_path / "speed.json").figure("speed")
        assert not found.missing


def test_the_speed_is_what_bench_measured(made):
    data, shown = json.loads(made.speed.read_text()), made.report.figure("speed")
    assert shown.rows == tuple(
        (who, f"{at['prefill']:.1f}", f"{at['decode']:.1f}")
        for who, at in (("this model", data["speed"]), ("bf16", data["rivals"]["bf16"]))
    )
    assert "on the native engine with one thread" in shown.words
    assert "no such file of speeds" in paley_("report", made.out, "--speed", "nowhere.json", code=2).err


def test_the_command_of_the_page_makes_the_same_bytes(made, tmp_path):
    told = made.report.made
    assert told.versions == {
        "Paley": paley.__version__, "PyTorch": torch.__version__, "transformers": transformers.__version__
    }  # fmt: skip
    places = {"ORIGINAL": str(made.model), "NEW": str(tmp_path / "new"), "out/plan.json": str(made.out / "plan.json")}
    verb, *words = shlex.split(told.command)
    assert verb == "paley"
    paley_(*(places.get(word, word) for word in words))
    for file in made.out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "new" / file.name).read_bytes()


def test_what_an_older_folder_does_not_say_is_missing(unscored, tmp_path):
    folder = tmp_path / "unscored"
    shutil.copytree(unscored, folder)
    results = json.loads((folder / "results.json").read_text())
    del results["made_with"]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "plan.json").unlink()
    report = gather(folder)
    assert report.made == Making()
    text = render([report])
    assert "results.json names no versions" in text
    assert "plan.json is not in this folder" in text
    (folder / "results.json").unlink()
    assert gather(folder).made == Making()


def test_report_opens_its_page(made, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = tmp_path / "page.html"
    paley_("report", made.out, "--output", page)
    assert opened == []
    paley_("report", made.out, "--output", page, "--open")
    assert opened == [page.as_uri()]


def test_the_help_of_report_does_not_promise_to_measure(made):
    assert "measured now" not in paley_("report", "--help").out
    assert [f.id for f in gather(made.out).figures if f.missing][-3:] == ["sensitivity", "budget", "speed"]


def test_charts_take_odd_data():
    assert "nothing to show" in dots({"a": []}, "t", x_name="x", y_name="y")
    assert "nothing to show" in dots({"a": [(1, 0.0, "zero")]}, "t", x_name="x", y_name="y", log=True)
    assert "embed_tokens, unquantized" in bars([Bar("embed_tokens, unquantized", 0, 1, "1")], "t")
    long = bars([Bar("a" * 50, 0, 1, "1")], "t")
    assert f"<title>{'a' * 50}</title>{'a' * 33}…<" in long
    assert dots({"a": [(1, 5.0, "<one>")]}, "t", x_name="x", y_name="y").count("&lt;one&gt;") == 1
    assert "<rect" in bars([Bar("a", 0, 0, "0")], "t")
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
