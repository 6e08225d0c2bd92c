"""The HTTP API: `POST /` as in the original lesson, OpenAI's chat completions, health and metrics."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from ..characters.personas import field_problems
from ..errors import EngineError, HelpersError, OverloadError
from .exchange import Exchange
from .limits import RequestLimits, error_body
from .metrics import Metrics
from .prompts import chat_prompt, lesson_prompt
from .schemas import ChatRequest, Choice, Completion, ErrorBody, LessonRequest, LessonResponse, Reply, Usage
from .service import Service, UnknownModelError

logger = logging.getLogger("helpers.serving")

ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 503)}
GONE = Response(status_code=499)  # nobody receives it
STARTED = int(time.time())

router = APIRouter()


@router.post("/", response_model=LessonResponse, responses=ERRORS)
async def lesson(body: LessonRequest, request: Request):
    """One reply, as in the original lesson."""
    exchange = await Exchange.begin(request, None, lambda character: lesson_prompt(body), body.generation())
    response = await exchange.whole()
    if response is None:
        return GONE
    history = [*(body.history or []), (body.prompt, response)]
    return LessonResponse(response=response, history=history, time=f"{datetime.now():%Y-%m-%d %H:%M:%S}")


@router.post("/v1/chat/completions", response_model=Completion, responses=ERRORS)
async def chat_completions(body: ChatRequest, request: Request):
    """OpenAI's chat completions, with the persona in `chat_template_kwargs.session_meta` or by name in `model`."""
    exchange = await Exchange.begin(
        request, body.model, lambda character: chat_prompt(body, character), body.generation(), body.stops()
    )
    answer = {"id": f"chatcmpl-{exchange.id}", "created": int(time.time()), "model": _name(body, request)}
    if body.stream:
        first = await exchange.first()
        return GONE if first is None else EventStream(_events(body, exchange, first, answer), exchange)
    text = await exchange.whole()
    if text is None:
        return GONE
    choice = Choice(message=Reply(content=text), finish_reason=exchange.last.finish_reason)
    return Completion(**answer, choices=[choice], usage=_usage(exchange))


class EventStream(StreamingResponse):
    """Server-sent events of a reply, which is cancelled when the client goes away."""

    def __init__(self, events: AsyncIterator[str], exchange: Exchange):
        # Proxies would collect the events otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.exchange = exchange

    async def __call__(self, scope, receive, send) -> None:
        """Send the events, whatever happens close the exchange."""
        try:
            await super().__call__(scope, receive, send)
        except (OSError, ClientDisconnect):
            pass  # nobody reads any more; the server closes the connection
        finally:
            self.exchange.close()


async def _events(body: ChatRequest, exchange: Exchange, piece, answer: dict) -> AsyncIterator[str]:
    """Chunks as OpenAI sends them: the role, pieces of text, the reason for the end, usage if asked for, [DONE]."""

    def chunk(delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event({**answer, "object": "chat.completion.chunk", "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        while True:
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.finish_reason:
                break
            piece = await anext(exchange.pieces)
    except HelpersError as error:
        yield _event(_describe(error)[1])
        return
    yield chunk({}, piece.finish_reason)
    if body.stream_options and body.stream_options.include_usage:
        usage = _usage(exchange).model_dump()
        yield _event({**answer, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(exchange: Exchange) -> Usage:
    prompt, completion = exchange.prompt_tokens, exchange.last.tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _name(body: ChatRequest, request: Request) -> str:
    return body.model or request.app.state.service.name


@router.get("/v1/models", responses={401: {"model": ErrorBody}})
async def models(request: Request) -> dict:
    """What a request may name as `model`."""
    names = request.app.state.service.model_names
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": STARTED, "owned_by": "characterglm"} for name in names],
    }


@router.get("/health", responses={503: {"description": "Loading, or the engine is down."}})
async def health(request: Request) -> JSONResponse:
    """`ready` with 200, `loading` or `dead` with 503."""
    service = request.app.state.service
    body = {"status": service.status, "model": service.name}
    return JSONResponse(body, 200 if service.status == "ready" else 503)


@router.get("/metrics", response_class=Response, responses={401: {"model": ErrorBody}})
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    service = request.app.state.service
    text = request.app.state.metrics.render(service.engines.values(), service.replicas)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def create_app(
    model="auto",
    *,
    adapters: dict | None = None,
    api_key: str | None = None,
    cors_origins: tuple[str, ...] = (),
    log_text: bool = False,
    on_failure: Callable[[], None] = lambda: None,
    make_service: Callable[..., Service] = Service,
    **engine_options,
) -> FastAPI:
    """The API as an ASGI application; it loads the model in the background once it has started.

    Args:
        model: "auto", "nano", "6b" or a directory; or a pair (model, tokenizer) that is loaded already.
        adapters: name to directory of LoRA adapters.
        api_key: if given, the API asks for it as a bearer token; `/health` and the documentation stay open.
        cors_origins: web pages of these origins may use the API; none by default.
        log_text: whether the log also holds what was said.
        on_failure: called if the model cannot be loaded.
        make_service: where the model runs, made from `model`, `adapters` and the engine options.
        engine_options: slots, queue_size, context, cache_tokens; see `Engine`.

    Raises:
        HelpersError: there is no such model. Whether its files are good shows when they are loaded.
    """
    service = make_service(model, adapters, **engine_options)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        loading = asyncio.create_task(_load(service, on_failure))
        try:
            yield
        finally:  # also after a second Ctrl-C: the engine's thread would keep the process alive
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await service.close()

    app = FastAPIOffline(title="CharacterGLM", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service, app.state.metrics, app.state.log_text = service, Metrics(), log_text
    app.include_router(router, dependencies=[Depends(_key_check(api_key))])
    app.add_middleware(RequestLimits)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    for kind, handler in _ERROR_HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.openapi = lambda: _without_422(FastAPI.openapi(app))
    return app


async def _load(service: Service, on_failure: Callable[[], None]) -> None:
    try:
        await service.load()
        logger.info("ready", extra={"model": service.name})
    except Exception:
        logger.exception("cannot load the model")
        on_failure()


def _key_check(api_key: str | None):
    bearer = HTTPBearer(auto_error=False, description="The key the server was started with, if it was.")

    async def check(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if api_key is None or request.url.path == "/health":
            return
        # In constant time: how long it takes says nothing about how much of the key was right.
        if given is None or not hmac.compare_digest(given.credentials.encode(), api_key.encode()):
            raise HTTPException(401, "缺少或错误的 API key [invalid api key]", {"WWW-Authenticate": "Bearer"})

    return check


def _without_422(schema: dict) -> dict:
    """FastAPI documents a 422 for every route; here a request that is not valid gets 400, as from OpenAI."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema


def _describe(error: HelpersError) -> tuple[int, dict]:
    """Status and body for an error of ours."""
    if isinstance(error, OverloadError):
        return 429, error_body(str(error), "rate_limit_error", "server_busy")
    if isinstance(error, EngineError):
        return 503, error_body(str(error), "server_error", "engine_down")
    if isinstance(error, UnknownModelError):
        return 404, error_body(str(error), "invalid_request_error", "model_not_found")
    return 400, error_body(str(error), "invalid_request_error")


def _refused(request: Request, status: int, body: dict, headers: dict | None = None) -> JSONResponse:
    """An error, counted and logged. A reply that had begun has been counted by its exchange."""
    if not hasattr(request.state, "begun"):
        request.app.state.metrics.requests.labels(str(status)).inc()
    logger.info("refused", extra={"path": request.url.path, "status": status, "error": body["error"]["code"]})
    return JSONResponse(body, status, headers=headers)


async def _on_helpers_error(request: Request, error: HelpersError) -> JSONResponse:
    status, body = _describe(error)
    return _refused(request, status, body, {"Retry-After": "1"} if status in (429, 503) else None)


async def _on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = field_problems(error, "body")
    return _refused(request, 400, error_body(f"请求不合格 [invalid request]：{problems}", "invalid_request_error"))


async def _on_http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
    return _refused(request, error.status_code, error_body(str(error.detail), "invalid_request_error"), error.headers)


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    return _refused(request, 500, error_body("服务器内部错误 [internal error]", "server_error"))


_ERROR_HANDLERS = {
    HelpersError: _on_helpers_error,
    RequestValidationError: _on_invalid,
    StarletteHTTPException: _on_http_error,
    Exception: _on_bug,
}
