"""What the components of the web page do.

A browser keeps an id, and the server its conversations, so that a reload and a second tab show the same ones. Every tab
has its own choice of the character. Replies go on when their page is closed; the model writes one at a time.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import gradio as gr

from ..chat.fitting import context_length
from ..chat.reply import Reply
from ..chat.session import ChatSession
from ..errors import ChatError, HelpersError
from .bubbles import download_links
from .conversations import Conversations, change_persona, edit_last
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
    sent: tuple[str, Reply] | None = None  # what was said last, until `_restore` has looked at it

    @property
    def session(self) -> ChatSession:
        return self.conversations.sessions[self.name]


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

    async def _follow(self, tab: Tab, first: dict) -> AsyncIterator[dict]:
        """Draw `first`, then a reply while it grows, for as long as the tab shows it."""
        session = tab.session
        tab.followed += 1
        try:
            yield first
            while (draft := session.draft) is not None and tab.session is session:
                yield self.view.growing(session, draft)
                await asyncio.sleep(GROWING_SECONDS)
            yield self._draw(tab)
        finally:
            tab.followed -= 1

    # --- what the reader does; each takes the tab first and returns what changes on the page, or what `_follow` gives

    def _open(self, key: str) -> AsyncIterator[dict]:
        key, conversations = self.visitors.get(key)
        tab = Tab(conversations, conversations.name)
        known = {self.view.visitor: key, self.view.tab: tab, self.view.clock: gr.Timer(active=True)}
        return self._follow(tab, {**known, **self._draw_all(tab)})

    def _send(self, tab: Tab, text: str) -> AsyncIterator[dict]:
        if not text.strip():  # the second click of two
            return self._follow(tab, gr.skip())
        tab.sent = text, tab.session.begin(text)
        self.visitors.keep_cache(tab.session)
        return self._follow(tab, {self.view.box: "", **self._draw(tab)})

    def _restore(self, tab: Tab, text: str) -> dict:
        """Put what could not be answered back into the box, unless something new is written there."""
        (unsent, reply), tab.sent = tab.sent or ("", None), None
        return {self.view.box: text or unsent} if reply and reply.error else gr.skip()

    def _regenerate(self, tab: Tab) -> AsyncIterator[dict]:
        tab.session.begin_again()
        self.visitors.keep_cache(tab.session)
        return self._follow(tab, self._draw(tab))

    def _pick(self, tab: Tab, name: str) -> AsyncIterator[dict]:
        tab.conversations.show(name)
        tab.name = name
        return self._follow(tab, self._draw_all(tab))

    def _tick(self, tab: Tab) -> dict:
        """Draw what was said in another tab.

        What this tab did itself is drawn once more: events overtake each other on their way to the browser, and of
        what arrives, an older state of the conversation must not be the last.
        """
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
        view.blocks.load(self._growing(self._open), view.visitor, self._everything, api_name="open", **HIDDEN)
        view.blocks.load(_hold_stream, None, None, api_name="stream", **HIDDEN)
        sent = gr.on([view.box.submit, view.buttons["send"].click], **self._event("send", self._send, view.box))
        sent.then(**self._event("restore", self._restore, view.box))
        # "multiple": the last pick may still be following a reply.
        view.picker.input(**self._event("pick", self._pick, view.picker, trigger_mode="multiple"))
        for name, action, *inputs in (
            ("regenerate", self._regenerate),
            ("stop", lambda tab: tab.session.stop()),
            ("previous", lambda tab: tab.session.swipe(-1)),
            ("next", lambda tab: tab.session.swipe(1)),
            ("undo", self._undo, view.box),
            ("edit", self._edit),
            ("save", self._save, view.query, view.response),
            ("clear", lambda tab: tab.session.clear()),
            ("apply", self._apply, *view.persona.values()),
            ("export", self._export),
        ):
            view.buttons[name].click(**self._event(name, action, *inputs))
        view.buttons["cancel"].click(lambda: gr.update(visible=False), None, view.editor, api_visibility="private")
        view.buttons["upload"].upload(**self._event("import", self._import, view.buttons["upload"]))
        for name, slider in view.sliders.items():
            set_parameter = lambda tab, value, name=name: tab.session.set_generation(**{name: value})  # noqa: E731
            slider.input(**self._event(name, set_parameter, slider, trigger_mode="always_last"))
        view.clock.tick(**self._event("tick", self._tick, queue=False))

    def _event(self, name: str, action: Callable, *inputs: gr.Component, **options) -> dict:
        """Arguments for a Gradio event: `action` with the tab and the values of `inputs`."""
        follows = action in (self._send, self._regenerate, self._pick)
        return {
            "fn": self._growing(action) if follows else self._once(action),
            "inputs": [self.view.tab, *inputs],
            "outputs": self._everything,
            "api_name": name,
            "trigger_mode": "once",  # not again while it runs
            **HIDDEN,
            **options,
        }

    def _once(self, action: Callable) -> Callable:
        """`action`, but an error becomes a line on the page. What names no changes may have changed anything."""

        def act(tab, *values):
            try:
                changes = action(_check_open(tab), *values)
                return changes if isinstance(changes, dict) else self._draw(tab)
            except Exception as error:
                return self.view.error(error_text(error))

        return act

    def _growing(self, action: Callable) -> Callable:
        """The same for an action whose reply is followed."""

        async def act(tab, *values):
            try:
                async for changes in action(_check_open(tab), *values):
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


def _check_open(tab):
    if tab is None:
        raise ChatError("服务器重启过，这个页面过期了 [page expired]：请刷新页面")
    return tab
