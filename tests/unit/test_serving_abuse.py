"""Nothing a client sends, or fails to send or to read, stops the server or slows it for others. Real sockets."""

import asyncio
import contextlib
import gc
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from live_server import LiveServer, ask, endless, nano_server, wait_until
from schemathesis import GenerationMode

import helpers
from helpers.serving.app import create_app
from helpers.serving.exchange import Exchange
from helpers.serving.limits import BODY_BYTES

CHAT = "/v1/chat/completions"
LONG = 600


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module")
def server(nano):
    with nano_server(nano, slots=4, queue_size=8, context=1024) as running:
        yield running


@pytest.fixture(autouse=True)
def others_are_served(server):
    """After whatever a test did, the engine has never stopped and answers the next request."""
    yield
    wait_until(server.idle)
    assert server.client.post(CHAT, json=ask(max_tokens=1)).status_code == 200
    assert server.engine.restarts == 0


@contextlib.contextmanager
def connection(server, path=None, body=None, headers=b"Content-Type: application/json\r\n", receive_buffer=None):
    """A socket of a client's own; with `body`, a request has been sent."""
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect(("127.0.0.1", server.port))
        if body is not None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\n%s" % (path.encode(), headers))
            client.sendall(b"Content-Length: %d\r\n\r\n" % len(content) + content)
        yield client


# --- bodies

MESSAGE = b'"messages": [{"role": "user", "content": "x"}]'
BAD_BODIES = {
    "empty": b"",
    "not JSON": b"hello",
    "cut off": b'{"prompt": "x", ' + MESSAGE,
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a string": b'"x"',
    "null": b"null",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"prompt":' * 12_000,
    "deep where a text belongs": b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}",
    "deep in an unknown field": b'{"prompt": "x", "extra": ' + b"[" * 60_000 + b"]" * 60_000 + b"}",
    "text as number": b'{"prompt": 5, "messages": 5}',
    "messages of numbers": b'{"prompt": "", "messages": [1, 2]}',
    "nothing said": b'{"prompt": " ", "messages": [{"role": "user", "content": " "}]}',
    "surrogate": rb'{"prompt": "\ud800", "messages": [{"role": "user", "content": "\udfff"}]}',
    "surrogate in persona": rb'{"prompt": "x", "session_meta": {"bot_name": "\ud800"}, "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"session_meta": {"bot_name": "\ud800"}}}',
    "surrogate in names": rb'{"prompt": "x", "character": "\ud800", "model": "\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "surrogate as role": rb'{"prompt": "x", "history": [["\ud800", "x"]], "messages": [{"role": "\ud800", "content": "x"}]}',
    "NaN": b'{"prompt": "x", "temperature": NaN, ' + MESSAGE + b"}",
    "infinity": b'{"prompt": "x", "temperature": Infinity, ' + MESSAGE + b"}",
    "beyond any float": b'{"prompt": "x", "temperature": 1e999, ' + MESSAGE + b"}",
    "negative": b'{"prompt": "x", "temperature": -0.5, ' + MESSAGE + b"}",
    "negative length": b'{"prompt": "x", "max_length": -1, "max_tokens": -2, ' + MESSAGE + b"}",
    "NaN probability": b'{"prompt": "x", "top_p": NaN, ' + MESSAGE + b"}",
    "more than certain": b'{"prompt": "x", "top_p": 1.01, ' + MESSAGE + b"}",
    "ten thousand digits": b'{"prompt": "x", "max_length": '
    + b"9" * 10_000
    + b', "max_tokens": '
    + b"9" * 10_000
    + b", "
    + MESSAGE
    + b"}",
    "malformed history": b'{"prompt": "x", "history": [["a"]], "messages": [{"role": "user"}]}',
}


@pytest.mark.parametrize("path", ["/", CHAT])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_bodies_get_an_error(server, path, body):
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404)
    error = json.loads(response.content.decode("utf-8"))["error"]
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-300, "top_p": 1e-300, "max_length": 10**30, "max_tokens": 10**30},
        {"top_k": 10**300, "seed": -(10**300), "temperature": 10},
        {"repetition_penalty": 1e-300, "seed": 2**63 - 1},
        {"model": None, "n": None, "stop": None, "seed": None, "logit_bias": {"5": -100}, "user": "x" * 1000},
    ],
)
def test_extreme_values_are_served(server, fields):
    assert server.client.post("/", json={"prompt": "x", **fields}).status_code == 200
    assert server.client.post(CHAT, json={**ask("x"), "max_tokens": 5, **fields}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", None])
def test_only_json_is_read(server, kind):
    """Any web page can make a browser send the first three: they must not reach the model."""
    headers = {"Content-Type": kind} if kind else {}
    for path, body in (("/", {"prompt": "x"}), (CHAT, ask())):
        assert server.client.post(path, content=json.dumps(body), headers=headers).status_code == 400


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_other_methods(server, method):
    assert server.client.request(method, "/").status_code == 405
    assert server.client.request(method, CHAT).status_code == 405


def test_bodies_that_are_too_large(server):
    large = json.dumps({"prompt": "长" * 10**6, **ask("长" * 10**6)}).encode()
    counter = 'characterglm_requests_total{outcome="413"}'
    before = server.metrics().get(counter, 0)
    for path in ("/", CHAT):
        announced = server.client.post(path, content=large, headers={"Content-Type": "application/json"})
        unannounced = server.client.post(path, content=iter([large[i : i + 65536] for i in range(0, 10**6, 65536)]))
        for response in (announced, unannounced):
            assert response.status_code == 413 and "[body too large]" in response.json()["error"]["message"]
    assert server.metrics()[counter] == before + 4


@pytest.mark.parametrize("content", ["a", "长", "😀", " ", "\n", "</s>"])
def test_prompts_as_large_as_a_body_may_be(server, content):
    text = content * (BODY_BYTES // len(content.encode()) - 100)
    response = server.client.post(
        "/",
        content=json.dumps({"prompt": "x" + text}, ensure_ascii=False).encode()[:BODY_BYTES],
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code in (200, 400, 413)


def test_only_turns_that_could_fit_are_rendered(server, monkeypatch):
    rendered, fit = [], server.service._fit

    def spy(persona, turns, *rest):
        rendered.append(len(turns))
        return fit(persona, turns, *rest)

    monkeypatch.setattr(server.service, "_fit", spy)
    body = {"prompt": "x", "history": [["a", "b"]] * 10_000}
    for max_length in (None, 1, 200):
        response = server.client.post("/", json={**body, "max_length": max_length})
        assert response.status_code == (400 if max_length == 1 else 200)
    assert max(rendered) <= server.engine.context // 2


# --- connections


def test_a_body_that_never_ends(nano, server, monkeypatch):
    monkeypatch.setattr("helpers.serving.limits.BODY_SECONDS", 0.5)
    with LiveServer(create_app(nano)) as hasty:
        start = time.monotonic()
        headers = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + headers)
            assert hasty.client.post("/", json={"prompt": "x"}).status_code == 200  # nobody waits for the slow one
            assert client.recv(1000).startswith(b"HTTP/1.1 408")
        assert hasty.metrics()['characterglm_requests_total{outcome="408"}'] == 1
        assert time.monotonic() - start < 15  # and not the 20 s that are allowed otherwise
        wait_until(hasty.idle)


def test_a_reader_that_never_reads(nano, monkeypatch):
    """The slot is free when the reply is done, and in the end the connection is, too."""
    monkeypatch.setattr("helpers.serving.server.SEND_SECONDS", 1.0)
    slow = LiveServer(create_app(nano, context=1024))
    slow.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or the kernel would take the whole reply
    with slow, endless(slow.engine.model):
        body = ask(max_tokens=LONG, stream=True)
        with connection(slow, CHAT, body, receive_buffer=2048) as client:
            port = client.getsockname()[1]
            wait_until(lambda: slow.engine.in_flight == 1)
            wait_until(slow.idle, seconds=30)
            assert slow.client.post(CHAT, json=ask()).status_code == 200
            wait_until(lambda: port not in slow.connections(), seconds=15)
            wait_until(lambda: not slow.server.server_state.tasks)


def stream_until_first_words(client) -> None:
    received = b""
    while received.count(b"data: ") < 3:
        received += client.recv(4096)


@pytest.mark.parametrize("kind", ["mid-stream", "being written", "waiting", "waiting for a stream"])
def test_clients_that_go_away(server, kind):
    """Their requests are cancelled within a second. The hook keeps Nano talking for long."""
    body = ask(max_tokens=LONG, stream="stream" in kind)
    with endless(server.engine.model, 0.005), contextlib.ExitStack() as clients:
        others = server.engine.slots if "waiting" in kind else 0
        for _ in range(others):
            stream_until_first_words(clients.enter_context(connection(server, CHAT, ask(max_tokens=LONG, stream=True))))
        with connection(server, CHAT, body) as client:
            if kind == "mid-stream":
                stream_until_first_words(client)
            wait_until(lambda: server.engine.in_flight == others + 1)
        wait_until(lambda: server.engine.in_flight == others, seconds=10)
        clients.close()
        wait_until(server.idle, seconds=10)


def test_a_client_that_goes_away_while_its_body_comes(server):
    for _ in range(20):
        with connection(server) as client:
            client.sendall(
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )


def test_two_hundred_rapid_connections(server):
    before = server.connections()
    for number in range(200):
        with connection(server) as client:
            if number % 2:
                client.sendall(b"POST / HTTP/1.1\r\nHo")
    for _ in range(50):
        with connection(server, CHAT, ask()):
            pass
    wait_until(lambda: server.connections() <= before)


def test_what_is_not_http(server):
    for junk in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"a" * 200_000,
        b"\r\n" * 1000,
    ):
        with connection(server) as client, contextlib.suppress(OSError):
            client.sendall(junk)
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass


# --- overload


def test_an_overload_loses_no_request(server):
    most = server.engine.slots + server.engine.queue_size
    seen = []

    async def user(client, number):
        response = await client.post(CHAT, json=ask(f"我是第{number}位", max_tokens=20, stream=number % 2 == 0))
        seen.append(server.engine.in_flight)
        return response

    async def burst():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60, limits=limits) as client:
            return await asyncio.gather(*[user(client, number) for number in range(60)])

    with endless(server.engine.model, 0.005):
        responses = asyncio.run(burst())
    refused = [response for response in responses if response.status_code == 429]
    served = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(served) == 60
    assert len(served) >= most and max(seen) <= most and refused
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    for response in served:
        whole = response.text.endswith("data: [DONE]\n\n") if response.text.startswith("data") else response.json()
        assert whole


def test_prompts_being_prepared_count(server, monkeypatch):
    """Requests whose prompt is still being tokenized have a place, so no more than the queue holds are prepared."""
    fit = server.service._fit
    monkeypatch.setattr(server.service, "_fit", lambda *arguments: time.sleep(0.2) or fit(*arguments))
    with ThreadPoolExecutor(40) as users:
        statuses = list(users.map(lambda _: server.client.post(CHAT, json=ask(max_tokens=1)).status_code, range(40)))
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= server.engine.slots + server.engine.queue_size


def test_health_answers_while_all_slots_are_busy(server):
    with endless(server.engine.model), contextlib.ExitStack() as clients:
        for _ in range(server.engine.slots):
            clients.enter_context(connection(server, CHAT, ask(max_tokens=LONG, stream=True)))
        wait_until(lambda: server.engine.in_flight == server.engine.slots)
        delays = []
        for _ in range(20):
            start = time.perf_counter()
            assert server.client.get("/health").json()["status"] == "ready"
            delays.append(time.perf_counter() - start)
    assert sorted(delays)[10] < 0.5  # the lesson's server takes as long as the replies


# --- whatever else


@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_server_error(nano, examples):
    """Requests made from the OpenAPI schema, valid and not."""
    statuses = set()
    with nano_server(nano, context=160) as small, requests.Session() as session:  # short replies
        session.trust_env = False
        schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                @settings(
                    max_examples=examples if operation.method == "post" else 5,
                    derandomize=True,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def never_fails(case):
                    status = case.call(session=session, timeout=30).status_code
                    statuses.add((case.operation.path, status))
                    assert status < 500, case.as_curl_command()

                with contextlib.suppress(schemathesis.errors.SchemathesisError):  # nothing to get wrong in a GET
                    never_fails()
        assert small.engine.restarts == 0
    assert {("/", 200), ("/", 400), (CHAT, 200), (CHAT, 400), ("/v1/models", 200)} <= statuses


def test_many_requests_leave_nothing_behind(server):
    with ThreadPoolExecutor(8) as users:
        bodies = [ask(max_tokens=1, stream=number % 2 == 0, seed=number) for number in range(60)]
        statuses = list(users.map(lambda body: server.client.post(CHAT, json=body).status_code, bodies))
    assert set(statuses) == {200}
    wait_until(server.idle)
    wait_until(lambda: not exchanges_in_memory())


def exchanges_in_memory() -> int:
    gc.collect()
    return sum(type(thing) is Exchange for thing in gc.get_objects())
