"""The web face of the demo: a Gradio page on one model, in this process (`launch`), or on a FastAPI app (`mount`).

A browser keeps an id, and the server its conversations, so that a reload and a second tab show the same ones. Every tab
has its own choice of the character. Replies go on when their page is closed; the model writes one at a time.
"""

import asyncio
import inspect
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import gradio as gr
import uvicorn
from fastapi import FastAPI

from ..characters.personas import MAX_FILE_BYTES, CharacterCard, as_session_meta
from ..chat.fitting import context_length
from ..chat.session import ChatSession
from ..errors import ChatError, HelpersError
from ..model.loading import load
from ..network import DEFAULT_PORT, is_loopback, listen
from .controls import DOUBLE_CLICK_SECONDS
from .conversations import Conversations, change_persona
from .files import exported_files
from .status import error_text
from .visitors import Visitor, Visitors, Writer
from .web_view import HEAD, THEME, WebView

GROWING_SECONDS = 0.1  # a growing reply is drawn this often
STREAM_SECONDS = 5.0  # how soon the server notices that a tab has been closed
PASSWORD_VARIABLE = "CHARACTERGLM_DEMO_PASSWORD"
HIDDEN = {"show_progress": "hidden", "api_visibility": "undocumented"}


@dataclass
class Tab:
    """One tab of a visitor's browser: which conversation it shows, and what the clock has drawn of it."""

    visitor: Visitor
    name: str
    drawn: tuple[Writer, int] | None = None
    followed: int = 0  # how many events are drawing a reply here
    undone: float = float("-inf")  # when

    @property
    def session(self) -> ChatSession:
        """The conversation it shows."""
        return self.visitor.conversations.sessions[self.name]


class WebChat:
    """What the components of the page do. `view.blocks` is the page.

    Args:
        characters: name to card; by default those of `data/characters.json`.
        language: "zh" or "en".
        **generation: defaults for all conversations, see `GenerationParameters`.
    """

    def __init__(self, model, tokenizer, characters: dict[str, CharacterCard] | None, language: str, **generation):
        if language not in ("zh", "en"):
            raise HelpersError(f"没有这种语言 [unknown language]：{language!r}，可选 zh、en")
        self.visitors = Visitors(lambda: Conversations(model, tokenizer, characters, **generation))
        names = Conversations(model, tokenizer, characters, **generation).names  # wrong arguments are refused here
        self.view = WebView(names, context_length(model), language)
        with self.view.blocks:
            self._connect()

    # --- drawing

    def _writer(self, tab: Tab) -> Writer:
        return self.visitors.writer(tab.visitor, tab.name)

    def _draw(self, tab: Tab) -> dict:
        writer = self._writer(tab)
        return {**self.view.conversation(writer), **self.view.error(writer.problem)}

    def _settings(self, tab: Tab) -> dict:
        return self.view.settings(tab.name, tab.visitor.conversations.names, tab.session)

    async def _follow(self, tab: Tab) -> AsyncIterator[dict]:
        """Draw a reply while it grows, for as long as the tab shows it."""
        writer = self._writer(tab)
        tab.followed += 1
        try:
            while writer.draft is not None and self._writer(tab) is writer:
                yield self.view.growing(writer)
                await asyncio.sleep(GROWING_SECONDS)
            yield self._draw(tab)
        finally:
            tab.followed -= 1

    # --- what the reader does; each takes the tab first and yields or returns what changes on the page

    async def _open(self, key: str) -> AsyncIterator[dict]:
        key, visitor = self.visitors.get(key)
        tab = Tab(visitor, visitor.conversations.name)
        known = {self.view.visitor: key, self.view.tab: tab, self.view.clock: gr.Timer(active=True)}
        yield {**known, **self._settings(tab), **self._draw(tab)}
        async for changes in self._follow(tab):
            yield changes

    async def _send(self, tab: Tab, text: str) -> AsyncIterator[dict]:
        if not text.strip():  # the second click of two
            yield gr.skip()
            return
        self._writer(tab).send(text)
        yield {self.view.box: "", **self._draw(tab)}
        async for changes in self._follow(tab):
            yield changes

    async def _regenerate(self, tab: Tab) -> AsyncIterator[dict]:
        self._writer(tab).regenerate()
        yield self._draw(tab)
        async for changes in self._follow(tab):
            yield changes

    def _restore(self, tab: Tab, text: str) -> dict:
        """Put what could not be answered back into the box, unless something new is written there."""
        writer = self._writer(tab)
        unsent, writer.unsent = writer.unsent, ""
        return {self.view.box: text or unsent} if unsent else {}

    async def _pick(self, tab: Tab, name: str) -> AsyncIterator[dict]:
        tab.visitor.conversations.show(name)
        tab.name = name
        yield {**self._settings(tab), **self._draw(tab)}
        async for changes in self._follow(tab):
            yield changes

    def _tick(self, tab: Tab) -> dict:
        """Draw what was said in another tab.

        What this tab did itself is drawn once more: events overtake each other on their way to the browser, and of
        what arrives, an older state of the conversation must not be the last.
        """
        writer = self._writer(tab)
        if tab.followed or tab.drawn == (writer, writer.changes):
            return {}
        tab.drawn = (writer, writer.changes)
        return self.view.conversation(writer)

    def _stop(self, tab: Tab) -> dict:
        tab.session.stop()
        return {}

    def _swipe(self, tab: Tab, step: int) -> dict:
        tab.session.swipe(step)
        return self._changed(tab)

    def _undo(self, tab: Tab, text: str) -> dict:
        before, tab.undone = tab.undone, time.monotonic()
        if tab.undone - before < DOUBLE_CLICK_SECONDS:
            return {}
        query = tab.session.undo()
        return {self.view.box: text or query, **self._changed(tab)}

    def _edit(self, tab: Tab) -> dict:
        if not tab.session.history:
            raise ChatError("还没有可以编辑的对话 [nothing to edit]")
        return self.view.editing(tab.session)

    def _save(self, tab: Tab, query: str, response: str) -> dict:
        greeting = not tab.session.history or not tab.session.history[-1][0]
        tab.session.edit(None if greeting else query, response)
        return {self.view.editor: gr.update(visible=False), **self._changed(tab)}

    def _clear(self, tab: Tab) -> dict:
        tab.session.clear()
        return self._changed(tab)

    def _apply(self, tab: Tab, *fields: str) -> dict:
        source = getattr(tab.session.session_meta, "source", "original")
        change_persona(tab.session, as_session_meta(self.view.card(fields, source)))
        return {**self._settings(tab), **self._changed(tab)}

    def _set(self, name: str, tab: Tab, value: float) -> dict:
        tab.session.set_generation(**{name: value})
        return self._changed(tab)

    def _export(self, tab: Tab) -> dict:
        return self.view.files(exported_files(tab.session))

    def _import(self, tab: Tab, content: bytes) -> dict:
        tab.name = tab.visitor.conversations.open(content)
        return {**self._settings(tab), **self._changed(tab)}

    def _changed(self, tab: Tab) -> dict:
        """Draw the conversation, here and in the other tabs."""
        writer = self._writer(tab)
        writer.changes, writer.problem = writer.changes + 1, ""
        return self._draw(tab)

    # --- from the components to what they do

    def _connect(self) -> None:
        view = self.view
        self._everything = [
            component for component in view.blocks.blocks.values() if isinstance(component, gr.Component)
        ]
        self._everything.append(view.editor)
        view.blocks.load(self._steps(self._open), [view.visitor], self._everything, api_name="open", **HIDDEN)
        view.blocks.load(_hold_stream, None, None, api_name="stream", **HIDDEN)
        sent = gr.on([view.box.submit, view.send.click], **self._event(self._send, view.box))
        again = gr.on([view.regenerate.click], **self._event(self._regenerate))
        for event in (sent, again):
            event.then(**self._event(self._restore, view.box))
        # "multiple": the last pick may still be following a reply.
        view.picker.input(**self._event(self._pick, view.picker) | {"trigger_mode": "multiple"})
        view.stop.click(**self._event(self._stop))
        view.undo.click(**self._event(self._undo, view.box))
        view.edit.click(**self._event(self._edit))
        view.save.click(**self._event(self._save, view.query, view.response))
        view.cancel.click(lambda: gr.update(visible=False), None, view.editor, api_visibility="private")
        view.clear.click(**self._event(self._clear))
        view.apply.click(**self._event(self._apply, *view.persona))
        view.export.click(**self._event(self._export))
        view.upload.upload(**self._event(self._import, view.upload))
        for button, step in ((view.previous, -1), (view.next, 1)):
            button.click(**self._event(partial(self._swipe, step=step)) | {"api_name": button.elem_id})
        for name, slider in view.sliders.items():
            event = self._event(partial(self._set, name), slider)
            slider.input(**event | {"api_name": name, "trigger_mode": "always_last"})
        view.clock.tick(**self._event(self._tick) | {"queue": False})

    def _event(self, action: Callable, *inputs: gr.Component) -> dict:
        """Arguments for a Gradio event: `action` with the tab and the values of `inputs`."""
        steps = inspect.isasyncgenfunction(action)
        return {
            "fn": self._steps(action) if steps else self._once(action),
            "inputs": [self.view.tab, *inputs],
            "outputs": self._everything,
            "api_name": getattr(action, "__name__", "").strip("_") or None,
            "trigger_mode": "once",  # not again while it runs
            **HIDDEN,
        }

    def _once(self, action: Callable) -> Callable:
        """`action`, but an error becomes a line on the page."""

        def act(tab, *values):
            try:
                _require_open(tab)
                return action(tab, *values) or gr.skip()
            except Exception as error:
                return self.view.error(error_text(error))

        return act

    def _steps(self, action: Callable) -> Callable:
        """The same for an action of several steps."""

        async def act(tab, *values):
            try:
                _require_open(tab)
                async for changes in action(tab, *values):
                    yield changes
            except Exception as error:
                yield self.view.error(error_text(error))

        return act


async def _hold_stream() -> AsyncIterator[None]:
    """An event of each tab that never ends, and so keeps the stream open on which answers come to the browser.

    Gradio closes the stream with the last event under way. What is clicked in that moment was never answered, and its
    button stayed dead.
    """
    while True:
        yield
        await asyncio.sleep(STREAM_SECONDS)


def _require_open(tab) -> None:
    if tab is None:
        raise ChatError("服务器重启过，这个页面过期了 [page expired]：请刷新页面")


def build(
    model, tokenizer, *, characters: dict[str, CharacterCard] | None = None, language: str = "zh", **generation
) -> gr.Blocks:
    """The page, for `mount_gradio_app` or `launch` of Gradio, which then want `theme=THEME, head=HEAD`.

    Args:
        characters: name to card; by default those of `data/characters.json`.
        language: "zh" or "en".
        **generation: defaults for all conversations, see `GenerationParameters`.

    Raises:
        HelpersError: an unknown language, no characters, or a senseless parameter.
    """
    blocks = WebChat(model, tokenizer, characters, language, **generation).view.blocks
    return blocks.queue(default_concurrency_limit=None)  # pages wait without a thread; the model takes turns itself


def mount(app: FastAPI, model, tokenizer, path: str = "/demo", *, password: str | None = None, **options) -> FastAPI:
    """Put the page on `app`, before the app starts.

    Args:
        password: "USER:PASSWORD" to ask for, or None. Gradio compares it in constant time.
        **options: for `build`.

    Raises:
        HelpersError: as `build`, or the password is not of this form.
    """
    return gr.mount_gradio_app(
        app,
        build(model, tokenizer, **options),
        path,
        auth=credentials(password),
        theme=THEME,
        head=HEAD,
        footer_links=[],
        run_history=False,  # Gradio would keep all that was said in the browser
        ssr_mode=False,
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
    )


def credentials(password: str | None) -> tuple[str, str] | None:
    """User and password of "USER:PASSWORD"; None for None or an empty text."""
    user, colon, secret = (password or "").partition(":")
    if password and not (user and secret):
        raise HelpersError("密码的写法是 USER:PASSWORD [malformed password]：两边都不能为空")
    return (user, secret) if colon else None


class WebDemo:
    """A running page, in a thread of this process. `url` is where; `stop` ends it."""

    def __init__(self, app: FastAPI, listener: socket.socket):
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        # "critical": an open page keeps a connection, whose end at `stop` uvicorn would report as an error.
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="web demo", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.05)

    def wait(self) -> None:
        """Return when it has ended; Ctrl-C ends it."""
        try:
            while self._thread.is_alive():
                self._thread.join(1)
        except KeyboardInterrupt:
            self.stop()

    def stop(self) -> None:
        """End it, and free the port."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> "WebDemo":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()


def launch(
    model,
    tokenizer,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    password: str | None = None,
    insecure: bool = False,
    **options,
) -> WebDemo:
    """Serve the page from this process, which goes on: a notebook's kernel keeps its model.

    Args:
        host: other machines can reach only a page that is not bound to 127.0.0.1; that needs a `password`, or
            `insecure`.
        port: 0 takes any free one.
        **options: for `build`.

    Raises:
        HelpersError: the host needs a password, the port is taken, or as `mount`.
    """
    require_password(host, password, insecure)
    app = mount(FastAPI(openapi_url=None), model, tokenizer, "/", password=password, **options)
    return WebDemo(app, listen(host, port))


def serve(
    model="auto", loading: dict | None = None, *, host: str, port: int, password: str | None, insecure: bool, **options
) -> None:
    """`python -m helpers demo`: load a model and serve the page until Ctrl-C.

    Args:
        model, loading: see `load`, and its further arguments: adapter, quantization, compile.
        host, port, password, insecure, **options: see `launch`.
    """
    require_password(host, password, insecure)
    listen(host, port).close()  # a taken port is said before the model is loaded, which may take a minute
    demo = launch(*load(model, **loading or {}), host=host, port=port, password=password, insecure=insecure, **options)
    print(f"网页已启动，Ctrl-C 停止 [serving]：{demo.url}", flush=True)
    demo.wait()


def require_password(host: str, password: str | None, insecure: bool) -> None:
    """Refuse to let other machines in without a password, unless the user insists."""
    if credentials(password) is None and not insecure and not is_loopback(host):
        raise HelpersError(
            f"绑定 {host} 会让别的机器也能访问，需要密码 [password required]：加 --password USER:PASSWORD，或设环境变量 "
            f"{PASSWORD_VARIABLE}；确实要对所有人开放就加 --insecure"
        )
