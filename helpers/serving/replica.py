"""What runs on Ray Serve: replicas with a model each, and the choice of one for a request."""

import time
from collections.abc import AsyncIterator

import torch
from ray import serve
from ray.serve._private import replica as ray_replica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from ..chat.generation import GenerationParameters
from ..errors import EngineError
from .service import Service

MESSAGE_SECONDS = 0.1  # a message costs Ray about 1 ms on either side, as much as a small model needs for a token


class StickyRouter(ConsistentHashRouter):
    """Requests of one session go to one replica, whose KV cache knows their beginning; others where least is to do."""

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Replicas in the order in which to ask them; among those of one inner list Ray takes the least busy."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is not None and pending_request.metadata.session_id:
            return ranks
        return [[replica for rank in ranks for replica in rank]]


class Replica:
    """One model with its engines in a process of its own.

    Args:
        directory: of the model; adapters: name to directory. Both have to be there on the replica's machine.
        threads: for torch on a CPU.
        engine_options: for `Engine`.
    """

    async def __init__(self, directory: str, adapters: dict[str, str], threads: int, engine_options: dict):
        torch.set_num_threads(threads)
        _open_no_port()
        self.service = Service(directory, adapters, **engine_options)
        await self.service.load()

    def check_health(self) -> None:
        """For Ray, which replaces a replica that stays broken.

        Raises:
            EngineError: an engine is down. It is started again by itself; only if that fails three times is it final.
        """
        if self.service.status != "ready":
            raise EngineError("推理引擎没有在运行 [engine is down]")

    async def describe(self) -> dict:
        """What the front has to know about the model: its own generation defaults, and the longest context."""
        engine = self.service.engines[self.service.name]
        return {"defaults": self.service.defaults, "context": engine.context}

    async def generate(self, engine: str, input_ids: list[int], parameters: dict) -> AsyncIterator[str | list[int]]:
        """This replica's id, then token ids as they are written. Closed early, the reply ends and its slot is free."""
        yield serve.get_replica_context().replica_id.unique_id
        generation = self.service.engines[engine].generate(input_ids, GenerationParameters.check(parameters))
        written, sent = [], 0.0
        try:
            async for token_ids in generation:
                written += token_ids
                if time.monotonic() - sent >= MESSAGE_SECONDS:
                    yield written
                    written, sent = [], time.monotonic()
            if written:
                yield written
        finally:
            generation.cancel()


def _open_no_port() -> None:
    """Keep Ray from letting the replica listen for calls of other deployments.

    There are none; but Ray 2.60 would listen on all addresses, ask for no token, and unpickle what comes.
    """
    ray_replica.add_port_to_grpc_server = lambda server, address: 0
