"""What the components of the web page do.

A browser keeps an id, and the server its conversations, so that a reload and a second tab show the same ones. Every tab
has its own choice of the character. Replies go on when their page is closed; the model writes one at a time.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import gradio as gr

from ..characters.personas import CharacterCard, as_session_meta
from ..chat.fitting import context_length
from ..chat.session import ChatSession
from ..errors import ChatError, HelpersError
from .conversations import Conversations, change_persona
from .files import exported_files
from .texts import DOUBLE_CLICK_SECONDS, error_text
from .visitors import Visitors
from .web_view import WebView

GROWING_SECONDS = 0.1  # a growing reply is drawn this often
STREAM_SECONDS = 5.0  # how soon the server notices that a tab has been closed
HIDDEN = {"show_progress": "hidden", "api_visibility": "undocumented"}


@dataclass
class Tab:
    """One tab of a browser: which of its conversations it shows, and what the clock has drawn of it."""

    conversations: Conversations
    name: str
    drawn: object = None
    followed: int = 0  # how many events are drawing a reply here
    undone: float = float("-inf")  # when
    unsent: str = ""  # what could not be answered

    @property
    def session(self) -> ChatSession:
        """The conversation it shows."""
        return self.conversations.sessions[self.name]


class WebChat:
    """The page (`view.blocks`), connected. Arguments as of `mount`."""

    def __init__(self, model, tokenizer, characters: dict[str, CharacterCard] | None, language: str, **generation):
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
            while session.draft is not None and tab.session is session:
                yield self.view.growing(session)
                await asyncio.sleep(GROWING_SECONDS)
            yield self._draw(tab)
        finally:
            tab.followed -= 1

    # --- what the reader does; each takes the tab first and yields or returns what changes on the page

    async def _open(self, key: str) -> AsyncIterator[dict]:
        key, conversations = self.visitors.get(key)
        tab = Tab(conversations, conversations.name)
        known = {self.view.visitor: key, self.view.tab: tab, self.view.clock: gr.Timer(active=True)}
        yield {**known, **self._draw_all(tab)}
        async for changes in self._follow(tab):
            yield changes

    async def _send(self, tab: Tab, text: str) -> AsyncIterator[dict]:
        if not text.strip():  # the second click of two
            yield gr.skip()
            return
        reply = tab.session.begin(text)
        self.visitors.keep_cache(tab.session)
        yield {self.view.box: "", **self._draw(tab)}
        async for changes in self._follow(tab):
            yield changes
        tab.unsent = text if reply.error else ""

    def _restore(self, tab: Tab, text: str) -> dict:
        """Put what could not be answered back into the box, unless something new is written there."""
        unsent, tab.unsent = tab.unsent, ""
        return {self.view.box: text or unsent} if unsent else {}

    async def _regenerate(self, tab: Tab) -> AsyncIterator[dict]:
        tab.session.begin_again()
        self.visitors.keep_cache(tab.session)
        yield self._draw(tab)
        async for changes in self._follow(tab):
            yield changes

    async def _pick(self, tab: Tab, name: str) -> AsyncIterator[dict]:
        tab.conversations.show(name)
        tab.name = name
        yield self._draw_all(tab)
        async for changes in self._follow(tab):
            yield changes

    def _tick(self, tab: Tab) -> dict:
        """Draw what was said in another tab.

        What this tab did itself is drawn once more: events overtake each other on their way to the browser, and of
        what arrives, an older state of the conversation must not be the last.
        """
        state = (tab.name, tab.session.draft, tab.session.export())
        if tab.followed or tab.drawn == state:
            return {}
        tab.drawn = state
        return self.view.conversation(tab.session)

    def _undo(self, tab: Tab, text: str) -> dict:
        before, tab.undone = tab.undone, time.monotonic()
        if tab.undone - before < DOUBLE_CLICK_SECONDS:
            return {}
        query = tab.session.undo()
        return {self.view.box: text or query, **self._draw(tab)}

    def _edit(self, tab: Tab) -> dict:
        if not tab.session.history:
            raise ChatError("还没有可以编辑的对话 [nothing to edit]")
        return self.view.editing(tab.session)

    def _save(self, tab: Tab, query: str, response: str) -> dict:
        greeting = not tab.session.history or not tab.session.history[-1][0]
        tab.session.edit(None if greeting else query, response)
        return {self.view.editor: gr.update(visible=False), **self._draw(tab)}

    def _apply(self, tab: Tab, *fields: str) -> dict:
        source = getattr(tab.session.session_meta, "source", "original")
        change_persona(tab.session, as_session_meta(self.view.card(fields, source)))
        return self._draw_all(tab)

    def _import(self, tab: Tab, content: bytes) -> dict:
        tab.name = tab.conversations.open(content)
        return self._draw_all(tab)

    # --- from the components to what they do

    def _connect(self) -> None:
        view = self.view
        components = [each for each in view.blocks.blocks.values() if isinstance(each, gr.Component)]
        self._everything = [*components, view.editor]
        view.blocks.load(self._steps(self._open), [view.visitor], self._everything, api_name="open", **HIDDEN)
        view.blocks.load(_hold_stream, None, None, api_name="stream", **HIDDEN)
        sent = gr.on([view.box.submit, view.send.click], **self._event(self._send, view.box))
        sent.then(**self._event(self._restore, view.box))
        # "multiple": the last pick may still be following a reply.
        view.picker.input(**self._event(self._pick, view.picker) | {"trigger_mode": "multiple"})
        for button, action, *inputs in (
            (view.regenerate, self._regenerate),
            (view.stop, lambda tab: tab.session.stop()),
            (view.previous, lambda tab: tab.session.swipe(-1)),
            (view.next, lambda tab: tab.session.swipe(1)),
            (view.undo, self._undo, view.box),
            (view.edit, self._edit),
            (view.save, self._save, view.query, view.response),
            (view.clear, lambda tab: tab.session.clear()),
            (view.apply, self._apply, *view.persona),
            (view.export, lambda tab: view.files(exported_files(tab.session))),
        ):
            button.click(**self._event(action, *inputs) | {"api_name": button.elem_id})
        view.cancel.click(lambda: gr.update(visible=False), None, view.editor, api_visibility="private")
        view.upload.upload(**self._event(self._import, view.upload))
        for name, slider in view.sliders.items():
            event = self._event(partial(_set_parameter, name), slider)
            slider.input(**event | {"api_name": name, "trigger_mode": "always_last"})
        view.clock.tick(**self._event(self._tick) | {"queue": False})

    def _event(self, action: Callable, *inputs: gr.Component) -> dict:
        """Arguments for a Gradio event: `action` with the tab and the values of `inputs`."""
        return {
            "fn": self._steps(action) if inspect.isasyncgenfunction(action) else self._once(action),
            "inputs": [self.view.tab, *inputs],
            "outputs": self._everything,
            "api_name": getattr(action, "__name__", "").strip("_"),
            "trigger_mode": "once",  # not again while it runs
            **HIDDEN,
        }

    def _once(self, action: Callable) -> Callable:
        """`action`, but an error becomes a line on the page. What names no changes may have changed anything."""

        def act(tab, *values):
            try:
                changes = action(_check_open(tab), *values)
                return (changes or gr.skip()) if isinstance(changes, dict) else self._draw(tab)
            except Exception as error:
                return self.view.error(error_text(error))

        return act

    def _steps(self, action: Callable) -> Callable:
        """The same for an action of several steps."""

        async def act(tab, *values):
            try:
                async for changes in action(_check_open(tab), *values):
                    yield changes
            except Exception as error:
                yield self.view.error(error_text(error))

        return act


def _set_parameter(name: str, tab: Tab, value: float) -> None:
    tab.session.set_generation(**{name: value})


async def _hold_stream() -> AsyncIterator[None]:
    """An event of each tab that never ends, and so keeps the stream open on which answers come to the browser.

    Gradio closes the stream with the last event under way. What is clicked in that moment was never answered, and its
    button stayed dead.
    """
    while True:
        yield
        await asyncio.sleep(STREAM_SECONDS)


def _check_open(tab):
    if tab is None:
        raise ChatError("服务器重启过，这个页面过期了 [page expired]：请刷新页面")
    return tab
