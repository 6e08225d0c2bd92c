"""The web face of the demo: a Gradio page on one model, in this process (`launch`), or on a FastAPI app (`mount`)."""

import atexit
import socket
import threading
import time
from contextlib import AbstractContextManager, suppress

import fastapi.dependencies.models
import gradio as gr
import uvicorn
from fastapi import FastAPI

from ..characters.personas import MAX_FILE_BYTES
from ..errors import HelpersError
from ..model.loading import load
from ..network import DEFAULT_PORT, BehindProxy, address, check_proxy, is_loopback, listen
from .conversations import characters_with
from .web_chat import WebChat
from .web_view import HEAD, THEME


def mount(
    app: FastAPI, model, tokenizer, path="/demo", *, password=None, characters=None, language="zh", **generation
) -> FastAPI:
    """Put the page on `app`, before the app starts.

    Args:
        password: "USER:PASSWORD" to ask for, or None. Gradio compares it in constant time.
        language: "zh" or "en".
        characters, **generation: as of `Conversations`.

    Raises:
        HelpersError: an unknown language, no characters, a senseless parameter, or a password of another form.
    """
    page = WebChat(model, tokenizer, characters, language, **generation).view.blocks
    page.queue(default_concurrency_limit=None)  # pages wait without a thread; the model takes turns itself
    looks = {"theme": THEME, "head": HEAD, "footer_links": [], "ssr_mode": False, "show_error": False}
    limits = {"auth": _credentials(password), "max_file_size": MAX_FILE_BYTES}
    # run_history: Gradio would keep all that was said in the browser.
    return gr.mount_gradio_app(app, page, path, run_history=False, **looks, **limits)


class WebDemo(AbstractContextManager):
    """A running page, in a thread of this process. `url` is where; `stop`, or leaving a `with`, ends it."""

    def __init__(self, app: FastAPI, listener: socket.socket):
        self.url, self.port = address(listener), listener.getsockname()[1]
        self._server = _server(app)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="web demo", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread that is inside the tokenizer when the interpreter ends aborts the process
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.05)

    def stop(self) -> None:
        """End it, free the port, and let go of the model."""
        self._server.should_exit = True
        self._thread.join()
        atexit.unregister(self.stop)
        for cache in vars(fastapi.dependencies.models).values():  # they remember the handlers of apps that have ended
            if hasattr(cache, "cache_clear"):
                cache.cache_clear()

    def __exit__(self, *exception) -> None:
        self.stop()


def launch(
    model, tokenizer, *, host="127.0.0.1", port=DEFAULT_PORT, password=None, insecure=False, proxy=None, **options
) -> WebDemo:
    """Serve the page from this process, which goes on: a notebook's kernel keeps its model. `options` are for `mount`.

    A `host` that other machines can reach needs a `password`, or `insecure`. Port 0 takes any free one. `proxy` is the
    address at which browsers reach the page behind a proxy, which then is the only one that works.

    Raises:
        HelpersError: the host needs a password, the port is taken, or as `mount`.
    """
    check_password(host, password, insecure)
    app = mount(_app(proxy), model, tokenizer, "/", password=password, **options)
    return WebDemo(app, listen(host, port))


def serve(
    model,
    loading: dict,
    *,
    host: str,
    port: int,
    password: str | None,
    insecure: bool,
    proxy: str | None = None,
    **options,
) -> None:
    """`python -m helpers demo`: load a model (`loading`: see `helpers.load`) and serve the page until Ctrl-C."""
    check_password(host, password, insecure)
    app = _app(proxy)
    with listen(host, port) as listener:  # a taken port is said before the model is loaded, which may take a minute
        options["characters"] = characters_with(loading.get("adapter"))
        app = mount(app, *load(model, **loading), "/", password=password, **options)
        # In this thread, which so returns only when all is shut down: waiting for a `WebDemo` would not do, as in Python
        # 3.11 a `Thread.join` that Ctrl-C interrupts takes the thread for ended.
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after the end
            print(f"网页已启动，Ctrl-C 停止 [serving]：{proxy or address(listener)}", flush=True)
            _server(app).run([listener])


def _app(proxy: str | None) -> FastAPI:
    app = FastAPI(openapi_url=None)
    if proxy:
        app.add_middleware(BehindProxy, url=check_proxy(proxy))
    return app


def _server(app: FastAPI) -> uvicorn.Server:
    # "critical": an open page keeps a connection, whose end uvicorn would report as an error.
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))


def check_password(host: str, password: str | None, insecure: bool) -> None:
    """`HelpersError` if other machines could come in without a password, unless the user insists."""
    if not _credentials(password) and not insecure and not is_loopback(host):
        raise HelpersError(
            f"绑定 {host} 会让别的机器也能访问，需要密码 [password required]：加 --password USER:PASSWORD，或设环境变量 "
            "CHARACTERGLM_DEMO_PASSWORD；确实要对所有人开放就加 --insecure"
        )


def _credentials(password: str | None) -> tuple[str, str] | None:
    if not password:
        return None
    user, _, secret = password.partition(":")
    if not (user and secret):
        raise HelpersError("密码的写法是 USER:PASSWORD [malformed password]：两边都不能为空")
    return user, secret
