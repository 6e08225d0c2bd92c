"""`python -m helpers serve --replicas`: two copies of Nano on Ray Serve, as a process of their own, seen from outside."""

import asyncio
import importlib.metadata
import ipaddress
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import torch
from live_server import ask, wait_until
from peft import LoraConfig, get_peft_model
from uvicorn.protocols.http.h11_impl import H11Protocol

import helpers
from helpers.errors import HelpersError
from helpers.network import free_port
from helpers.serving import Server, serve
from helpers.serving.cluster import Cluster, ClusterOptions
from helpers.serving.server import uvicorn_config

CHAT = "/v1/chat/completions"
KEY = "sk-it-is-a-secret"
REPLICAS, SLOTS, QUEUE = 2, 2, 3
# Nano's own replies are short. At this temperature it babbles; with this seed, for all of the tokens.
BABBLE = {"temperature": 10, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 1}
OPTIONS = ["--replicas", REPLICAS, "--slots", SLOTS, "--queue-size", QUEUE, "--context", 4096, "--threads", 1]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes what the model says: both of its matrices are random."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "gate_up_proj"]
    model, _ = helpers.load("nano", dtype="float32", device_map="cpu")
    get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, adapter):
    log = tmp_path_factory.mktemp("cluster") / "log"
    port = free_port(20000 + os.getpid() % 20000)
    options = [*OPTIONS, "--adapter", f"mine={adapter}"]
    with Server("nano", log_file=log, port=port, api_key=KEY, options=options) as server:
        server.client = httpx.Client(base_url=server.url, trust_env=False, timeout=120, headers=bearer())
        server.replicas = replicas(server)
        yield server


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def processes(server) -> list[psutil.Process]:
    front = psutil.Process(server.process.pid)
    return [front, *front.children(recursive=True)]


def replicas(server) -> set[int]:
    """The process ids of the replicas, as Ray names them."""
    return {process.pid for process in processes(server) if process.name().startswith("ray::ServeRepli")}


def metric(server, name) -> float:
    lines = server.client.get("/metrics").raise_for_status().text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"characterglm_{name} "))


def logged(server) -> list[dict]:
    """The log's lines about requests."""
    lines = [json.loads(line) for line in server.log_file.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == "request"]


def stream(server, **fields):
    """The lines of a streamed reply; closed early, the client goes away."""
    with server.client.stream("POST", CHAT, json=ask(**{**BABBLE, "stream": True, **fields})) as answer:
        assert answer.status_code == 200, answer.read()
        yield from (line for line in answer.iter_lines() if line)


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


@pytest.mark.parametrize("version", [None, "2.59.1"])
def test_without_the_right_ray_the_command_says_what_to_install(monkeypatch, version):
    def other(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", other)
    with pytest.raises(HelpersError, match=r"ray 2\.60 required.*requirements-cluster\.txt"):
        serve("nano", port=free_port(30000), cluster={"replicas": 2})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gpus_per_replica": 1000}, "not enough GPUs"),
        ({"ray_address": "127.0.0.1:1"}, "no ray cluster"),
        ({"ray_address": "nonsense:x"}, "no ray cluster"),
    ],
)
def test_what_is_not_there(options, message):
    """Before anything is started, and at once."""
    with pytest.raises(HelpersError, match=message):
        Cluster(ClusterOptions(**options)).connect()


def test_what_ray_brings_along_does_not_change_the_server():
    """uvicorn would take uvloop and httptools as soon as they are installed."""
    config = uvicorn_config(None, 5)
    config.load()
    assert config.http_protocol_class is H11Protocol
    assert config.loop == "asyncio"


# --- the same API


def test_two_replicas_and_every_port_on_loopback(cluster):
    assert len(cluster.replicas) == metric(cluster, "replicas") == REPLICAS
    listening = [
        (process.name(), connection.laddr)
        for process in processes(cluster)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert cluster.port in {address.port for _, address in listening}
    assert [found for found in listening if not is_loopback(found[1].ip)] == []


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_only_with_the_key(cluster):
    refused = httpx.post(f"{cluster.url}/", json={"prompt": "x"}, trust_env=False)
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "invalid_request_error"


def test_greedy_replies_are_those_of_the_single_server(cluster, adapter):
    """Of the model and of an adapter, whichever replica writes them; `chat` says what the single server says."""
    replies = {}
    for name, directory in (("nano", None), ("mine", adapter)):
        model, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu", adapter=directory)
        for text in ("你好", "你是谁？"):
            body = ask(text, model=name, max_tokens=24)
            answers = [cluster.client.post(CHAT, json=body, headers={"x-session-id": f"{i}"}) for i in range(4)]
            said = {answer.json()["choices"][0]["message"]["content"].strip() for answer in answers}
            persona = helpers.get_character("苏梦远")
            expected, _ = helpers.chat(model, tokenizer, persona, text, do_sample=False, max_new_tokens=24)
            assert said == {expected}
            replies[name, text] = expected
    assert replies["nano", "你好"] != replies["mine", "你好"]


def test_a_stream_comes_piece_by_piece(cluster):
    pieces, times = [], []
    for line in stream(cluster, max_tokens=400, stream_options={"include_usage": True}):
        pieces.append(line)
        times.append(time.perf_counter())
    assert pieces[-1] == "data: [DONE]"
    usage = json.loads(pieces[-2][6:])["usage"]
    assert usage["completion_tokens"] == 400
    assert len(pieces) > 6  # a message every 0.1 s, however fast the machine
    assert times[2] - times[0] < (times[-1] - times[0]) / 2


def test_errors_of_a_request_are_answered_in_front(cluster):
    unknown = cluster.client.post(CHAT, json=ask(model="nobody"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert cluster.client.post("/", json={"prompt": ""}).status_code == 400


def test_a_session_stays_on_its_replica_and_others_spread(cluster):
    def served_by(headers, count):
        before = len(logged(cluster))
        for _ in range(count):
            cluster.client.post(CHAT, json=ask(max_tokens=2), headers=headers).raise_for_status()
        return [line["replica"] for line in logged(cluster)[before:]]

    homes = {name: set(served_by({"x-session-id": name}, 4)) for name in map(str, range(8))}
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) == REPLICAS
    assert set(served_by({}, 12)) == set.union(*homes.values())


def test_a_client_that_goes_away_frees_its_slot(cluster):
    gone = [stream(cluster, max_tokens=3000) for _ in range(REPLICAS * SLOTS)]
    for lines in gone:
        assert [next(lines) for _ in range(4)]
    assert metric(cluster, "requests_in_flight") == len(gone)
    for lines in gone:
        lines.close()
    wait_until(lambda: metric(cluster, "requests_in_flight") == 0)
    # Only a free slot of a replica answers: what waits in front waits for one.
    with ThreadPoolExecutor() as pool:
        start = time.monotonic()
        answers = list(pool.map(lambda _: cluster.client.post(CHAT, json=ask()), range(REPLICAS * SLOTS)))
        seconds = time.monotonic() - start
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert seconds < 10  # the replies that were cancelled would have taken longer
    assert metric(cluster, "aborted_total") >= len(gone)


async def at_once(server, bodies: list[dict]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, headers=bearer(), trust_env=False, timeout=120, limits=limits
    ) as client:
        return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))


def test_overload_is_refused_and_nothing_is_lost(cluster):
    room = REPLICAS * SLOTS + QUEUE
    answers = asyncio.run(at_once(cluster, [ask(**BABBLE, max_tokens=100)] * (room + 9)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 9
    for answer in refused:
        assert answer.status_code == 429 and answer.headers["Retry-After"]
        assert answer.json()["error"]["code"] == "server_busy"
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 100
    wait_until(lambda: metric(cluster, "requests_in_flight") == 0)


# --- a replica is lost; last, because another one takes its place


def test_a_replica_is_killed_under_load(cluster):
    """Nobody notices but the log: what the lost replica was writing, the other one ends."""
    greedy = ask("给我讲个故事吧", max_tokens=40, model="苏梦远")
    expected = cluster.client.post(CHAT, json=greedy).json()["choices"]
    lost, length = min(cluster.replicas), 120

    async def load():
        work = asyncio.create_task(
            at_once(cluster, [ask(**BABBLE, max_tokens=length)] * (REPLICAS * SLOTS) + [greedy] * QUEUE)
        )
        await asyncio.sleep(0.5)
        os.kill(lost, signal.SIGKILL)
        return await work

    answers = asyncio.run(load())
    for answer in answers:
        assert answer.status_code == 200 or (answer.status_code in (429, 503) and answer.headers["Retry-After"])
    whole = [answer.json() for answer in answers if answer.status_code == 200]
    assert len(whole) >= REPLICAS * SLOTS
    assert {reply["usage"]["completion_tokens"] for reply in whole if reply["choices"] != expected} == {length}
    wait_until(lambda: len(replicas(cluster) - {lost}) == REPLICAS, seconds=60)
    wait_until(lambda: metric(cluster, "replicas") == REPLICAS, seconds=60)
    assert metric(cluster, "requests_in_flight") == 0
    answers = asyncio.run(at_once(cluster, [ask()] * (REPLICAS * SLOTS)))
    assert [answer.status_code for answer in answers] == [200] * len(answers)


def test_sigterm_ends_everything(cluster):
    """The reply being written is finished first."""
    everything = processes(cluster)
    assert len(everything) > 5
    lines = stream(cluster, max_tokens=100)
    next(lines)
    cluster.process.send_signal(signal.SIGTERM)
    assert list(lines)[-1] == "data: [DONE]"
    cluster.process.wait(timeout=20)
    assert psutil.wait_procs(everything, timeout=10)[1] == []
    assert KEY not in cluster.log_file.read_text()
