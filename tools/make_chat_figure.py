"""Draws docs/figures/chat.png and chat-400.png: the server's page in a browser, on a wide and on a narrow screen."""

from __future__ import annotations

import argparse
import socket
import threading
import time
from pathlib import Path

import uvicorn

from paley.pipeline.opening import open_text_model
from paley.serve import create_app

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
SIZES = {"chat": (1000, 420), "chat-400": (400, 600)}


def draw(url: str, browser: str, question: str, temperature: float) -> None:
    """Asks the same question on either screen."""
    from playwright.sync_api import sync_playwright  # of paley[dev]

    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            page = opened.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            page.goto(url)
            page.get_by_text("Settings").click()
            page.get_by_label("Temperature").fill(str(temperature))
            page.get_by_text("Settings").click()
            page.get_by_label("Your message").fill(question)
            page.keyboard.press("Enter")
            page.get_by_text("tokens, the first after").wait_for(timeout=300_000)
            print(name, page.locator(".assistant span").inner_text(), page.locator("#status").inner_text(), sep="\n")
            page.screenshot(path=FIGURES / f"{name}.png")
        opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a quantized chat model")
    parser.add_argument("--question", default="Explain in one sentence what a hash table is.")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    app = create_app({args.folder.name: open_text_model(args.folder)})
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            draw(f"http://127.0.0.1:{sock.getsockname()[1]}", args.browser, args.question, args.temperature)
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
