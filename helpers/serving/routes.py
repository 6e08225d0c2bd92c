"""The routes: `POST /` as in the original lesson, OpenAI's chat completions and models, health and metrics."""

import json
import time
from collections.abc import AsyncIterator
from datetime import datetime

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.background import BackgroundTask

from ..errors import HelpersError
from .errors import describe
from .exchange import Exchange
from .limits import LimitedRoute
from .schemas import ChatRequest, Choice, Completion, ErrorBody, LessonRequest, LessonResponse, Reply, Usage

ERRORS = {status: {"model": ErrorBody} for status in ("4XX", 503)}  # with 4XX, FastAPI documents no 422 of its own
STARTED = int(time.time())

router = APIRouter(route_class=LimitedRoute)


@router.post("/", response_model=LessonResponse, responses=ERRORS)
async def lesson(body: LessonRequest, request: Request):
    """One reply, as in the original lesson."""
    exchange = await Exchange.begin(request, body)
    response = await exchange.whole()
    history = [*(body.history or []), (body.prompt, response)]
    return LessonResponse(response=response, history=history, time=f"{datetime.now():%Y-%m-%d %H:%M:%S}")


@router.post("/v1/chat/completions", response_model=Completion, responses=ERRORS)
async def chat_completions(body: ChatRequest, request: Request):
    """OpenAI's chat completions, with the persona in `chat_template_kwargs.session_meta` or by name in `model`."""
    exchange = await Exchange.begin(request, body)
    name = body.model or request.app.state.service.name
    answer = {"id": f"chatcmpl-{exchange.id}", "created": int(time.time()), "model": name}
    if body.stream:
        events = stream_events(body, exchange, await exchange.first_piece(), answer)
        # Proxies would collect the events otherwise. The background task also ends a stream that was never read.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        end = BackgroundTask(exchange.close)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream", background=end)
    message = Reply(content=await exchange.whole())
    choice = Choice(message=message, finish_reason=exchange.finish_reason)
    return Completion(**answer, choices=[choice], usage=count_tokens(exchange))


async def stream_events(body: ChatRequest, exchange: Exchange, first: str, answer: dict) -> AsyncIterator[str]:
    """Chunks as OpenAI sends them: the role, pieces of text, the reason for the end, usage if asked for, [DONE]."""

    def event(data: dict) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    def chunk(delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**answer, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        if first:
            yield chunk({"content": first})
        async for piece in exchange.pieces:
            if piece:
                yield chunk({"content": piece})
        yield chunk({}, exchange.finish_reason)
        if body.stream_options and body.stream_options.include_usage:
            usage = count_tokens(exchange).model_dump()
            yield event({**answer, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except HelpersError as error:
        yield event(describe(error)[1])
    finally:
        exchange.close()


def count_tokens(exchange: Exchange) -> Usage:
    """OpenAI's `usage`."""
    prompt, completion = exchange.generation.prompt_tokens, len(exchange.generation.token_ids)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


@router.get("/v1/models", responses={401: {"model": ErrorBody}})
async def models(request: Request) -> dict:
    """What a request may name as `model`."""
    names = request.app.state.service.model_names
    card = {"object": "model", "created": STARTED, "owned_by": "characterglm"}
    return {"object": "list", "data": [{"id": name, **card} for name in names]}


@router.get("/health", responses={503: {"description": "Loading, or the engine is down."}})
async def health(request: Request) -> JSONResponse:
    """`ready` with 200, `loading` or `dead` with 503."""
    service = request.app.state.service
    return JSONResponse({"status": service.status, "model": service.name}, 200 if service.status == "ready" else 503)


@router.get("/metrics", response_class=Response, responses={401: {"model": ErrorBody}})
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
