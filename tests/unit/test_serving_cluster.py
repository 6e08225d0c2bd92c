"""`python -m helpers serve --replicas`: two copies of Nano on Ray Serve, as a process of their own, seen from outside."""

import asyncio
import builtins
import contextlib
import ipaddress
import json
import os
import signal
import time

import httpx
import psutil
import pytest
from live_server import ask, wait_until
from uvicorn.protocols.http.h11_impl import H11Protocol

import helpers
from helpers.errors import HelpersError
from helpers.network import free_port
from helpers.serving import Server, serve
from helpers.serving.server import uvicorn_config

CHAT = "/v1/chat/completions"
KEY = "sk-it-is-a-secret"
REPLICAS, SLOTS, QUEUE = 2, 2, 3
# Nano's own replies are short. At this temperature it babbles; with this seed, for all of the tokens.
BABBLE = {"temperature": 10, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 1}
OPTIONS = ["--replicas", REPLICAS, "--slots", SLOTS, "--queue-size", QUEUE, "--context", 4096, "--threads", 1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    log = tmp_path_factory.mktemp("cluster") / "log"
    port = free_port(20000 + os.getpid() % 20000)
    with Server("nano", log_file=log, port=port, api_key=KEY, options=OPTIONS) as server:
        server.client = httpx.Client(base_url=server.url, trust_env=False, timeout=120, headers=bearer())
        # Ready is who has one replica.
        wait_until(lambda: len(set(served_by(server, 8))) == REPLICAS, seconds=120)
        yield server


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def processes(server) -> list[psutil.Process]:
    front = psutil.Process(server.process.pid)
    return [front, *front.children(recursive=True)]


def replicas(server) -> set[int]:
    """The process ids of the replicas, as Ray names them."""
    return {process.pid for process in processes(server) if process.name().startswith("ray::ServeRepli")}


def served_by(server, count, **headers) -> list[str]:
    """Which replica served each of `count` requests, in order: what the log says is written behind its process id."""
    ids = []
    for _ in range(count):
        answer = server.client.post(CHAT, json=ask(max_tokens=2), headers=headers).raise_for_status()
        ids.append(answer.json()["id"].removeprefix("chatcmpl-"))
    wait_until(lambda: all(f'"id": "{number}"' in server.log_file.read_text() for number in ids), seconds=30)
    lines = server.log_file.read_text().splitlines()
    return [next(line.partition("{")[0] for line in lines if f'"id": "{number}"' in line) for number in ids]


def stream(server, **fields):
    """The lines of a streamed reply; closed early, the client goes away."""
    with server.client.stream("POST", CHAT, json=ask(**{**BABBLE, "stream": True, **fields})) as answer:
        assert answer.status_code == 200, answer.read()
        yield from (line for line in answer.iter_lines() if line)


async def at_once(server, bodies: list[dict]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, headers=bearer(), trust_env=False, timeout=120, limits=limits
    ) as client:
        return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))


# --- refused before anything starts


@pytest.mark.parametrize(
    "options, message",
    [
        ({"replicas": 0}, "invalid replicas"),
        ({"replicas": 3, "max_replicas": 2}, "invalid replicas"),
        ({"gpus_per_replica": -1}, "invalid GPUs"),
        ({"gpus_per_replica": 1.5}, "invalid GPUs"),
    ],
)
def test_senseless_options(options, message):
    with pytest.raises(HelpersError, match=message):
        serve("nano", port=free_port(30000), cluster=options)


def test_other_machines_need_a_key_here_too():
    with pytest.raises(HelpersError, match="api key required"):
        serve("nano", host="0.0.0.0", cluster={"replicas": 2})


def test_without_ray_the_command_says_what_to_install(monkeypatch):
    def without_ray(name, *rest, original=builtins.__import__):
        if name == "ray":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(HelpersError, match=r"ray required.*requirements-cluster\.txt"):
        serve("nano", port=free_port(30000), cluster={"replicas": 2})


def test_what_ray_brings_along_does_not_change_the_server():
    """uvicorn would take uvloop and httptools as soon as they are installed."""
    config = uvicorn_config(None, 5)
    config.load()
    assert config.http_protocol_class is H11Protocol
    assert config.loop == "asyncio"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--replicas", 2, "--gpus-per-replica", 1000], "not enough GPUs"),
        (["--ray-address", "127.0.0.1:1"], "no ray cluster"),
        (["--ray-address", "nonsense:x"], "no ray cluster"),
    ],
)
def test_what_is_not_there(tmp_path, options, message):
    with pytest.raises(HelpersError, match=rf"(?s)server did not start.*\[{message}\]"):
        Server("nano", log_file=tmp_path / "log", port=free_port(30000), options=options).start(120)


# --- the same API


@pytest.mark.slow
def test_two_replicas_and_the_ports_that_ray_opens(cluster):
    """All on 127.0.0.1, but for one of each replica: docs/scaling.md says how to close that."""
    assert len(replicas(cluster)) == REPLICAS
    listening = [(process, address) for process in processes(cluster) for address in listens(process)]
    assert cluster.port in {address.port for _, address in listening}
    reachable = [(process, address) for process, address in listening if not is_loopback(address.ip)]
    assert sorted(process.pid for process, _ in reachable) == sorted(replicas(cluster)), reachable


def listens(process) -> list:
    """The addresses on which a process listens; none if it has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [found.laddr for found in process.net_connections() if found.status == psutil.CONN_LISTEN]
    return []


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.slow
def test_errors_are_those_of_the_single_server(cluster):
    refused = httpx.post(f"{cluster.url}/", json={"prompt": "x"}, trust_env=False)
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "invalid_request_error"
    unknown = cluster.client.post(CHAT, json=ask(model="nobody"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert cluster.client.post("/", json={"prompt": ""}).status_code == 400


@pytest.mark.slow
def test_replies_are_those_of_the_single_server(cluster):
    expected, _ = helpers.chat(
        *helpers.load("nano", dtype="float32", device_map="cpu"),
        helpers.get_character("苏梦远"),
        "你好",
        do_sample=False,
        max_new_tokens=24,
    )
    body = ask("你好", max_tokens=24)
    answers = [cluster.client.post(CHAT, json=body, headers={"x-session-id": f"{i}"}) for i in range(4)]
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {expected}


@pytest.mark.slow
def test_a_stream_comes_piece_by_piece(cluster):
    pieces, times = [], []
    for line in stream(cluster, max_tokens=400, stream_options={"include_usage": True}):
        pieces.append(line)
        times.append(time.perf_counter())
    assert pieces[-1] == "data: [DONE]"
    assert json.loads(pieces[-2][6:])["usage"]["completion_tokens"] == 400
    assert times[2] - times[0] < (times[-1] - times[0]) / 2


@pytest.mark.slow
def test_a_session_stays_on_its_replica_and_others_spread(cluster):
    homes = {name: set(served_by(cluster, 4, **{"x-session-id": name})) for name in map(str, range(8))}
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) == REPLICAS
    assert len(set(served_by(cluster, 16))) == REPLICAS


@pytest.mark.slow
def test_a_client_that_goes_away_frees_its_slot(cluster):
    """All in one session, on one replica: only a slot that is free again answers at once."""
    cluster.client.headers["x-session-id"] = "one"
    try:
        gone = [stream(cluster, max_tokens=3500) for _ in range(SLOTS)]
        for lines in gone:
            assert [next(lines) for _ in range(4)]
        for lines in gone:
            lines.close()
        start = time.monotonic()
        assert cluster.client.post(CHAT, json=ask()).status_code == 200
        assert time.monotonic() - start < 20  # the replies that were cancelled would have taken longer
    finally:
        del cluster.client.headers["x-session-id"]


@pytest.mark.slow
def test_overload_is_refused_and_nothing_is_lost(cluster):
    answers = asyncio.run(at_once(cluster, [ask(**BABBLE, max_tokens=100)] * (REPLICAS * (SLOTS + QUEUE) + 9)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) >= 9
    for answer in refused:
        assert answer.status_code == 429 and answer.headers["Retry-After"]
        assert answer.json()["error"]["code"] == "server_busy"
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 100


# --- a replica is lost; last, because another one takes its place


@pytest.mark.slow
def test_a_killed_replica_is_replaced(cluster):
    """What it was writing is lost; the other one goes on, and soon there are two again."""
    lost = min(replicas(cluster))
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: len(replicas(cluster) - {lost}) == REPLICAS, seconds=120)
    wait_until(lambda: len(set(served_by(cluster, 8))) == REPLICAS, seconds=120)


@pytest.mark.slow
def test_sigterm_ends_everything(cluster):
    """The reply being written is finished first."""
    everything = processes(cluster)
    assert len(everything) > 5
    lines = stream(cluster, max_tokens=100)
    next(lines)
    cluster.process.send_signal(signal.SIGTERM)
    assert list(lines)[-1] == "data: [DONE]"
    cluster.process.wait(timeout=60)
    assert psutil.wait_procs(everything, timeout=20)[1] == []
    assert KEY not in cluster.log_file.read_text()
