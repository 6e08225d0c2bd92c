"""Engines that are elsewhere: what the app sees of the replicas."""

import asyncio
import logging

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from ..chat.generation import STOP_IDS, GenerationParameters
from ..errors import EngineError, HelpersError, OverloadError
from .engine import Admission

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # a request that brings down its replica must not bring down all of them


class RemoteEngine(Admission):
    """One model or adapter on all replicas; like `Engine`, with as many slots as the running replicas have together.

    Args:
        name: of the engine in each replica.
        cluster: a `Cluster` that has started.
        slots: of one replica; queue_size: requests that may wait here.
        context: longest prompt and reply together, in tokens.
    """

    def __init__(self, name: str, cluster, *, slots: int, queue_size: int, context: int):
        super().__init__(queue_size)
        self.name, self.cluster, self.slots_each, self.context = name, cluster, slots, context

    @property
    def slots(self) -> int:
        """Replies written at the same time, by the replicas that run now."""
        return self.slots_each * self.cluster.running

    @property
    def alive(self) -> bool:
        """Whether any replica runs."""
        return self.cluster.running > 0

    @property
    def restarts(self) -> int:
        """Replicas that were lost."""
        return self.cluster.lost

    async def start(self) -> None:
        """Nothing: the replicas are there."""

    async def close(self) -> None:
        """Replies still being written end with an error."""
        for generation in list(self._running):
            generation.fail()

    def generate(
        self, input_ids: list[int], parameters: GenerationParameters, session: str | None = None
    ) -> "RemoteGeneration":
        """As `Engine.generate`; requests of one `session` go to the same replica."""
        self._admit()
        generation = RemoteGeneration(self, input_ids, parameters, session)
        self._running.add(generation)
        return generation


class RemoteGeneration:
    """A reply being written by a replica; like `Generation`.

    If the replica is lost, another one goes on from the tokens that are here already. A `seed` then no longer repeats
    the reply; a greedy one is the same.
    """

    def __init__(self, engine: RemoteEngine, input_ids: list[int], parameters: GenerationParameters, session):
        self.engine, self.input_ids, self.parameters, self.session = engine, input_ids, parameters, session
        self.token_ids: list[int] = []
        self.facts: dict[str, str] = {}  # for the log
        self._response = None
        self._failed = asyncio.Event()

    def cancel(self) -> None:
        """End the reply and free its slot. Does nothing if it has ended."""
        if self in self.engine._running:
            self._leave()
            if self._response is not None:
                self._response.cancel()

    def fail(self) -> None:
        """Let the reader see an error."""
        self._failed.set()
        self.cancel()

    async def __aiter__(self):
        for attempt in range(ATTEMPTS):
            try:
                async for token_ids in self._attempt():
                    self.token_ids += token_ids
                    yield token_ids
                break
            except (RayError, RayServeException, asyncio.CancelledError) as error:
                self._raise_unless_lost(error)
                logger.warning(
                    "replica lost", extra=self.facts | {"attempt": attempt + 1, "error": type(error).__name__}
                )
            if self._complete:
                break
        else:
            self._leave()
            raise EngineError("写这条回复的副本接连退出 [replicas lost]：请过几秒再试")
        self._leave()

    async def _attempt(self):
        """Token ids from one replica, from where the reply stands."""
        room = self.parameters.max_new_tokens - len(self.token_ids)
        parameters = {**self.parameters.model_dump(exclude_none=True), "max_new_tokens": room}
        handle = self.engine.cluster.handle.options(
            method_name="generate", stream=True, **({"session_id": self.session} if self.session else {})
        )
        self._response = handle.remote(self.engine.name, self.input_ids + self.token_ids, parameters)
        async for item in self._response:
            if isinstance(item, str):
                self.facts = {"replica": item}
            else:
                yield item

    @property
    def _complete(self) -> bool:
        """Whether only the end of the stream was missing."""
        written = self.token_ids
        return bool(written) and (written[-1] in STOP_IDS or len(written) >= self.parameters.max_new_tokens)

    def _raise_unless_lost(self, error: BaseException) -> None:
        if self._failed.is_set():
            raise EngineError("服务正在关闭 [shutting down]") from None
        if isinstance(error, BackPressureError):
            self._leave()
            raise OverloadError(f"请求太多 [server busy]：已有 {self.engine.in_flight} 个，请稍后再试") from None
        if isinstance(error, asyncio.CancelledError) or self not in self.engine._running:
            raise error
        if isinstance(error, RayTaskError):  # an error of ours, or a bug: the replica itself is well
            self._leave()
            raise error.cause if isinstance(error.cause, HelpersError) else error

    def _leave(self) -> None:
        self.engine._running.discard(self)
