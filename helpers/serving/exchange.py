"""One request from prompt to answer: measured, logged, and cancelled when the client goes away."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request

from ..characters.personas import SessionMeta
from .metrics import Stopwatch
from .service import Started
from .text import Piece, read_text

logger = logging.getLogger("helpers.serving")

SESSION_HEADER, SESSION_CHARACTERS = "x-session-id", 128
Prompt = tuple[SessionMeta, list[list[dict]]]


class Exchange:
    """A reply that has begun: read `pieces`, then `close`; or let `whole` do both."""

    def __init__(self, request: Request, stopwatch: Stopwatch, started: Started, stops: Iterable[str]):
        self.id = uuid.uuid4().hex
        self.request, self.stopwatch = request, stopwatch
        request.state.begun = True
        self.generation, self.prompt_tokens = started.generation, started.prompt_tokens
        self.texts: dict[str, str] = {}  # for the log, if asked for
        self.last = Piece("", 0)
        self.failed = self._closed = False
        self.pieces = self._measured(read_text(request.app.state.service.tokenizer, self.generation, stops))

    @classmethod
    async def begin(
        cls,
        request: Request,
        model: str | None,
        make_prompt: Callable[[SessionMeta | None], Prompt],
        parameters: dict,
        stops: Iterable[str] = (),
    ) -> "Exchange":
        """Start the reply to a request.

        Args:
            model: of the request: the name of the model, an adapter or a character.
            make_prompt: given the character that `model` names, if any.
            parameters: for `GenerationParameters`.

        Raises:
            HelpersError: the request cannot be answered; nothing is left behind.
        """
        stopwatch, service = Stopwatch(request.app.state.metrics), request.app.state.service
        engine, character = service.choose(model)
        persona, turns = make_prompt(character)
        session = request.headers.get(SESSION_HEADER, "")[:SESSION_CHARACTERS]
        started = await service.start(engine, persona, turns, parameters, session or None)
        exchange = cls(request, stopwatch, started, stops)
        if request.app.state.log_text:
            exchange.texts = {"query": turns[-1][-1]["content"], "reply": ""}
        return exchange

    async def whole(self) -> str | None:
        """The whole reply, or None if the client has gone away."""

        async def read() -> str:
            return "".join([piece.text async for piece in self.pieces])

        try:
            return await self._unless_gone(read())
        finally:
            self.close()

    async def first(self) -> Piece | None:
        """The first of `pieces`, or None if the client has gone away. Until then no status has been sent."""
        piece = None
        try:
            piece = await self._unless_gone(anext(self.pieces))
        finally:
            if piece is None:
                self.close()
        return piece

    def close(self) -> None:
        """End the reply if it is still being written, count it and log it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.generation.cancel()
        outcome = "failed" if self.failed else self.last.finish_reason or "aborted"
        facts = {"id": self.id, "path": self.request.url.path, "prompt_tokens": self.prompt_tokens}
        logger.info("request", extra=facts | self.generation.facts | self.stopwatch.end(outcome) | self.texts)

    async def _measured(self, pieces):
        try:
            async for piece in pieces:
                self.stopwatch.note(piece.tokens)
                self.last = piece
                if self.texts:
                    self.texts["reply"] += piece.text
                yield piece
        except Exception:
            self.failed = True
            raise

    async def _unless_gone(self, work: Coroutine) -> Any:
        """The result of `work`, or None, with `work` cancelled, if the client disconnects first."""
        task, gone = asyncio.ensure_future(work), asyncio.create_task(self._disconnected())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
