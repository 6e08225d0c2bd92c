"""The parts of the web page that are HTML of our own: the gallery, the head of a talk, its messages. All text is escaped.

A button with `data-do` calls an action of `web_chat.WebChat` with its `data-at`; `data-ask` asks before it does.
"""

import html
from functools import partial

from ..characters.personas import SessionMeta
from ..chat.session import ChatSession
from .bubbles import bubble
from .conversations import Conversations
from .faces import face, face_of, icon
from .texts import label

LAST = ("previous", "next", "regenerate", "continue")  # what only the last reply has


class Parts:
    """The parts in one language."""

    def __init__(self, language: str, model_text: str):
        self.text, self.model_text = partial(label, language=language), html.escape(model_text)

    def button(
        self, action: str, at="", inside: str = "", kind: str = "cg-tool", ask: bool = False, key: str = ""
    ) -> str:
        """A button; one without text `inside` is an icon, whose name is said on hovering and to a screen reader."""
        name = "" if inside else self.text(key or action)
        named = f'title="{name}" aria-label="{name}"' if name else ""
        asks = f'data-ask="{self.text("sure")}"' if ask else ""
        what = f'data-do="{action}" data-at="{html.escape(str(at))}"'
        return f'<button type="button" class="{kind}" {what} {named} {asks}>{inside or icon(action)}</button>'

    def _named(self, action: str) -> str:
        return self.button(action, inside=self.text(action), kind="cg-text")

    # --- the gallery

    def gallery(self, conversations: Conversations) -> str:
        """Everybody one can talk to, and the talks there are."""
        search = f'<input type="search" class="cg-search" placeholder="{self.text("search")}" aria-label="{self.text("search")}">'
        said = {
            name: session
            for name, session in conversations.sessions.items()
            if name not in conversations.characters or any(query for query, _ in session.history)
        }
        talks = [self._card(name, session.session_meta, *_last_line(session)) for name, session in said.items()]
        people = [
            self._card(name, card, _first_sentence(card), getattr(card, "greeting", ""))
            for name, card in conversations.characters.items()
        ]
        head = f"<div><h1>{self.text('title')}</h1><span class='cg-small'>{self.model_text}</span></div>"
        return "".join(
            [f'<div class="cg-bar">{head}{self._named("theme")}</div>{search}']
            + (
                [f"<h2>{self.text('conversations')}</h2>", f'<div class="cg-cards">{"".join(talks)}</div>']
                if talks
                else []
            )
            + [f"<h2>{self.text('characters')}</h2>", f'<div class="cg-cards">{"".join(people)}</div>']
        )

    def _card(self, name: str, card: SessionMeta, line: str, words: str) -> str:
        texts = f"<b>{html.escape(name)}</b><i>{html.escape(line)}</i><q>{html.escape(words)}</q>"
        return self.button("open", name, f"{face_of(card)}<span>{texts}</span>", "cg-card")

    # --- a talk

    def head(self, name: str, session: ChatSession) -> str:
        """Who is talked to, and the drawings that the messages refer to."""
        meta = session.session_meta
        faces = {"bot": face(meta.bot_name, getattr(meta, "face", "")), "user": face(meta.user_name)}
        drawings = "".join(
            f'<symbol id="cg-{who}" viewBox="0 0 48 48">{drawn}</symbol>' for who, drawn in faces.items()
        )
        who = f'<div><h1>{html.escape(name)}</h1><span class="cg-small">{self.model_text}</span></div>'
        more = self._named("new") + self._named("theme").replace("cg-text", "cg-text cg-wide")
        return (
            f'<svg class="cg-hidden" aria-hidden="true">{drawings}</svg>'
            f'<div class="cg-bar">{self._named("home")}{_face("bot")}{who}{more}</div>'
        )

    def log(self, session: ChatSession) -> str:
        """What was said, and what can be done with it while no reply is written."""
        draft = session.draft
        history = session.history if draft is None else draft[0]
        rows = [
            self.row(session.session_meta, side, text) + (self._tools(session, index, side) if draft is None else "")
            for index, entry in enumerate(history)
            for side, text in zip(("user", "bot"), entry)
            if text
        ]
        newest = html.escape(history[-1][1]) if history and draft is None else ""
        openers = getattr(session.session_meta, "openers", [])
        if draft is None and openers and not any(query for query, _ in history):
            offers = [self.button("say", number, html.escape(text), "") for number, text in enumerate(openers)]
            rows.append(f'<div class="cg-openers">{"".join(offers)}</div>')
        return (
            f'<div role="log" aria-live="off" aria-label="{self.text("conversation")}">{"".join(rows)}</div>'
            f'<div class="cg-hidden" role="status">{newest}</div>'  # read out once it is whole
        )

    def row(self, meta: SessionMeta, side: str, text: str) -> str:
        """A message with the face of who says it."""
        name = meta.user_name if side == "user" else meta.bot_name
        right = " cg-right" if side == "user" else ""
        return f'<div class="cg-row{right}">{_face(side)}{bubble(side, name, text)}</div>'

    def _tools(self, session: ChatSession, index: int, side: str) -> str:
        is_last = side == "bot" and index == len(session.history) - 1
        tools = []
        if is_last and (several := len(session.alternatives)) > 1:
            position = f'<span class="cg-small" id="position">{session.alternative + 1}/{several}</span>'
            tools += [self.button("previous", index, key="previous_reply"), position]
            tools += [self.button("next", index, key="next_reply")]
        if is_last and session.history[index][0]:
            tools += [self.button("regenerate", index), self.button("continue", index)]
        tools += [self.button("edit", index), self.button("copy", index)]
        if side == "bot":
            tools += [self.button("branch", index), self.button("delete", index, ask=True)]
        else:
            tools += [self.button("cut", index, ask=True)]
        return f'<div class="cg-tools{" cg-last" if is_last else ""}">{"".join(tools)}</div>'


def _face(who: str) -> str:
    return f'<svg class="cg-face" viewBox="0 0 48 48" aria-hidden="true"><use href="#cg-{who}"></use></svg>'


def _first_sentence(card: SessionMeta) -> str:
    return card.bot_info.removeprefix(f"{card.bot_name}，").partition("。")[0]


def _last_line(session: ChatSession) -> tuple[str, str]:
    """How many exchanges there are, as a sign, and the last thing said."""
    said = [text for entry in session.history for text in entry if text]
    return f"{session.session_meta.bot_name} · {len(session.history)}", said[-1] if said else ""
