"""API and page behind a reverse proxy that ends TLS, rewrites `Host` and takes a prefix off the path, as nginx can."""

import asyncio
import re
import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from gradio_client import Client
from live_server import LiveServer

import helpers
from helpers.demo.web import launch, mount
from helpers.errors import HelpersError
from helpers.network import BehindProxy, check_proxy, listen
from helpers.serving import create_app
from helpers.serving.server import print_addresses

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@contextmanager
def proxy_to(upstream, listener, prefix):
    """Passes what comes for `prefix` on to `upstream()`, with the Host of the inner server and no word of its own."""
    outside, client = FastAPI(openapi_url=None), httpx.AsyncClient(timeout=60, trust_env=False)

    @outside.api_route(prefix + "/{path:path}", methods=["GET", "POST"])
    async def forward(path: str, request: Request):
        headers = [(name, value) for name, value in request.headers.raw if name != b"host"]
        url = httpx.URL(f"{upstream()}/{path}", query=request.url.query.encode())
        asked = client.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await client.send(asked, stream=True)
        headers = {name: value for name, value in answer.headers.items() if name != "transfer-encoding"}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, headers=headers)

    server = uvicorn.Server(uvicorn.Config(outside, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("prefix", ["", "/role/play"])
def test_page_with_a_password(nano, prefix):
    listener = listen("127.0.0.1", 0)
    public = f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}"
    demo = launch(*nano, port=0, password="reader:secret", proxy=public, **GREEDY)
    with demo, proxy_to(lambda: demo.url, listener, prefix) as url:
        client = Client(url, verbose=False, auth=("reader", "secret"))
        assert client.config["root"].startswith(url)
        assert client.predict("", api_name="/open")
        client.close()


def test_api_and_page_side_by_side(nano):
    listener = listen("127.0.0.1", 0)
    public = f"http://127.0.0.1:{listener.getsockname()[1]}/role"
    both = mount(create_app(nano, api_key="k", proxy=public), *nano, **GREEDY)
    with LiveServer(both) as server, proxy_to(lambda: server.url, listener, "/role") as url:
        asked = {"prompt": "你好", "max_length": 200}
        answer = httpx.post(f"{url}/", json=asked, headers={"Authorization": "Bearer k"}, timeout=60, trust_env=False)
        assert answer.json()["status"] == 200
        home = httpx.get(f"{url}/", headers={"Accept": "text/html,*/*"}, trust_env=False)
        assert home.status_code == 200, "no key is needed to find the way"
        for link in re.findall('href="([^"]+)"', home.text):
            found = httpx.get(f"{url}/{link}", trust_env=False)
            assert found.status_code == 200, link
        assert "/role/openapi.json" in httpx.get(f"{url}/docs", trust_env=False).text
        moved = httpx.get(f"{url}/demo", trust_env=False)
        assert moved.headers["location"] == f"{url}/demo/"


def test_home_is_for_browsers_only(nano):
    with LiveServer(create_app(nano)) as server:
        assert httpx.get(server.url, trust_env=False).status_code == 405
        assert httpx.get(server.url, headers={"Accept": "text/html"}, trust_env=False).text.count("<li>") == 2


@pytest.mark.parametrize("told", [b"evil.example", b"127.0.0.1"])
def test_no_header_of_a_stranger_is_believed(told):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    headers = [(b"host", told), (b"x-forwarded-host", told), (b"x-forwarded-proto", b"http"), (b"accept", b"*/*")]
    scope = {"type": "http", "path": "/v1/models", "headers": headers, "scheme": "http"}
    asyncio.run(BehindProxy(app, "https://my.site:8443/role/")(scope, None, None))
    assert seen[0]["headers"] == [(b"host", b"my.site:8443"), (b"accept", b"*/*")]
    assert (seen[0]["scheme"], seen[0]["path"], seen[0]["root_path"]) == ("https", "/role/v1/models", "/role")


@pytest.mark.parametrize("url", ["my.site", "ftp://my.site", "https://", "https://me:pw@my.site", "https://a b", ""])
def test_malformed_address(url):
    with pytest.raises(HelpersError, match=r"\[malformed proxy address\]"):
        check_proxy(url)


def test_serve_prints_where_it_is(capsys):
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        print_addresses(listener, None, page=True)
        print_addresses(listener, "https://my.site/role/", page=False)
    here, page, outside = capsys.readouterr().out.splitlines()
    assert f"http://127.0.0.1:{port}/docs" in here and f"http://127.0.0.1:{port}/demo/" in page
    assert "https://my.site/role/docs" in outside
