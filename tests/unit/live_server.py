"""What the tests of the API server share: the real application on a real socket, and ways to keep the model busy."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import torch
import uvicorn

from helpers.chat.generation import STOP_IDS, GenerationParameters
from helpers.chat.reply import PromptCache, Reply
from helpers.serving.app import create_app
from helpers.serving.server import open_listener, uvicorn_config


class LiveServer:
    """The application served from a thread of this process, so that a test can look inside."""

    def __init__(self, app):
        self.app, self.service, self.listener = app, app.state.service, open_listener("127.0.0.1", 0)
        self.server = uvicorn.Server(uvicorn_config(app, 5))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    @property
    def engine(self):
        return self.service.engines[self.service.name]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").raise_for_status().text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def idle(self) -> bool:
        """Whether nothing of any request is left: no slot, no handler, no block of the KV cache."""
        manager = self.engine._manager
        scheduler = manager.batch_processor.scheduler
        return not (
            self.engine.in_flight
            or manager.output_router.result_handlers
            or manager.output_router.output_queue.qsize()
            or scheduler.active_requests
            or scheduler.waiting_requests
        )

    def connections(self) -> set[int | None]:
        """The ports of the clients that are connected; None for one that was gone before it was looked at."""
        return {connection.client and connection.client[1] for connection in list(self.server.server_state.connections)}

    def __enter__(self):
        self.port = self.listener.getsockname()[1]
        self.thread.start()
        wait_until(lambda: self.service.status == "ready" or self.service.failure or not self.thread.is_alive())
        assert self.service.status == "ready", self.service.failure
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=60)
        return self

    def __exit__(self, *exception):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=60)
        assert not self.thread.is_alive(), "the server did not stop"


def nano_server(model_and_tokenizer, **options) -> LiveServer:
    return LiveServer(create_app(model_and_tokenizer, **options))


def openai_client(server: LiveServer, **options) -> openai.OpenAI:
    http_client = httpx.Client(trust_env=False)
    options = {"api_key": "not needed", "max_retries": 0, "timeout": 30, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", http_client=http_client, **options)


def ask(text: str = "你好", **fields) -> dict:
    """The body of a chat completion that gives a short greedy reply, unless `fields` say otherwise."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **fields}


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


async def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def endless(model, seconds_per_token: float = 0.0) -> Iterator[None]:
    """Replies of the model do not end by themselves, and may come slowly: Nano's own are short and fast."""

    def hook(module, args, output):
        time.sleep(seconds_per_token)
        output.logits[..., STOP_IDS] = -torch.inf

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def before_forward(model, action: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `action(input_ids)` before every forward pass."""
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: action(kwargs["input_ids"]), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def parameters(**fields) -> GenerationParameters:
    return GenerationParameters.check({"max_new_tokens": 12, **fields})


def one_at_a_time(model, input_ids: list[int], chosen: GenerationParameters) -> list[int]:
    """The reply that transformers' `generate` gives: what `chat` says."""
    config = chosen.to_config(chosen.max_new_tokens)
    return [token for piece in Reply(model, input_ids, config, PromptCache(), chosen.seed).start() for token in piece]
