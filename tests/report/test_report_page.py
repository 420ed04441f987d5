"""The page of a report in a real browser: what it draws, at which width, and what a screen reader hears."""

from __future__ import annotations

import json

from browser import chromium
from command_line import paley_
from paley.report import Report, gather
from paley.report.making import Making
from paley.report.page import render


def check_tables(page, shown: int, report: Report) -> None:
    """Opens each figure of a page's report number `shown`, and compares its whole table with the embedded data."""
    data = json.loads(page.locator("#data").text_content())[shown]
    assert data["name"] == report.name
    assert data["figures"].keys() == {f.id for f in report.figures}
    for name, held in data["figures"].items():
        section = page.locator(f"#{name}-{shown}")
        if "missing" in held:
            assert section.locator(".missing").inner_text() == "Not here: " + held["missing"].replace("`", "")
            continue
        section.locator("summary").click()
        assert section.locator("tbody").is_visible()
        assert section.locator("thead th").all_inner_texts() == held["header"]
        cells = section.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        )
        assert cells == [[str(value) for value in row] for row in held["rows"]]
        assert cells == [[str(value) for value in row] for row in report.figure(name).rows]
        assert all(svg.get_attribute("aria-label") for svg in section.locator("svg").all())


def test_the_page_in_a_browser_draws_each_figures_data(made, page_file):
    with chromium() as page:
        page.goto(page_file.as_uri())
        check_tables(page, 0, made.report)
        rows = {f.id: len(f.rows) for f in made.report.figures}
        marks = {name: page.locator(f"#{name}-0 .mark").count() for name in rows}
        own = sum(row[2] != "" for row in made.report.figure("error").rows)
        layers = sum("layers" in row[0] for row in made.report.figure("error").rows)
        assert marks == {
            "size": 0, "bits": 0, "error": layers + own, "positions": rows["positions"], "losses": rows["losses"],
            "outliers": 2 * rows["outliers"], "search": rows["search"], "clips": rows["clips"],
            "sensitivity": rows["sensitivity"], "budget": rows["budget"], "speed": 0,
        }  # fmt: skip
        assert page.locator("#search-0 .line").count() == 1
        assert page.locator("#size-0 rect").count() == rows["size"] + 2
        assert page.locator("#bits-0 rect").count() == sum("layers" in r[0] for r in made.report.figure("bits").rows)
        assert page.locator("#speed-0 rect").count() == 2 * rows["speed"] == 4
        worst = page.locator("#worst-0 tbody tr").all_inner_texts()
        assert [text.split("\t")[:3] for text in worst] == [
            [f"{w.kl:.2f}", f"{w.original:.3f}", f"{w.here:.3f}"] for w in made.report.measured.worst
        ]
        assert page.locator("#worst-0 tbody mark").count() == len(worst)
        assert page.locator("#made-0 pre").first.inner_text() == made.report.made.command
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0


def test_two_folders_on_one_page_in_a_browser(made, unscored, tmp_path):
    paley_("compare", made.out, unscored, "--output", tmp_path / "both.html")
    with chromium(width=1400) as page:
        page.goto((tmp_path / "both.html").as_uri())
        for shown, folder in enumerate((made.out, unscored)):
            check_tables(page, shown, gather(folder))
        left, right = (page.locator(f"#size-{shown}").bounding_box() for shown in (0, 1))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        check_accessible(page)
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def check_accessible(page) -> None:
    """What Chromium tells a screen reader: names of all pictures, tables and controls, and headings in order."""
    session = page.context.new_cdp_session(page)
    nodes = [n for n in session.send("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    told = [(n["role"]["value"], n.get("name", {}).get("value", ""), n) for n in nodes]
    focusable = [
        (role, name) for role, name, n in told
        if role != "RootWebArea" and any(p["name"] == "focusable" and p["value"]["value"] for p in n["properties"])
    ]  # fmt: skip
    places = [(role, name) for role, name, _ in told if role in ("table", "region", "navigation")]
    pictures = [(role, name) for role, name, _ in told if role == "image"]
    assert [role for role, name in (*focusable, *places, *pictures) if not name.strip()] == []
    assert len(places) == len(set(places))
    headings = [next(p["value"]["value"] for p in n["properties"] if p["name"] == "level")
                for role, _, n in told if role == "heading"]  # fmt: skip
    assert headings == [1] + [2] * (len(headings) - 1)
    assert {role for role, *_ in told} >= {"main", "navigation", "image", "table", "columnheader", "rowheader"}
    for section in page.locator("section:has(svg)").all():
        title = section.locator("h2").inner_text()
        names = [(role, name) for role, name, _ in told if title in name]
        assert ("region", title) in names
        assert ("table", f"{title}, data") in names
        assert section.locator("summary").get_attribute("aria-label").endswith(title)


def test_the_page_for_a_screen_reader(page_file):
    with chromium() as page:
        page.goto(page_file.as_uri())
        for summary in page.locator("summary").all():
            summary.click()
        check_accessible(page)


def test_the_page_is_readable_at_400_pixels_in_the_dark_and_by_keyboard(page_file):
    with chromium(width=400, dark=True) as page:
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.locator("#bits-0 text").first.bounding_box()["height"] >= 12
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(230, 232, 234)"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#size-0"
        summary = page.locator("#size-0 summary")
        summary.focus()
        page.keyboard.press("Enter")
        assert page.locator("#size-0 tbody tr").first.is_visible()


def test_no_label_leaves_its_picture_or_touches_another(page_file):
    with chromium() as page:
        page.goto(page_file.as_uri())
        outside, touching = page.evaluate(
            """() => {
                const outside = [], touching = [];
                for (const svg of document.querySelectorAll("svg")) {
                    const frame = svg.getBoundingClientRect();
                    const all = [...svg.querySelectorAll("text")];
                    const texts = all.map(t => [t.textContent, t.getBoundingClientRect()]);
                    texts.forEach(([text, box], i) => {
                        if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
                            outside.push(text);
                        for (const [other, at] of texts.slice(i + 1))
                            if (box.left < at.right && at.left < box.right
                                && box.top < at.bottom - 4 && at.top < box.bottom - 4)
                                touching.push([text, other]);
                    });
                }
                return [outside, touching];
            }"""
        )
        assert outside == []
        assert touching == []


def test_text_of_a_model_is_no_markup(made, page_file):
    text = page_file.read_text()
    assert "<number" not in text
    assert text.count("</script>") == 1
    hostile = Report("<!--<script>", (), "", (), None, Making())
    embedded = render([hostile]).split('id="data">')[1].split("</script>")[0]
    assert "<" not in embedded
    assert json.loads(embedded)[0]["name"] == "<!--<script>"
