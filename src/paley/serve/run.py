"""Serves an application on a socket until SIGTERM or Ctrl-C, and then stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from paley.core.errors import PaleyError, Setting

__all__ = ["listen", "run"]

_PATIENCE = 10  # seconds for answers that are being written when the server is told to stop


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address; port 0: any free one. PaleyError if it cannot be had."""
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        if made is not None:
            made.close()
        where, number = f"{host}:{port}", error.errno
        if number == errno.EADDRINUSE:
            raise PaleyError(f"{where}: the port is in use", remedy=("choose another with ", Setting("port"))) from None
        if number == errno.EACCES:
            raise PaleyError(
                f"{where}: ports below 1024 need root", remedy=("choose another with ", Setting("port"))
            ) from None
        raise PaleyError(
            f"{where}: cannot listen there ({error})", remedy=("try ", Setting("host", "127.0.0.1"))
        ) from None
    return made


class _Server(uvicorn.Server):
    """uvicorn's, but a signal that stopped it is not raised again, so that the process ends with 0."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], cut: Callable[[], None], patience: float):
        super().__init__(config)
        self._ready, self._cut, self._patience = ready, cut, patience

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers have some seconds to end; then the decoders stop, which ends each with an error that clients read."""
        late = asyncio.ensure_future(self._cut_late())
        await super().shutdown(sockets)
        late.cancel()

    async def _cut_late(self) -> None:
        await asyncio.sleep(self._patience)
        await asyncio.to_thread(self._cut)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(app: Any, sock: socket.socket, ready: Callable[[], None] = lambda: None, patience: float = _PATIENCE) -> None:
    """Serves what `create_app` made until a signal; ready is called when requests are taken.

    patience: seconds that answers in progress have to end, after the signal.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=round(patience) + 5, lifespan="on",
        ws="none", server_header=False,
    )  # fmt: skip

    def cut() -> None:
        for scheduler in app.state.schedulers.values():
            scheduler.stop()

    asyncio.run(_Server(config, ready, cut, patience).serve([sock]))
