"""SillyTavern itself: its server, the cases through its backend, and a card there and back."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from cases import KEY, META

import helpers
from helpers.characters.cards import export_card_png, import_card
from helpers.network import free_port

START_SECONDS = 400  # the first start bundles its page


@contextlib.contextmanager
def running(package: Path, data: Path) -> Iterator[str]:
    """The address of a SillyTavern that keeps everything in `data`, on 127.0.0.1."""
    port = free_port(8123)
    options = {"port": port, "dataRoot": data, "configPath": data / "config.yaml", "listen": "false"}
    options |= {"browserLaunchEnabled": "false", "disableCsrf": "false"}
    command = ["node", "server.js", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    data.mkdir(parents=True, exist_ok=True)
    with open(data / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=package, stdout=log, stderr=log, env={**os.environ, "NO_COLOR": "1"})
    try:
        wait_until_up(f"http://127.0.0.1:{port}", process, data / "log.txt")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{address}/csrf-token", trust_env=False).raise_for_status()
            return
        time.sleep(0.5)
    raise RuntimeError(f"SillyTavern did not start: {log.read_text()[-500:]}")


def backend(address: str) -> httpx.Client:
    """A client with the session and the token that its page would have."""
    client = httpx.Client(base_url=address, trust_env=False, timeout=120)
    client.headers["X-CSRF-Token"] = client.get("/csrf-token").raise_for_status().json()["token"]
    return client


def ask(client: httpx.Client, url: str, case: dict) -> dict:
    """The case through the endpoint that its page calls; what stands in Include Body Parameters is JSON, so YAML, too.

    Errors are asked for with streaming, as the page does unless it is told not to: without it, SillyTavern passes on
    nothing but "Bad Request" and the like.
    """
    body = {"stream": case["fails"], **case["body"]}
    extra = {name: body.pop(name) for name in ("chat_template_kwargs",) if name in body}
    headers = {} if case["key"] == KEY else {"Authorization": f"Bearer {case['key']}"}
    sent = {"chat_completion_source": "custom", "custom_url": url, **body}
    sent |= {"custom_include_body": json.dumps(extra), "custom_include_headers": json.dumps(headers)}
    answer = client.post("/api/backends/chat-completions/generate", json=sent)
    if body["stream"] and answer.is_success:
        return streamed(answer.text)
    content = answer.json()
    if "error" in content:
        return {"error": str(content["error"])}
    usage = content["usage"]
    return {
        "texts": [choice["message"]["content"] for choice in content["choices"]],
        "finish": [choice["finish_reason"] for choice in content["choices"]],
        "tokens": [usage["prompt_tokens"], usage["completion_tokens"]],
    }


def streamed(events: str) -> dict:
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return {"texts": [text], "finish": [f for choice in choices if (f := choice["finish_reason"])]}


def run(address: str, url: str, cases: list[dict]) -> dict:
    """The answers to the cases."""
    client = backend(address)
    client.post("/api/secrets/write", json={"key": "api_key_custom", "value": KEY}).raise_for_status()
    return {case["name"]: ask(client, url, case) for case in cases}


def sample_card() -> helpers.CharacterCard:
    """A card with everything that a card can have."""
    return helpers.CharacterCard(
        **META,
        greeting="*抬头* 什么人？",
        alternate_greetings=["雪停了。", "“坐。”\n他说。"],
        examples=[["你叫什么？", "阿青。"], ["冷吗？", "*摇头* 习惯了。"]],
    )


def card_round_trip(address: str, folder: Path) -> dict[str, bool]:
    """Whether our PNG is the same card after it was imported into SillyTavern and exported again, by kind of file."""
    client, card, result = backend(address), sample_card(), {}
    content = export_card_png(card)
    files = {"avatar": ("card.png", content, "image/png")}
    answer = client.post("/api/characters/import", files=files, data={"file_type": "png"}).raise_for_status().json()
    for kind in ("png", "json"):
        order = {"format": kind, "avatar_url": f"{answer['file_name']}.png"}
        exported = client.post("/api/characters/export", json=order).raise_for_status().content
        (folder / f"back.{kind}").write_bytes(exported)
        result[f"card back as {kind}"] = import_card(exported) == import_card(content) == card
    return result
