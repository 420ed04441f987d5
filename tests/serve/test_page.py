"""The page to chat on, in a real browser."""

from __future__ import annotations

import pytest

from browser import chromium


@pytest.fixture
def page():
    with chromium() as page:
        yield page


def say(page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def test_a_conversation(page, serve):
    server = serve("Grüße <b & 世界")
    page.goto(server.url)
    assert page.locator("#model").input_value() == "scripted"
    assert page.locator("#model option[value=base]").is_disabled()
    say(page, "first <i & question")
    page.locator(".assistant span", has_text="世界").wait_for()
    assert page.locator(".assistant span").inner_text() == "Grüße <b & 世界"  # as text, not as markup
    page.get_by_text("tokens, the first after").wait_for()
    say(page, "second")
    page.locator(".assistant span", has_text="世界").nth(1).wait_for()
    page.get_by_text("prompt tokens were cached").wait_for()
    assert page.locator(".message").count() == 4
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0


def test_stop_keeps_what_came(page, serve):
    server = serve(lambda ids: 38, seconds=0.01)
    page.goto(server.url)
    say(page, "go on")
    page.locator(".assistant span", has_text="CCCCC").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()
    page.locator("#send:enabled").wait_for()
    assert page.locator(".message").count() == 2
    for _ in range(500):
        if server.scheduler.load == (0, 0):
            break
        page.wait_for_timeout(10)
    assert server.scheduler.load == (0, 0)


def test_a_new_chat_while_an_answer_comes(page, serve):
    server = serve(lambda ids: 38, seconds=0.05)
    page.goto(server.url)
    for text, seen in (("before it begins", ""), ("as it goes on", "CCC")):
        say(page, text)
        if seen:
            page.locator(".assistant span", has_text=seen).wait_for()
        page.get_by_role("button", name="New chat").click()
        page.locator("#send:enabled").wait_for()
        assert page.locator(".message").count() == 0
        assert page.evaluate("[messages.length, running, $('status').textContent]") == [0, None, ""]


def test_settings_reach_the_model_and_errors_are_shown(page, serve):
    server = serve("yes", limit=100)
    page.goto(server.url)
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("be brief")
    page.get_by_label("Most tokens").fill("2")
    say(page, "so")
    page.get_by_text("2 tokens, the first after").wait_for()
    assert page.locator(".assistant span").inner_text() == "ye"
    assert len(server.decoder.reads[0][0]) == len("system:be brief|user:so|a>")


def test_without_the_key_nothing_is_told(serve):
    server = serve("yes", api_key="right")
    with chromium(expected="401") as page:  # which the browser notes as an error
        page.goto(server.url)
        page.get_by_text("wants an API key").wait_for()
        page.get_by_label("API key").fill("right")
        page.keyboard.press("Tab")
        page.locator("#model option", has_text="scripted").wait_for(state="attached")
        say(page, "so")
        page.locator(".assistant span", has_text="yes").wait_for()


def test_a_narrow_dark_screen_has_room_for_all(serve):
    with chromium(width=400, height=700, dark=True) as page:
        page.goto(serve("yes").url)
        say(page, "a long word: " + "x" * 600)
        page.locator(".assistant span", has_text="yes").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.get_by_text("tokens, the first after").wait_for()
        page.locator("#send:enabled").wait_for()
        bottoms = "['.assistant', '#log'].map((name) => document.querySelector(name).getBoundingClientRect().bottom)"
        answer, log = page.evaluate(bottoms)
        assert answer <= log + 1  # the status has two lines now, and does not hide it
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
