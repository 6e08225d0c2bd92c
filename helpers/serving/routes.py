"""The routes: `POST /` as in the original lesson, OpenAI's chat completions and models, health and metrics."""

import html
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.background import BackgroundTask

from ..errors import HelpersError
from .errors import describe
from .exchange import Exchange
from .limits import LimitedRoute
from .schemas import ChatRequest, Choice, Completion, ErrorBody, LessonRequest, LessonResponse, Reply, Usage

ERRORS = {status: {"model": ErrorBody} for status in ("4XX", 503)}  # with 4XX, FastAPI documents no 422 of its own
MODEL = {"object": "model", "created": int(time.time()), "owned_by": "characterglm"}

# For a person who opens the address in a browser. The links are relative: a proxy may have put a prefix before them.
HOME = """<!doctype html><html lang="zh"><meta charset="utf-8"><title>CharacterGLM</title>
<body style="font:16px/1.8 system-ui,sans-serif;max-width:36em;margin:3em auto;padding:0 1em;color-scheme:light dark">
<h1>CharacterGLM</h1><p>这里是 API，模型：{model}，状态：{status} [an API for programs]</p><ul>{links}</ul></body></html>"""
LINKS = {
    "demo/": "聊天网页 [chat page]",
    "docs": "每个接口的说明，可以试 [documentation]",
    "health": "状态 [health]",
}

router = APIRouter(route_class=LimitedRoute)


@router.post("/", response_model=LessonResponse, responses=ERRORS)
async def lesson(body: LessonRequest, request: Request):
    """One reply, as in the original lesson."""
    [exchange] = await Exchange.begin(request, body)
    response = await exchange.whole()
    history = [*(body.history or []), (body.prompt, response)]
    return LessonResponse(response=response, history=history, time=f"{datetime.now():%Y-%m-%d %H:%M:%S}")


@router.get("/", include_in_schema=False)
async def home(request: Request) -> HTMLResponse:
    """Links, for a browser; a program that wants something else here has taken the wrong method."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(405, "Method Not Allowed", {"Allow": "POST"})
    service = request.app.state.service
    has_page = any(getattr(route, "path", "") == "/demo" for route in request.app.routes)
    links = {where: what for where, what in LINKS.items() if has_page or where != "demo/"}
    items = "".join(f'<li><a href="{where}">{what}</a></li>' for where, what in links.items())
    return HTMLResponse(HOME.format(model=html.escape(service.name), status=service.status, links=items))


@router.post("/v1/chat/completions", response_model=Completion, responses=ERRORS)
async def chat_completions(body: ChatRequest, request: Request):
    """OpenAI's chat completions, with the persona in `chat_template_kwargs.session_meta` or by name in `model`."""
    exchanges = await Exchange.begin(request, body)
    name = body.model or request.app.state.service.name
    answer = {"id": f"chatcmpl-{exchanges[0].id}", "created": int(time.time()), "model": name}
    if body.stream:
        try:
            first = await exchanges[0].first_piece()
        except BaseException:
            close_all(exchanges)
            raise
        events = stream_events(body, exchanges, first, answer)
        # Proxies would collect the events otherwise. The background task also ends a stream that was never read.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        end = BackgroundTask(close_all, exchanges)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream", background=end)
    try:
        texts = [await exchange.whole() for exchange in exchanges]  # all of them are being written meanwhile
    finally:
        close_all(exchanges)
    choices = [
        Choice(index=index, message=Reply(content=text), finish_reason=exchange.finish_reason)
        for index, (text, exchange) in enumerate(zip(texts, exchanges))
    ]
    return Completion(**answer, choices=choices, usage=count_tokens(exchanges))


def close_all(exchanges: list[Exchange]) -> None:
    for exchange in exchanges:
        exchange.close()


async def stream_events(body: ChatRequest, exchanges: list[Exchange], first: str, answer: dict) -> AsyncIterator[str]:
    """Chunks as OpenAI sends them: the role, pieces of text, the reason for the end, usage if asked for, [DONE].

    Of several replies, one comes after the other: all are written meanwhile, and clients tell them apart by `index`.
    """

    def event(data: dict) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    def chunk(index: int, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**answer, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        for index, exchange in enumerate(exchanges):
            yield chunk(index, {"role": "assistant", "content": ""})
            if index == 0 and first:
                yield chunk(0, {"content": first})
            async for piece in exchange.pieces:
                if piece:
                    yield chunk(index, {"content": piece})
            yield chunk(index, {}, exchange.finish_reason)
        if body.stream_options and body.stream_options.include_usage:
            usage = count_tokens(exchanges).model_dump()
            yield event({**answer, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except HelpersError as error:
        yield event(describe(error)[1])
    finally:
        close_all(exchanges)


def count_tokens(exchanges: list[Exchange]) -> Usage:
    """OpenAI's `usage`: the prompt counts once, however many replies there are."""
    prompt = exchanges[0].generation.prompt_tokens
    completion = sum(len(exchange.generation.token_ids) for exchange in exchanges)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models", responses={401: {"model": ErrorBody}})
async def models(request: Request) -> dict:
    """What a request may name as `model`."""
    names = request.app.state.service.model_names
    return {"object": "list", "data": [{"id": name, **MODEL} for name in names]}


@router.head("/v1/models/{name:path}", include_in_schema=False)
@router.get("/v1/models/{name:path}", responses=ERRORS)
async def model(name: str, request: Request) -> dict:
    """One of them."""
    request.app.state.service.check_name(name)
    return {"id": name, **MODEL}


@router.post("/v1/completions", include_in_schema=False)
@router.post("/v1/responses", include_in_schema=False)
async def other_interfaces() -> None:
    """What is not served says where to go instead."""
    raise HTTPException(
        404, "这里没有这个接口 [not served here]：请用 POST /v1/chat/completions（客户端里选 chat completion）"
    )


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: {"description": "Loading, or the engine is down."}})
async def health(request: Request) -> JSONResponse:
    """`ready` with 200, `loading` or `dead` with 503."""
    service = request.app.state.service
    return JSONResponse({"status": service.status, "model": service.name}, 200 if service.status == "ready" else 503)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response, responses={401: {"model": ErrorBody}})
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
