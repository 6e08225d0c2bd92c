"""What a client may cost: the size of a body and how long it may take, and how long it may leave an answer unread."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES = 128 * 1024  # reading it as a prompt takes half a second of one core, in which other prompts wait
BODY_SECONDS = 20.0
SEND_SECONDS = 30.0


class RequestLimits:
    """ASGI middleware for the paths of the API; everything else passes unchanged.

    Args:
        body_bytes: a longer body gets 413; body_seconds: a slower one gets 408.
        send_seconds: a client that reads nothing for so long loses its connection.
    """

    def __init__(self, app: ASGIApp, body_bytes=BODY_BYTES, body_seconds=BODY_SECONDS, send_seconds=SEND_SECONDS):
        self.app, self.body_bytes = app, body_bytes
        self.body_seconds, self.send_seconds = body_seconds, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then let the application see it as one message."""
        if scope["type"] != "http" or not (scope["path"] == "/" or scope["path"].startswith("/v1/")):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.body_seconds):
                body = await self._read(receive)
        except TimeoutError:
            refused = _refuse(scope, 408, f"请求体太慢 [request timeout]：{self.body_seconds:g} 秒内没有收完")
            await refused(scope, receive, send)
            return
        if body is None:
            refused = _refuse(scope, 413, f"请求体太大 [body too large]：最多 {self.body_bytes:,} 字节")
            await refused(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), self._patient(send))

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None if it is too long. A client that goes away leaves what has come."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.body_bytes:
                return None
            if not message.get("more_body"):
                return body

    def _patient(self, send: Send) -> Send:
        async def patient_send(message: Message) -> None:
            try:
                async with asyncio.timeout(self.send_seconds):
                    await send(message)
            except TimeoutError:
                raise OSError("the client does not read") from None  # what Starlette takes for a lost connection

        return patient_send


def _replay(body: bytes, receive: Receive) -> Receive:
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _refuse(scope: Scope, status: int, message: str) -> JSONResponse:
    scope["app"].state.metrics.requests.labels(str(status)).inc()
    return JSONResponse(error_body(message, "invalid_request_error"), status)


def error_body(message: str, kind: str, code: str | None = None) -> dict:
    """An error in OpenAI's shape; characters that no encoder takes are replaced."""
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
