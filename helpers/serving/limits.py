"""What a client may cost: how large a body may be, and how long it may take."""

import asyncio
import zlib

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

BODY_BYTES = 128 * 1024  # reading it as a prompt takes half a second of one core, in which other prompts wait
BODY_SECONDS = 20.0


class LimitedRoute(APIRoute):
    """A route whose body has limits. FastAPI's own `max_body_size` answers in plain text, which is no error of OpenAI's."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request; its handler meets an HTTPException where the body goes beyond a limit."""
        gzipped = (b"content-encoding", b"gzip") in scope["headers"]
        await super().handle(scope, limited(receive, gzipped), send)


def limited(receive: Receive, gzipped: bool = False) -> Receive:
    """`receive`, until the body is larger (413) or slower (408) than it may be. What is `gzipped` is unpacked."""
    unpack = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress if gzipped else None
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS
    size, coming = 0, True

    async def receive_within_limits() -> Message:
        nonlocal size, coming
        try:
            # After the body, this waits for the client to go away, which may take as long as it likes.
            async with asyncio.timeout_at(deadline if coming else None):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"请求体太慢 [request timeout]：{BODY_SECONDS:g} 秒内没有收完") from None
        if unpack is not None and message.get("body"):
            try:
                message = {**message, "body": unpack(message["body"], BODY_BYTES + 1)}
            except zlib.error as error:
                raise HTTPException(400, f"请求体不是完好的 gzip [damaged gzip]：{error}") from None
        coming, size = message.get("more_body", False), size + len(message.get("body", b""))
        if size > BODY_BYTES:
            raise HTTPException(413, f"请求体太大 [body too large]：最多 {BODY_BYTES:,} 字节")
        return message

    return receive_within_limits
