"""Running the API: in this process (`serve`), or in a process of its own for as long as a notebook needs it (`Server`)."""

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.json import JsonFormatter

from ..errors import HelpersError
from ..model.loading import load
from ..network import DEFAULT_PORT, address, free_port, is_loopback, listen
from ..paths import PROJECT_DIR
from .app import create_app

API_KEY_VARIABLE = "CHARACTERGLM_API_KEY"
SEND_SECONDS = 30.0  # how long a client may leave what is sent to it unread
# A script of the reader's own, run as `python SCRIPT MODEL PORT`, but it ends when its notebook is gone, however that ended.
RUN_SCRIPT = """
import os, runpy, signal, sys, threading
def end_with_notebook():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end_with_notebook, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def serve(
    model="auto",
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    api_key: str | None = None,
    insecure: bool = False,
    grace_seconds: int = 30,
    threads: int | None = None,
    until_stdin_closes: bool = False,
    cluster: dict | None = None,
    add_page: Callable[[FastAPI, tuple], object] | None = None,
    **app_options,
) -> None:
    """Serve what `create_app` makes until SIGTERM or Ctrl-C; replies may then take `grace_seconds` to end.

    Args:
        host: other machines reach only one that is not 127.0.0.1; that needs an `api_key`, or `insecure`.
        threads: for torch on a CPU; by default one core is left for the network, or tokens would wait for each other.
        cluster: for `serve_replicas`: several copies of the model then serve, on Ray.
        add_page: called with the app and (model, tokenizer): a web page on the same model.
        until_stdin_closes: also end when the process that started this one is gone.

    Raises:
        HelpersError: the host needs a key, the port is taken, Ray is missing, or the model cannot be loaded.
    """
    app_options["api_key"] = api_key = api_key or None  # an empty one would let everybody in
    check_key(host, api_key, insecure)
    if until_stdin_closes:
        threading.Thread(target=lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    if cluster is None:
        return serve_here(model, host, port, grace_seconds, threads or default_threads(), add_page, app_options)
    if add_page is not None:
        raise HelpersError(
            "网页要用这个进程里的模型，不能和 --replicas 一起用 [page needs one model]：另开 python -m helpers demo"
        )
    from .replicas import Replicas, serve_replicas

    return serve_replicas(model, host, port, grace_seconds, app_options, Replicas(**cluster, threads=threads))


def serve_here(model, host: str, port: int, grace_seconds: int, threads: int, add_page, app_options: dict) -> None:
    """Serve one model in this process."""
    listener = open_listener(host, port)
    torch.set_num_threads(threads)
    log_as_json()
    if add_page is not None:
        model = load(model)  # before the server answers
    app = create_app(model, on_failure=lambda: setattr(server, "should_exit", True), **app_options)
    if add_page is not None:
        add_page(app, model)
    print_addresses(listener, app_options.get("proxy"), page=add_page is not None)
    server = uvicorn.Server(uvicorn_config(app, grace_seconds))
    server.run(sockets=[listener])
    if app.state.service.failure is not None:
        raise HelpersError(f"模型没有加载成功 [cannot load the model]：{app.state.service.failure}")


def print_addresses(listener: socket.socket, proxy: str | None, page: bool) -> None:
    """Say where to go, beside the log, which is for programs."""
    url = proxy.rstrip("/") if proxy else address(listener)
    print(f"服务 [serving]：{url}，Ctrl-C 停止；说明 [docs]：{url}/docs", flush=True)
    if page:
        print(f"聊天网页 [chat page]：{url}/demo/", flush=True)


def uvicorn_config(app, grace_seconds: int) -> uvicorn.Config:
    """The same event loop and parser whether or not faster ones are installed, as Ray does: these are tested."""
    options = {"access_log": False, "log_config": None, "loop": "asyncio", "http": "h11"}
    return uvicorn.Config(app, timeout_graceful_shutdown=grace_seconds, **options)


def default_threads() -> int:
    """Threads for torch on a CPU: one core is left for the network and for the clients on the same machine."""
    return max(1, (os.cpu_count() or 1) - 1)


def open_listener(host: str, port: int) -> socket.socket:
    """As `listen`; on Linux, the connection of a client that reads nothing for `SEND_SECONDS` is reset."""
    listener = listen(host, port)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_SECONDS * 1000))
    return listener


def check_key(host: str, api_key: str | None, insecure: bool) -> None:
    """Let nobody from other machines in without a key, unless the user insists; and take no key that cannot be sent."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise HelpersError("API key 只能用可打印的 ASCII 字符，首尾不能有空格 [invalid api key]：HTTP 头里放不下别的")
    if api_key is None and not insecure and not is_loopback(host):
        raise HelpersError(
            f"绑定 {host} 会让别的机器也能访问，需要 API key [api key required]：加 --api-key，或设环境变量 "
            f"{API_KEY_VARIABLE}；确实要对所有人开放就加 --insecure"
        )


def log_as_json() -> None:
    """Everything that is logged, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", json_ensure_ascii=False))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "uvicorn.error", "ContinuousBatchingLogger"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Server:
    """An API in a process of its own, for a notebook: `start`, use `url`, `stop`. It ends with this process at the latest.

    One at a time for each `port` asked for: the one before is stopped first, so that a cell can be run again.

    Args:
        model: "auto", "nano", "6b" or a directory.
        port: the one to use, or the next free one after it.
        script: a server of your own, run as `python SCRIPT MODEL PORT`; it has to answer `GET /health` with
            `{"status": "ready"}`. Without it, `python -m helpers serve`.
        api_key: handed over in the environment, not on the command line, where other users of the machine could see it.
        log_file: where the server's log goes.
        options: more command-line options, as in `python -m helpers serve --help`.
    """

    _by_port: ClassVar[dict[int, "Server"]] = {}

    def __init__(
        self, model="auto", *, log_file, port: int = DEFAULT_PORT, script=None, api_key: str | None = None, options=()
    ):
        self.process: subprocess.Popen | None = None
        if port in self._by_port:
            self._by_port[port].stop()
        self._by_port[port] = self
        self.port = free_port(port)
        if self.port != port:
            print(f"端口 {port} 已被占用 [port in use]，改用 {self.port}")
        self.url, self.log_file = f"http://127.0.0.1:{self.port}", log_file
        python_path = os.pathsep.join(filter(None, [str(PROJECT_DIR), os.environ.get("PYTHONPATH")]))
        # A script gets as many threads as `serve` takes.
        self.environment = {"OMP_NUM_THREADS": str(default_threads()), **os.environ, "PYTHONPATH": python_path}
        self.environment |= {"PYTHONIOENCODING": "utf-8", API_KEY_VARIABLE: api_key or ""}
        own = ["-m", "helpers", "serve", "--model", model, "--port", self.port, "--until-stdin-closes"]
        arguments = own if script is None else ["-c", RUN_SCRIPT, script, model, self.port]
        self.command = [sys.executable, *map(str, [*arguments, *options])]

    def start(self, seconds: float = 300) -> "Server":
        """Start the process and wait until the model is loaded.

        Raises:
            HelpersError: it ended, or was not ready in time; with the end of its log. The process is then stopped.
        """
        with open(self.log_file, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        atexit.register(self.stop)
        deadline, ready = time.monotonic() + seconds, False
        try:
            while not ready and time.monotonic() < deadline and self.process.poll() is None:
                time.sleep(0.2)
                ready = self.health() == "ready"
        finally:  # also if the cell was interrupted
            if not ready:
                self.stop()
        if not ready:
            with open(self.log_file, encoding="utf-8", errors="replace") as log:
                raise HelpersError(f"服务没有启动 [server did not start]：日志的最后几行是\n{log.read()[-2000:]}")
        return self

    def health(self) -> str:
        """ "ready", "loading", "dead", or "down" if nobody answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).json()["status"]
        except (httpx.HTTPError, ValueError, KeyError):
            return "down"

    def stop(self) -> None:
        """End the process; replies being written are finished first."""
        if self.process is None:
            return
        self.process.terminate()  # does nothing if it has ended
        try:
            self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *exception) -> None:
        self.stop()
