"""Applications, most of them on a scripted model, served from a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import uvicorn

from paley.serve import Limits, create_app
from paley.serve.run import listen
from scripted_decoder import chatting, scripted_model


@contextlib.contextmanager
def served(app, *, host: str = "127.0.0.1") -> Iterator[str]:
    """-> the address of the application."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", ws="none"))
    with listen(host, 0) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield f"http://{host}:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def serve_app() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`served`, for applications of a test's own."""
    return served


@pytest.fixture
def serve(tiny_tokenizer) -> Iterator[Callable[..., SimpleNamespace]]:
    """Starts a server of the model `scripted`, and of `base` without a template -> its url, decoder and schedulers."""
    with contextlib.ExitStack() as stack:

        def start(
            script="yes", *, api_key: str | None = None, limits: Limits | None = None, **options: object
        ) -> SimpleNamespace:
            model, decoder = scripted_model(chatting(tiny_tokenizer), script, **options)
            base, _ = scripted_model(tiny_tokenizer, "more")
            app = create_app({"scripted": model, "base": base}, api_key=api_key, limits=limits)
            url = stack.enter_context(served(app))
            return SimpleNamespace(url=url, decoder=decoder, scheduler=app.state.schedulers["scripted"])

        yield start
