"""What the components of the web page do.

A browser keeps an id, and the server its conversations, so that a reload and a second tab show the same ones. Every tab
has its own choice of the character. Replies go on when their page is closed; the model writes one at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import gradio as gr

from ..characters.personas import SessionMeta
from ..chat.fitting import context_length, context_limit, cut_persona
from ..chat.reply import Reply
from ..errors import ChatError, HelpersError, PromptTooLongError
from .bubbles import download_links, meter
from .conversations import Conversations, change_persona, edit_exchange
from .files import exported_all, exported_files
from .texts import error_text, model_text
from .web_duet import GROWING_SECONDS, go_on, propose, start
from .web_view import WebView, within
from .web_visitors import Tab, Visitors

STREAM_SECONDS = 5.0  # how soon the server notices that a tab has been closed
HIDDEN = {"show_progress": "hidden", "api_visibility": "undocumented"}


class WebChat:
    """The page (`view.blocks`), connected. Arguments as of `mount`."""

    def __init__(self, model, tokenizer, characters, language: str, **generation):
        if language not in ("zh", "en"):
            raise HelpersError(f"没有这种语言 [unknown language]：{language!r}，可选 zh、en")
        self.language = language
        self.visitors = Visitors(lambda: Conversations(model, tokenizer, characters, **generation))
        names = self.visitors.make().names  # wrong arguments are refused here
        self.view = WebView(names, context_length(model), language, model_text(model, language))
        # What `data-do` can ask for: each takes the tab and `data-at`.
        self.actions = {
            "home": lambda tab, _: self.go(tab, tab.name, at_home=True),
            "open": lambda tab, name: self.go(tab, tab.conversations.show(name)),
            "new": lambda tab, _: self.go(tab, tab.conversations.new(self.card(tab))),
            "branch": lambda tab, at: self.go(tab, tab.conversations.branch(tab.name, int(at))),
            "drop": lambda tab, name: self.go(tab, tab.conversations.drop(name), at_home=True),
            "say": lambda tab, at: self._send(tab, tab.session.session_meta.openers[int(at)]),
            "regenerate": lambda tab, _: self.write(tab, tab.session.begin_again),
            "continue": lambda tab, _: self.write(tab, tab.session.begin_more),
            "previous": lambda tab, _: tab.session.swipe(-1),
            "next": lambda tab, _: tab.session.swipe(1),
            "edit": self._edit,
            "delete": lambda tab, at: tab.session.delete(int(at)),
            "cut": lambda tab, at: tab.session.delete(int(at), following=True),
            "fit": self._fit,
        }
        with self.view.blocks:
            self._connect()

    # --- drawing

    def draw(self, tab: Tab) -> dict:
        problem = tab.session.error
        return {**self.view.conversation(tab.session), **(self._say(problem) if problem else self.view.error(""))}

    def draw_all(self, tab: Tab) -> dict:
        settings = self.view.settings(tab.name, tab.session, tab.unapplied.get(tab.name))
        return {**self.view.place(tab.at_home, tab.conversations), **self.draw(tab), **settings}

    def _say(self, error: BaseException) -> dict:
        persona_is_longer = isinstance(error, PromptTooLongError) and error.persona * 2 > error.total
        return self.view.error(error_text(error, self.language), can_fit=persona_is_longer)

    async def follow(self, tab: Tab) -> AsyncIterator[dict]:
        """Draw a reply while it grows, for as long as the tab shows it."""
        session = tab.session
        tab.followed += 1
        try:
            while (draft := session.draft) is not None and tab.session is session:
                yield self.view.growing(session, draft)
                await asyncio.sleep(GROWING_SECONDS)
            yield self.draw(tab)
        finally:
            tab.followed -= 1

    # --- what the reader does; each takes the tab first and returns what changes on the page, or None to draw it again

    def _open(self, key: str) -> dict:
        # No generator: Gradio sends what it yielded once more when it ends, over what was clicked in the meantime.
        key, conversations = self.visitors.get(key)
        tab = Tab(conversations, conversations.name, at_home=not conversations.visited)
        known = {self.view.visitor: key, self.view.tab: tab, self.view.clock: gr.Timer(active=True)}
        return {**known, **self.draw_all(tab)}

    def go(self, tab: Tab, name: str, at_home: bool = False) -> dict:
        """Show a conversation, or the gallery."""
        tab.name, tab.at_home, tab.going_on = name, at_home, False
        tab.conversations.visited = True
        return self.draw_all(tab)

    def card(self, tab: Tab) -> SessionMeta:
        """The persona that a new conversation begins with: the one on show, as its card was."""
        return tab.conversations.characters.get(tab.session.session_meta.bot_name, tab.session.session_meta)

    def write(self, tab: Tab, begin: Callable[..., Reply], *text: str) -> Reply:
        reply = begin(*text)
        self.visitors.keep_cache(tab.session)
        return reply

    def _send(self, tab: Tab, text: str) -> dict:
        twice = tab.clicked_twice("send", text)
        if not text.strip() or (twice and tab.session.draft is not None):
            return gr.skip()
        tab.sent = text, self.write(tab, tab.session.begin, text)
        return {self.view.box: "", **self.draw(tab)}

    def _restore(self, tab: Tab, text: str) -> dict:
        """Put what could not be answered back into the box, unless something new is written there."""
        (unsent, reply), tab.sent = tab.sent or ("", None), None
        return {self.view.box: text or unsent} if reply and reply.error else gr.skip()

    def _stop(self, tab: Tab) -> dict:
        tab.going_on = False
        for session in filter(None, (tab.session, tab.proposal)):
            session.stop()
        return {self.view.buttons["stop"]: gr.update(interactive=False)}  # whoever follows the reply draws the rest

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
        if tab.clicked_twice("undo"):
            return gr.skip()
        query = tab.session.undo()
        return {self.view.box: text or query, **self.draw(tab)}

    def _edit(self, tab: Tab, at: str) -> dict:
        tab.edited = int(at)
        tab.session.edit(index=tab.edited)  # changes nothing, but refuses if there is nothing to edit
        return self.view.editing(*tab.session.history[tab.edited])

    def _save(self, tab: Tab, query: str, response: str) -> dict:
        edit_exchange(tab.session, query, response, tab.edited)
        return {self.view.editor: gr.update(visible=False), **self.draw(tab)}

    def _change(self, tab: Tab, *fields: str) -> dict:
        """Keep a persona that is being changed until it is applied."""
        tab.unapplied[tab.name] = fields
        meta = tab.session.session_meta
        if fields == tuple(getattr(meta, name, "") for name in self.view.persona):
            del tab.unapplied[tab.name]
        return self.view.unapplied(tab.session, tab.name in tab.unapplied)

    def _apply(self, tab: Tab, *fields: str) -> dict:
        change_persona(tab.session, dict(tab.session.session_meta) | dict(zip(self.view.persona, fields)))
        tab.unapplied.pop(tab.name, None)
        return self.draw_all(tab)

    def _fit(self, tab: Tab, _: str) -> dict:
        """Cut the persona so that an exchange as long as the one that was refused has room, and a reply."""
        session, parameters = tab.session, tab.session.parameters
        limit = context_limit(session.model, parameters)
        reserve = min(parameters.max_new_tokens, limit // 4) + limit // 4
        session.set_persona(cut_persona(session.tokenizer, session.session_meta, limit - reserve))
        tab.unapplied.pop(tab.name, None)
        return self.draw_all(tab)

    def _set(self, tab: Tab, name: str, value: float) -> dict:
        """Change a parameter. What was typed is left alone: the next key may be on its way."""
        try:
            tab.session.set_generation(**{name: value})
        except ChatError as error:
            return {**self.view.parameters(tab.session), **self._say(error)}
        return {self.view.meter: meter(tab.session, self.language), self.view.links: ""}  # they were of what was before

    def _reset(self, tab: Tab) -> dict:
        kept = {name: value for name, value in tab.session.generation.items() if name not in self.view.sliders}
        tab.session.generation = {**kept, **tab.conversations.generation}
        return {**self.view.parameters(tab.session), **self.draw(tab)}

    def _rename(self, tab: Tab, name: str) -> dict:
        tab.name = tab.conversations.rename(tab.name, name)
        return self.draw_all(tab)

    def _export(self, tab: Tab) -> dict:
        return {self.view.links: download_links(exported_files(tab.session))}

    def _export_all(self, tab: Tab) -> dict:
        return {self.view.links: download_links({"conversations.zip": exported_all(tab.conversations.sessions)})}

    def _import(self, tab: Tab, content: bytes) -> dict:
        return self.go(tab, tab.conversations.open(content))

    # --- from the components to what they do

    def _connect(self) -> None:
        view = self.view
        components = [each for each in view.blocks.blocks.values() if isinstance(each, gr.Component)]
        self._everything = [*components, view.editor, view.home, view.chat, view.drawer]
        opened = view.blocks.load(self._open, view.visitor, self._everything, api_name="open", **HIDDEN)
        opened.then(**self._event("follow", self.draw))
        view.blocks.load(_hold_stream, None, None, api_name="stream", **HIDDEN)
        sent = gr.on(
            [view.box.submit, view.buttons["send"].click],
            **self._event("send", self._send, view.box, trigger_mode="multiple"),
        )
        sent.then(**self._event("restore", self._restore, view.box))
        # "multiple": the last one may still be following a reply.
        for part in (view.log, view.gallery, view.head, view.problem, view.talk):
            part.act(**self._event("act", self._act, trigger_mode="multiple"))
        for name, action, *inputs in (
            ("stop", self._stop),
            ("undo", self._undo, view.box),
            ("impersonate", partial(propose, self), view.box),
            ("save", self._save, view.query, view.response),
            ("cancel", lambda tab: {view.editor: gr.update(visible=False)}),
            ("apply", self._apply, *view.persona.values()),
            ("reset", self._reset),
            ("rename", self._rename, view.title),
            ("export", self._export),
            ("export_all", self._export_all),
            ("start", partial(start, self), view.other, view.topic),
            ("go_on", partial(go_on, self)),
        ):
            view.buttons[name].click(**self._event(name, action, *inputs))
        for upload in view.uploads:
            upload.upload(**self._event("import", self._import, upload, trigger_mode="multiple"))
        for name, slider in view.sliders.items():
            set_parameter = lambda tab, value, name=name: self._set(tab, name, value)  # noqa: E731
            slider.input(**self._event(name, set_parameter, slider, trigger_mode="always_last", js=within(slider)))
        fields = view.persona.values()
        changed = self._event("change", self._change, *fields, trigger_mode="always_last")
        # `input` is sent by the keys of a keyboard, not by an input method for Chinese, nor by pasting: hence `blur` too.
        gr.on([event for field in fields for event in (field.input, field.blur)], **changed)
        view.clock.tick(**self._event("tick", self._tick, queue=False))

    def _act(self, tab: Tab, event: gr.EventData) -> dict | None:
        what, at = str(event._data.get("what")), str(event._data.get("at"))
        if what not in self.actions or (what not in ("previous", "next", "edit") and tab.clicked_twice(what, at)):
            return gr.skip()
        done = self.actions[what](tab, at)
        return done if isinstance(done, dict) else None

    def _event(self, name: str, action: Callable, *inputs: gr.Component, **options) -> dict:
        """Arguments for a Gradio event: `action` with the tab and the values of `inputs`. Errors become a line.

        A reply is followed to its end. An action that draws for itself is an async generator."""

        async def act(event: gr.EventData, tab, *values):
            try:
                if tab is None:
                    raise ChatError("服务器重启过，这个页面过期了 [page expired]：请刷新页面")
                if tab.name not in tab.conversations.sessions:
                    tab.name = tab.conversations.name
                    yield self.draw_all(tab)
                    raise ChatError("这段对话在别的标签页里改名或删除了 [conversation gone]")
                done = action(tab, *values, *([event] if name == "act" else []))
                if isinstance(done, AsyncIterator):
                    async for changes in done:
                        yield changes
                    return
                changes = done if isinstance(done, dict) else self.draw(tab)
                yield changes
                # Neither refused nor empty; a reply may have ended, or failed, since it was drawn.
                if self.view.log in changes:
                    async for changes in self.follow(tab):
                        yield changes
            except Exception as error:
                yield self._say(error)

        async def act_without_queue(tab, *values):  # Gradio runs no generators there
            return await anext(act(None, tab, *values))

        return {
            "fn": act if options.get("queue", True) else act_without_queue,
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
