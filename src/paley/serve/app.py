"""The application: its routes, who may use them, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from paley.core.errors import PaleyError, nearest_name
from paley.pipeline.conversation import chat_ids
from paley.pipeline.generate import prompt_ids
from paley.pipeline.opening import TextModel
from paley.serve.answering import Answering, check_choices, check_prompt
from paley.serve.grammar import Grammar, Grammars
from paley.serve.guard import Guard
from paley.serve.metrics import Metrics
from paley.serve.page import PAGE, POLICY
from paley.serve.protocol import ApiError, ChatRequest, Common, CompletionRequest
from paley.serve.scheduler import Scheduler
from paley.serve.shapes import ChatShape, CompletionShape, Shape

__all__ = ["Limits", "create_app"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """slots: answers at once, of each model; queue: more that wait; context: tokens of prompt and answer; body: bytes.

    hosts: what the Host header may name; None: anything.
    """

    slots: int = 8
    queue: int = 32
    context: int | None = None
    body: int = 1 << 20
    hosts: frozenset[str] | None = None


def create_app(models: Mapping[str, TextModel], *, api_key: str | None = None, limits: Limits | None = None) -> FastAPI:
    """models: what `open_text_model` gave, by the names that clients use. Their threads run while it is served."""
    limits = limits or Limits()
    schedulers = {
        name: Scheduler(model, slots=limits.slots, waiting=limits.queue) for name, model in models.items()
    }  # fmt: skip
    grammars = {name: Grammars(model) for name, model in models.items()}
    metrics, began = Metrics(schedulers), int(time.time())
    seeds = random.SystemRandom()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for scheduler in schedulers.values():
            scheduler.start()
        yield
        for scheduler in schedulers.values():
            await asyncio.to_thread(scheduler.stop)

    app = FastAPI(title="Paley", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.schedulers = schedulers
    _add_errors(app)
    app.add_middleware(cast(Any, Guard), api_key=api_key, body=limits.body, hosts=limits.hosts, count=metrics.requests)

    def scheduler_of(name: str) -> Scheduler:
        if name not in schedulers:
            raise ApiError(
                404, f"there is no model {name!r} here{nearest_name(name, schedulers) or '; models are '}"
                + ("" if nearest_name(name, schedulers) else ", ".join(schedulers)),
                param="model", code="model_not_found",
            )  # fmt: skip
        return schedulers[name]

    async def answer(
        request: Request, body: Common, shape: Shape, prompts: list[list[int]], most: int | None, chances: int | None,
        grammar: Grammar | None = None,
    ) -> Any:  # fmt: skip
        scheduler = schedulers[body.model]
        lengths = [check_prompt(scheduler, ids, most, limits.context) for ids in prompts]
        answering = Answering(
            scheduler, body, shape, prompts, lengths, chances, seeds.getrandbits(62),
            lambda job: metrics.count(body.model, job), grammar,
        )  # fmt: skip
        answering.submit()
        if body.stream:
            return StreamingResponse(
                answering.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        made = await answering.whole(request)
        return Response(status_code=499) if made is None else JSONResponse(made)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Any:
        scheduler = scheduler_of(body.model)
        model = scheduler.model
        check_choices(scheduler, 1, body.n or 1)
        messages = [message.plain() for message in body.messages]
        try:
            ids = await asyncio.to_thread(chat_ids, model.tokenizer, messages)
        except PaleyError as error:
            raise ApiError(400, str(error), param="messages") from None
        grammar = None
        if body.response_format is not None and (schema := body.response_format.schema_wanted) is not None:
            try:
                grammar = await asyncio.to_thread(grammars[body.model].of, schema)
            except PaleyError as error:
                raise ApiError(400, str(error), param="response_format") from None
        shape = ChatShape(body.model, body.chances)
        return await answer(request, body, shape, [ids], body.most, body.chances, grammar)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Any:
        scheduler = scheduler_of(body.model)
        model = scheduler.model
        check_choices(scheduler, len(body.prompts), body.n or 1)
        try:
            prompts = [
                await asyncio.to_thread(prompt_ids, model.tokenizer, prompt) if isinstance(prompt, str) else prompt
                for prompt in body.prompts
            ]
        except PaleyError as error:
            raise ApiError(400, str(error), param="prompt") from None
        shape = CompletionShape(body.model, body.chances)
        return await answer(request, body, shape, prompts, body.most, body.chances)

    def entry(name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": began, "owned_by": "paley",
            "context_length": min(filter(None, (limits.context, models[name].decoder.limit)), default=None),
            "chat": models[name].tokenizer.chat_template is not None,
        }  # fmt: skip

    @app.get("/v1/models")
    async def list_models() -> Any:
        return {"object": "list", "data": [entry(name) for name in models]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Any:
        scheduler_of(name)
        return entry(name)

    @app.get("/health")
    async def health() -> Any:
        alive = all(scheduler.alive for scheduler in schedulers.values())
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Any:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Any:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body" and not _is_type(part))
        if first["type"] == "json_invalid":
            message, place = f"the body is not valid JSON ({first.get('ctx', {}).get('error', '')})", ""
        elif first["type"] == "extra_forbidden":
            message = f"{place}: is not supported by this server"
        elif first["type"] == "model_attributes_type" and not place:
            message = "the body must be a JSON object, sent as Content-Type: application/json"
        else:
            message = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
        return JSONResponse(ApiError(400, message, param=place or None).body, 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse(
            ApiError(error.status_code, str(error.detail)).body, error.status_code, headers=error.headers
        )


def _is_type(part: object) -> bool:
    """Whether a part of pydantic's place is a member of a union, not a key."""
    return isinstance(part, str) and (part in {"str", "int"} or "[" in part)
