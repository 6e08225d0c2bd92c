"""Several users at once: asks a server of this API, or of the original lesson's, and measures what each user waits for."""

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Answer:
    """One reply as its user saw it. Seconds are counted from the request."""

    text: str
    first: float  # when the first words came; without streaming, when all of it came
    total: float


async def ask(client: httpx.AsyncClient, prompt: str, stream: bool = False, **parameters) -> Answer:
    """Ask for one reply: by `POST /`, or streamed by `/v1/chat/completions`. Raises httpx.HTTPStatusError.

    Args:
        parameters: more fields of the request, such as max_length or temperature.
    """
    start = time.perf_counter()
    if not stream:
        response = await client.post("/", json={"prompt": prompt, "history": [], **parameters})
        seconds = time.perf_counter() - start
        return Answer(response.raise_for_status().json()["response"], seconds, seconds)
    body = {"messages": [{"role": "user", "content": prompt}], "stream": True, **parameters}
    text, first = "", None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and (choices := json.loads(line[6:])["choices"]):
                text += choices[0]["delta"].get("content") or ""  # other servers begin with null
                if text and first is None:
                    first = time.perf_counter() - start
    total = time.perf_counter() - start
    return Answer(text, first or total, total)


async def ask_all(url: str, prompts: Iterable[str], gap: float = 0, **options) -> tuple[list[Answer], float]:
    """Ask for a reply to each prompt, a user each. All ask at once, or one every `gap` seconds.

    Args:
        options: for `ask`.

    Returns:
        The answers, and the seconds from the first request to the end of the last answer.
    """
    async with _client(url) as client:
        start = time.perf_counter()

        async def user(number: int, prompt: str) -> Answer:
            await asyncio.sleep(number * gap)
            return await ask(client, prompt, **options)

        answers = await asyncio.gather(*(user(number, prompt) for number, prompt in enumerate(prompts)))
        return answers, time.perf_counter() - start


async def health_delays(url: str, until: asyncio.Task, pause: float = 0.1) -> list[float]:
    """How long `GET /health` takes, again and again until a task is done. Seconds."""
    delays = []
    async with _client(url) as client:
        while not until.done():
            start = time.perf_counter()
            await client.get("/health")
            delays.append(time.perf_counter() - start)
            await asyncio.sleep(pause)
    return delays


def _client(url: str) -> httpx.AsyncClient:
    # The environment may name a proxy, which is not for 127.0.0.1.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits)
