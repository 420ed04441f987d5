"""What a request must pass before a route sees it: the key, the host, the size of its body."""

from __future__ import annotations

import hmac
import logging
from typing import Any

from starlette.responses import JSONResponse

from paley.serve.protocol import ApiError

__all__ = ["Guard"]

_LOG = logging.getLogger(__name__)
_OPEN = {"/", "/health"}  # without a key
_PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}


class Guard:
    """An ASGI middleware.

    hosts: names that the Host header may have. On loopback these are loopback's own, so that no page on the web can
    reach the server through a name that it owns (DNS rebinding). count: a counter of (path, status).
    """

    def __init__(self, app: Any, *, api_key: str | None, body: int, hosts: frozenset[str] | None, count: Any):
        self._app, self._key, self._body, self._hosts, self._count = app, api_key, body, hosts, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"
        refused: list[ApiError] = []
        started = False

        async def counted(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count.labels(path, str(message["status"])).inc()
            await send(message)

        async def unless_refused(message: Any) -> None:
            if not refused:  # else it is what the application makes of a body that was cut off
                await counted(message)

        try:
            self._check(scope["path"], dict(scope["headers"]))
            await self._app(scope, self._limited(receive, refused), unless_refused)
        except ApiError as error:
            refused.append(error)
        except Exception as error:  # a bug
            if started:
                raise
            if not refused:
                _LOG.exception("a request to %s failed", path)
                message = f"the server failed ({type(error).__name__}); its log has more"
                refused.append(ApiError(500, message, kind="server_error"))
        if refused:
            error = refused[0]
            await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, counted)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name.strip("[]") not in self._hosts:
            raise ApiError(403, f"this server does not answer to the name {name!r}")
        if self._key is not None and path not in _OPEN:
            given = headers.get(b"authorization", b"")
            wanted = f"Bearer {self._key}".encode()
            if not hmac.compare_digest(given, wanted):
                raise ApiError(
                    401, "wrong API key" if given else "this server wants an API key: Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._body:
            raise self._too_large()

    def _limited(self, receive: Any, refused: list[ApiError]) -> Any:
        seen = 0

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:
                refused.append(self._too_large())
                raise refused[0]
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body of a request may have {self._body:,} bytes")
