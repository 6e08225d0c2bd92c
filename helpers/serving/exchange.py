"""One request from prompt to answer: whole characters cut at stop texts, measured, logged, cancelled if the client goes."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import Request

from ..chat.generation import STOP_IDS, StreamDecoder
from ..errors import HelpersError
from .engine import Generation
from .prompts import last_query
from .schemas import ChatRequest, LessonRequest

logger = logging.getLogger("helpers.serving")


class ClientGoneError(HelpersError):
    """The client has gone away while its reply was written."""


class Exchange:
    """A reply that has begun: read `pieces`, then `close`; or let `whole` do both."""

    def __init__(self, request: Request, body: LessonRequest | ChatRequest, generation: Generation, start: float):
        self.id = uuid.uuid4().hex
        self.request, self.generation, self.stops = request, generation, body.stops()
        self.metrics, self.tokenizer = request.app.state.metrics, request.app.state.service.tokenizer
        request.state.begun = True
        self.start, self.first_token = start, None  # seconds of time.perf_counter()
        self.finish_reason: str | None = None  # "stop" or "length"; "failed"
        self.query, self.reply = "", ""  # what was said last, and what has been sent
        self.pieces = self._read()
        self._closed = False

    @classmethod
    async def begin(cls, request: Request, body: LessonRequest | ChatRequest) -> list["Exchange"]:
        """Start the replies to a request. Raises HelpersError if that is not possible; nothing is left behind then."""
        start, state = time.perf_counter(), request.app.state
        engine, character = state.service.choose(body.model)
        persona, turns = body.conversation(character)
        generations = await state.service.start(engine, persona, turns, body.generation(), body.n or 1)
        exchanges = [cls(request, body, generation, start) for generation in generations]
        for exchange in exchanges:
            exchange.query = last_query(turns)
        return exchanges

    async def whole(self) -> str:
        """The whole reply. Raises ClientGoneError, EngineError."""
        try:
            async with self._watching_client():
                return "".join([piece async for piece in self.pieces])
        finally:
            self.close()

    async def first_piece(self) -> str:
        """The first of `pieces`; until then no status has been sent. Raises ClientGoneError, EngineError."""
        try:
            async with self._watching_client():
                return await anext(self.pieces)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the reply if it is still being written, count it and log it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.generation.cancel()
        outcome, now, tokens = self.finish_reason or "aborted", time.perf_counter(), len(self.generation.token_ids)
        self.metrics.requests.labels(outcome).inc()
        if outcome == "aborted":
            self.metrics.aborted.inc()
        if tokens > 1:
            self.metrics.per_token.observe((now - self.first_token) / (tokens - 1))
        facts = {
            "id": self.id,
            "path": self.request.url.path,
            "outcome": outcome,
            "seconds": round(now - self.start, 4),
        }
        facts["first_token_seconds"] = self.first_token and round(self.first_token - self.start, 4)
        facts |= {"prompt_tokens": self.generation.prompt_tokens, "new_tokens": tokens}
        if self.request.app.state.log_text:
            facts |= {"query": self.query, "reply": self.reply}
        logger.info("request", extra=facts)

    async def _read(self) -> AsyncIterator[str]:
        """The reply as it grows, up to the first stop text.

        What could be the beginning of one is held back until it is clear: the last three characters of "好的。\\n旅人", if
        "\\n旅人:" is to end the reply.
        """
        decoder, held = StreamDecoder(self.tokenizer), max((len(stop) for stop in self.stops), default=1) - 1
        try:
            async for token_ids in self.generation:
                if self.first_token is None:
                    self.first_token = time.perf_counter()
                    self.metrics.first_token.observe(self.first_token - self.start)
                self.metrics.tokens.inc(len(token_ids))
                text = decoder.add(token_ids)
                cut = min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)
                if cut is not None:
                    self.finish_reason = "stop"
                    yield self._unsent(text[:cut])
                    return
                if len(text) - held > len(self.reply):
                    yield self._unsent(text[: len(text) - held])
            self.finish_reason = "stop" if self.generation.token_ids[-1] in STOP_IDS else "length"
            yield self._unsent(decoder.text)
        except Exception as error:
            self.finish_reason = None if isinstance(error, ClientGoneError) else "failed"
            raise

    def _unsent(self, text: str) -> str:
        piece, self.reply = text[len(self.reply) :], text
        return piece

    @contextlib.asynccontextmanager
    async def _watching_client(self):
        """Until the status is sent, nobody else notices that the client has gone: the reader then gets an error."""

        async def wait_for_end() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            self.generation.fail(ClientGoneError("客户端已断开 [client gone]"))

        watcher = asyncio.create_task(wait_for_end())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
