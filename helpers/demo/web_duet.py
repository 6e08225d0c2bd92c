"""The model in the reader's place on the web page: a line for the reader, or two characters in a talk of their own.

Each takes the `WebChat` and the tab, and yields what changes on the page.
"""

import asyncio
from collections.abc import AsyncIterator

import gradio as gr

from ..chat.session import ChatSession
from ..errors import ChatError
from .duet import facing, mirrored, reason_to_stop
from .web_visitors import Tab

GROWING_SECONDS = 0.1  # a growing line is drawn this often
ROUNDS = 20  # after which two characters are stopped


async def propose(chat, tab: Tab, _text: str = "") -> AsyncIterator[dict]:
    """What the reader might say next, into the box."""
    session = tab.session
    tab.proposal, line = mirrored(session)
    reply = tab.proposal.begin(line)
    yield {chat.view.buttons["stop"]: gr.update(interactive=True), **chat.view.error("")}
    tab.followed += 1
    try:
        while reply.running and tab.session is session:
            yield chat.view.proposal(session, tab.proposal.draft[2] if tab.proposal.draft else "")
            await asyncio.sleep(GROWING_SECONDS)
        if reply.error:
            raise reply.error
        yield {**chat.draw(tab), **chat.view.proposal(session, None), chat.view.box: tab.proposal.history[-1][1]}
    finally:
        tab.followed -= 1
        reply.stop()


async def start(chat, tab: Tab, other: str, topic: str) -> AsyncIterator[dict]:
    """Two characters: the one on show, and another one in the reader's place."""
    if not topic.strip():
        raise ChatError("缺少话题 [empty topic]：请写几个字，如“月亮”")
    second = tab.conversations.characters.get(other) or chat.card(tab)
    if second.bot_name == tab.session.session_meta.bot_name:
        raise ChatError(f"两个角色都叫{second.bot_name} [same name]：请选另一个")
    first = facing(chat.card(tab), second, greeting=f"我们来聊聊{topic.strip()}吧。")
    yield chat.go(tab, tab.conversations.new(first))
    async for changes in go_on(chat, tab):
        yield changes


async def go_on(chat, tab: Tab) -> AsyncIterator[dict]:
    """The model speaks for both until it is stopped, a goodbye, or a line that was there before."""
    session, tab.going_on = tab.session, True
    try:
        for _ in range(ROUNDS):
            async for changes in propose(chat, tab):
                yield changes
            line = tab.proposal.history[-1][1]
            if not _goes_on(tab, session, line):
                break
            chat.write(tab, session.begin, line)
            yield {chat.view.box: "", **chat.draw(tab)}
            async for changes in chat.follow(tab):
                yield changes
            if not _goes_on(tab, session, session.history[-1][1], 1):
                break
    finally:
        tab.going_on = False


def _goes_on(tab: Tab, session: ChatSession, line: str, among: int = 0) -> bool:
    """Whether a talk goes on after this line; `among`: how many of the last lines are the line itself."""
    said = [("", text) for entry in session.history for text in entry if text]
    return tab.going_on and tab.session is session and not reason_to_stop(line, said[: len(said) - among])
