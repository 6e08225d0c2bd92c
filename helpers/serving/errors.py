"""Every error in OpenAI's shape, counted and logged."""

import logging

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..characters.personas import field_problems
from ..errors import EngineError, HelpersError, OverloadError
from .exchange import ClientGoneError
from .service import UnknownModelError

logger = logging.getLogger("helpers.serving")

HANDLED = (HelpersError, RequestValidationError, HTTPException, Exception)  # what `answer_error` is registered for
INVALID = "invalid_request_error"
# Status, type and code; the first class that fits.
KINDS = {
    OverloadError: (429, "rate_limit_error", "server_busy"),
    EngineError: (503, "server_error", "engine_down"),
    UnknownModelError: (404, INVALID, "model_not_found"),
    ClientGoneError: (499, INVALID, None),  # nobody receives it
    HelpersError: (400, INVALID, None),
}


def describe(error: Exception) -> tuple[int, dict]:
    """Status and body for an error."""
    if isinstance(error, RequestValidationError):
        return 400, error_body(f"请求不合格 [invalid request]：{field_problems(error, 'body')}", INVALID)
    if (
        isinstance(error, HTTPException) and error.detail == "There was an error parsing the body"
    ):  # FastAPI's own words
        return 400, error_body(
            "读不了请求体 [cannot read the body]：请发 UTF-8 编码的 JSON，不是 GBK 等别的编码", INVALID
        )
    if isinstance(error, HTTPException):
        return error.status_code, error_body(str(error.detail), INVALID)
    for kind, (status, *names) in KINDS.items():
        if isinstance(error, kind):
            return status, error_body(str(error), *names)
    return 500, error_body("服务器内部错误 [internal error]", "server_error")  # what went wrong is for the log


def error_body(message: str, kind: str, code: str | None = None) -> dict:
    """An error in OpenAI's shape; characters that no encoder takes are replaced."""
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The exception handler of the app."""
    status, body = describe(error)
    kind = request.headers.get("content-type", "")
    if isinstance(error, RequestValidationError) and request.method == "POST" and "json" not in kind.lower():
        problem = f"请求头 Content-Type 应为 application/json [wrong content type]，收到 {kind[:80]!r}"
        body = error_body(problem, INVALID)
    if not hasattr(request.state, "begun"):  # a reply that had begun has been counted by its exchange
        request.app.state.metrics.requests.labels(str(status)).inc()
    logger.info("refused", extra={"path": request.url.path, "status": status, "error": body["error"]["code"]})
    retry = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(body, status, headers=getattr(error, "headers", None) or retry)
