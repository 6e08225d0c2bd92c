"""What the components of the web page do.

A browser keeps an id, and the server its conversations, so that a reload and a second tab show the same ones. Every tab
has its own choice of the character. Replies go on when their page is closed; the model writes one at a time.
"""

import asyncio
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

import gradio as gr

from ..chat.fitting import context_length
from ..chat.reply import Reply
from ..chat.session import ChatSession
from ..errors import BusyError, ChatError, HelpersError
from .bubbles import download_links
from .conversations import Conversations, change_persona, edit_last
from .files import exported_files
from .texts import DOUBLE_CLICK_SECONDS, error_text
from .web_view import WebView

GROWING_SECONDS = 0.1  # a growing reply is drawn this often
STREAM_SECONDS = 5.0  # how soon the server notices that a tab has been closed
MAX_VISITORS = 500  # the least recently seen is forgotten
MAX_CACHES = 8  # conversations that keep their KV cache: that of a 6B conversation of 2,000 tokens takes 57 MB
HIDDEN = {"show_progress": "hidden", "api_visibility": "undocumented"}


@dataclass
class Tab:
    """One tab of a browser: which of its conversations it shows, and what the clock has drawn of it."""

    conversations: Conversations
    name: str
    drawn: object = None
    followed: int = 0  # how many events are drawing a reply here
    undone: float = float("-inf")  # when
    sent: tuple[str, Reply] | None = None  # what was said last, until `_restore` has looked at it

    @property
    def session(self) -> ChatSession:
        return self.conversations.sessions[self.name]


class Visitors:
    """Finds a browser's conversations again by the id it keeps; `make` makes those of a new one."""

    def __init__(self, make: Callable[[], Conversations]):
        self.make = make
        self._visitors: OrderedDict[str, Conversations] = OrderedDict()  # least recently seen first
        self._cached: OrderedDict[ChatSession, None] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[str, Conversations]:
        """The conversations of this id; for an unknown one new ones and a new id, as nobody may choose their own."""
        with self._lock:
            if key not in self._visitors:
                key = secrets.token_urlsafe(16)
                self._visitors[key] = self.make()
            self._visitors.move_to_end(key)
            if len(self._visitors) > MAX_VISITORS:
                self._visitors.popitem(last=False)
            return key, self._visitors[key]

    def keep_cache(self, session: ChatSession) -> None:
        """Called with a session that writes: the ones used last keep their KV cache, the others give it back."""
        with self._lock:
            self._cached[session] = None
            self._cached.move_to_end(session)
            for oldest in list(self._cached)[:-MAX_CACHES]:
                with suppress(BusyError):  # then it stays, until the next reply of somebody
                    oldest.free_cache()
                    del self._cached[oldest]


class WebChat:
    """The page (`view.blocks`), connected. Arguments as of `mount`."""

    def __init__(self, model, tokenizer, characters, language: str, **generation):
        if language not in ("zh", "en"):
            raise HelpersError(f"没有这种语言 [unknown language]：{language!r}，可选 zh、en")
        self.visitors = Visitors(lambda: Conversations(model, tokenizer, characters, **generation))
        names = self.visitors.make().names  # wrong arguments are refused here
        self.view = WebView(names, context_length(model), language)
        with self.view.blocks:
            self._connect()

    # --- drawing

    def _draw(self, tab: Tab) -> dict:
        problem = tab.session.error
        return {**self.view.conversation(tab.session), **self.view.error(error_text(problem) if problem else "")}

    def _draw_all(self, tab: Tab) -> dict:
        return {**self.view.settings(tab.name, tab.conversations.names, tab.session), **self._draw(tab)}

    async def _follow(self, tab: Tab) -> AsyncIterator[dict]:
        """Draw a reply while it grows, for as long as the tab shows it."""
        session = tab.session
        tab.followed += 1
        try:
            while (draft := session.draft) is not None and tab.session is session:
                yield self.view.growing(session, draft)
                await asyncio.sleep(GROWING_SECONDS)
            yield self._draw(tab)
        finally:
            tab.followed -= 1

    # --- what the reader does; each takes the tab first and returns what changes on the page, or None to draw it again

    async def _open(self, key: str) -> AsyncIterator[dict]:
        key, conversations = self.visitors.get(key)
        tab = Tab(conversations, conversations.name)
        known = {self.view.visitor: key, self.view.tab: tab, self.view.clock: gr.Timer(active=True)}
        yield {**known, **self._draw_all(tab)}
        async for changes in self._follow(tab):
            yield changes

    def _send(self, tab: Tab, text: str) -> dict:
        if not text.strip():  # the second click of two
            return gr.skip()
        tab.sent = text, tab.session.begin(text)
        self.visitors.keep_cache(tab.session)
        return {self.view.box: "", **self._draw(tab)}

    def _restore(self, tab: Tab, text: str) -> dict:
        """Put what could not be answered back into the box, unless something new is written there."""
        (unsent, reply), tab.sent = tab.sent or ("", None), None
        return {self.view.box: text or unsent} if reply and reply.error else gr.skip()

    def _regenerate(self, tab: Tab) -> None:
        tab.session.begin_again()
        self.visitors.keep_cache(tab.session)

    def _pick(self, tab: Tab, name: str) -> dict:
        tab.conversations.show(name)
        tab.name = name
        return self._draw_all(tab)

    def _tick(self, tab: Tab) -> dict:
        """Draw what was said in another tab."""
        # What this tab did itself is drawn once more: events overtake each other on their way to the browser, and of
        # what arrives, an older state of the conversation must not be the last.
        state = (tab.name, tab.session.draft, tab.session.export())
        if tab.followed or tab.drawn == state:
            return gr.skip()
        tab.drawn = state
        return self.view.conversation(tab.session)

    def _undo(self, tab: Tab, text: str) -> dict:
        before, tab.undone = tab.undone, time.monotonic()
        if tab.undone - before < DOUBLE_CLICK_SECONDS:
            return gr.skip()
        query = tab.session.undo()
        return {self.view.box: text or query, **self._draw(tab)}

    def _edit(self, tab: Tab) -> dict:
        tab.session.edit()  # changes nothing, but refuses if there is nothing to edit
        return self.view.editing(*tab.session.history[-1])

    def _save(self, tab: Tab, query: str, response: str) -> dict:
        edit_last(tab.session, query, response)
        return {self.view.editor: gr.update(visible=False), **self._draw(tab)}

    def _apply(self, tab: Tab, *fields: str) -> dict:
        change_persona(tab.session, dict(tab.session.session_meta) | dict(zip(self.view.persona, fields)))
        return self._draw_all(tab)

    def _export(self, tab: Tab) -> dict:
        return {self.view.links: download_links(exported_files(tab.session))}

    def _import(self, tab: Tab, content: bytes) -> dict:
        tab.name = tab.conversations.open(content)
        return self._draw_all(tab)

    # --- from the components to what they do

    def _connect(self) -> None:
        view = self.view
        components = [each for each in view.blocks.blocks.values() if isinstance(each, gr.Component)]
        self._everything = [*components, view.editor]
        view.blocks.load(self._open, view.visitor, self._everything, api_name="open", **HIDDEN)
        view.blocks.load(_hold_stream, None, None, api_name="stream", **HIDDEN)
        sent = gr.on(
            [view.box.submit, view.buttons["send"].click], **self._event("send", self._send, view.box, follow=True)
        )
        sent.then(**self._event("restore", self._restore, view.box))
        # "multiple": the last pick may still be following a reply.
        view.picker.input(**self._event("pick", self._pick, view.picker, follow=True, trigger_mode="multiple"))
        view.buttons["regenerate"].click(**self._event("regenerate", self._regenerate, follow=True))
        for name, action, *inputs in (
            ("stop", lambda tab: tab.session.stop()),
            ("previous", lambda tab: tab.session.swipe(-1)),
            ("next", lambda tab: tab.session.swipe(1)),
            ("undo", self._undo, view.box),
            ("edit", self._edit),
            ("save", self._save, view.query, view.response),
            ("cancel", lambda tab: {view.editor: gr.update(visible=False)}),
            ("clear", lambda tab: tab.session.clear()),
            ("apply", self._apply, *view.persona.values()),
            ("export", self._export),
        ):
            view.buttons[name].click(**self._event(name, action, *inputs))
        view.buttons["upload"].upload(**self._event("import", self._import, view.buttons["upload"]))
        for name, slider in view.sliders.items():
            set_parameter = lambda tab, value, name=name: tab.session.set_generation(**{name: value})  # noqa: E731
            slider.input(**self._event(name, set_parameter, slider, trigger_mode="always_last"))
        view.clock.tick(**self._event("tick", self._tick, queue=False))

    def _event(self, name: str, action: Callable, *inputs: gr.Component, follow: bool = False, **options) -> dict:
        """Arguments for a Gradio event: `action` with the tab and the values of `inputs`. Errors become a line."""

        def act(tab, *values):
            try:
                if tab is None:
                    raise ChatError("服务器重启过，这个页面过期了 [page expired]：请刷新页面")
                changes = action(tab, *values)
                return changes if isinstance(changes, dict) else self._draw(tab)
            except Exception as error:
                return self.view.error(error_text(error))

        async def act_and_follow(tab, *values):
            changes = act(tab, *values)
            yield changes
            if self.view.log in changes:  # neither refused nor empty
                async for changes in self._follow(tab):
                    yield changes

        return {
            "fn": act_and_follow if follow else act,
            "inputs": [self.view.tab, *inputs],
            "outputs": self._everything,
            "api_name": name,
            "trigger_mode": "once",  # not again while it runs
            **HIDDEN,
            **options,
        }


async def _hold_stream() -> AsyncIterator[None]:
    """An event of each tab that never ends, and so keeps the stream open on which answers come to the browser."""
    # Gradio closes the stream with the last event under way. What is clicked in that moment was never answered, and its
    # button stayed dead.
    while True:
        yield
        await asyncio.sleep(STREAM_SECONDS)
