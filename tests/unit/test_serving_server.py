"""`python -m helpers serve` and `Server` as processes of their own: starting, refusing to start, and ending."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import httpx
import pytest
from live_server import LiveServer, ask, wait_until

import helpers
from helpers.errors import CheckpointError, HelpersError
from helpers.network import free_port, listen
from helpers.serving import Server, serve, service
from helpers.serving.app import create_app
from helpers.serving.server import check_key

# Nano's own replies are short. At this temperature it babbles; with this seed, for all of the tokens.
BABBLE = {"temperature": 10, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 1, "stream": True}
KEY = "sk-it-is-a-secret"


def start(log_file, **options) -> Server:
    return Server("nano", log_file=log_file, port=free_port(20000 + os.getpid() % 20000), **options)


def stream(server, max_tokens, **options):
    """A streamed reply that has begun; an iterator over its lines."""
    url, body = f"{server.url}/v1/chat/completions", ask(**{**BABBLE, "max_tokens": max_tokens})
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", url, json=body, **options) as answer,
    ):
        assert answer.status_code == 200
        yield from answer.iter_lines()


def refused_new_connections(port) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def gone(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# --- refusing to start


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.com"])
def test_other_machines_need_a_key(host):
    with pytest.raises(HelpersError, match="api key required"):
        serve("nano", host=host)
    with pytest.raises(HelpersError, match="api key required"):
        serve("nano", host=host, api_key="")
    check_key(host, None, insecure=True)
    check_key(host, KEY, insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_needs_none(host):
    check_key(host, None, insecure=False)


@pytest.mark.parametrize("key", ["密钥", " sk", "a\nb", "\udcff"])
def test_a_key_that_no_header_can_hold(key):
    with pytest.raises(HelpersError, match="invalid api key"):
        serve("nano", api_key=key)


def test_port_in_use(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(HelpersError, match=rf"{port}.*\[port in use\].*例如 \d+"):
            serve("nano", port=port)
        assert Server("nano", port=port, log_file=tmp_path / "log").port > port
        assert f"端口 {port} 已被占用 [port in use]" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine(host):
    with pytest.raises(HelpersError, match=r"\[cannot bind\]"):
        listen(host, 0)


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(CheckpointError):
        serve(tmp_path, port=free_port(30000))


@pytest.mark.slow
def test_what_only_shows_when_loading(tmp_path):
    server = start(tmp_path / "log", options=["--adapter", f"mine={tmp_path}"])
    with pytest.raises(HelpersError, match=r"(?s)server did not start.*not an adapter directory"):
        server.start(60)
    assert server.process.returncode == 1
    assert "错误 [error]：模型没有加载成功 [cannot load the model]" in (tmp_path / "log").read_text()
    assert refused_new_connections(server.port)


# --- running and ending


def test_health_while_loading(monkeypatch):
    def slowly(source):
        time.sleep(1)
        return helpers.load(source)

    monkeypatch.setattr(service, "load", slowly)  # a slow disk
    server = LiveServer(create_app("nano"))
    server.thread.start()
    url = f"http://127.0.0.1:{server.listener.getsockname()[1]}"
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "loading")
        early = client.post("/", json={"prompt": "你好"})
        assert early.status_code == 503 and "[loading]" in early.json()["error"]["message"]
        assert client.get("/v1/models").status_code == client.get("/docs").status_code == 200
        wait_until(lambda: client.get("/health").json()["status"] == "ready")
        assert client.post("/", json={"prompt": "你好"}).status_code == 200
    server.server.should_exit = True
    server.thread.join(timeout=60)
    assert not server.thread.is_alive()


def test_a_server_and_its_end(tmp_path, monkeypatch):
    """SIGTERM lets the running reply finish and takes no new one; the key stays out of the log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with start(tmp_path / "log", api_key=KEY) as server:
        assert httpx.get(f"{server.url}/v1/models", trust_env=False).status_code == 401
        lines = stream(server, 200, headers={"Authorization": f"Bearer {KEY}"})
        for _ in range(6):
            next(lines)
        server.process.terminate()
        wait_until(lambda: refused_new_connections(server.port))
        assert server.process.poll() is None
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=60) == -signal.SIGTERM
    assert server.health() == "down"
    log = (tmp_path / "log").read_text()
    assert KEY not in log
    written = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"ready", "request"} <= {entry["message"] for entry in written}
    assert [entry["new_tokens"] for entry in written if entry["message"] == "request"] == [200]


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals, options", [([signal.SIGTERM], ["--grace-seconds", 1]), ([signal.SIGINT, signal.SIGINT], [])]
)
def test_a_reply_that_takes_too_long_is_cut(tmp_path, signals, options):
    """After the grace time, and at a second Ctrl-C at once."""
    with start(tmp_path / "log", options=options) as server:
        lines = stream(server, 3000)
        next(lines)
        for number in signals:
            server.process.send_signal(number)
            time.sleep(0.3)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        server.process.wait(timeout=60)
    assert server.process.returncode


@pytest.mark.slow
def test_sigterm_while_loading(tmp_path):
    code = """
        import sys, time
        from helpers.serving import service, serve
        service.load = lambda source: time.sleep(60)  # a slow disk
        serve("nano", port=int(sys.argv[1]))
    """
    port = free_port(31000)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(port)], stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: not refused_new_connections(port), seconds=60)
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()["status"] == "loading"
        process.terminate()
        assert process.wait(timeout=30)


@pytest.mark.slow
def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    code = """
        import sys, time
        from helpers.serving import Server
        server = Server("nano", log_file=sys.argv[1]).start()
        print(server.process.pid, flush=True)
        time.sleep(100)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        # the line before says that a port is taken, if it is
        pid = int(parent.stdout.readline().split()[-1])
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid), seconds=60)


SCRIPT = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "ready"}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def test_a_cell_run_again_replaces_its_server(tmp_path, capsys):
    (tmp_path / "own.py").write_text(SCRIPT)
    port = free_port(20000 + os.getpid() % 20000)
    before = Server("nano", script=tmp_path / "own.py", port=port, log_file=tmp_path / "log").start()
    after = Server("nano", script=tmp_path / "own.py", port=port, log_file=tmp_path / "log").start()
    assert gone(before.process.pid) or before.process.returncode is not None
    assert (before.url, after.health()) == (after.url, "ready")
    after.stop()
    assert "port in use" not in capsys.readouterr().out


def test_a_script_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    server = Server("nano", script=tmp_path / "own.py", port=free_port(21000), log_file=tmp_path / "log").start()
    server.process.stdin.close()  # as when the notebook's process is gone
    assert server.process.wait(timeout=20)
