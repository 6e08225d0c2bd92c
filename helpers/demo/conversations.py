"""One person's conversations, by name: those with the characters, and those opened from files. Showing another loses none."""

from ..characters.personas import SessionMeta, load_characters
from ..chat.session import ChatSession
from ..errors import CharacterError, ChatError
from ..model.adapters import adapter_card
from .files import open_file


def characters_with(adapter=None) -> dict[str, SessionMeta]:
    """The shipped characters by name; before them, the persona kept beside the adapter in this directory."""
    characters = load_characters()
    if adapter is None or (own := adapter_card(adapter)) is None:
        return characters
    return {own.bot_name: own} | characters | {own.bot_name: own}


class Conversations:
    """Conversations by name; `name` is the one shown, `session` what is said in it.

    Args:
        characters: name to card; by default those of `data/characters.json`.
        name: who is shown first; by default the first of them.
        **generation: defaults for all conversations, see `GenerationParameters`.

    Raises:
        CharacterError: an unknown character; ChatError: a senseless parameter.
    """

    def __init__(self, model, tokenizer, characters=None, name: str | None = None, **generation):
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.characters = load_characters() if characters is None else characters
        self.sessions: dict[str, ChatSession] = {}  # those that were shown so far
        self.visited = False  # whether the reader has chosen one, for faces that begin with the choice
        self.show(name or next(iter(self.characters), ""))

    @property
    def session(self) -> ChatSession:
        return self.sessions[self.name]

    @property
    def names(self) -> list[str]:
        """All that can be shown: the characters, then what was opened."""
        return list(dict.fromkeys([*self.characters, *self.sessions]))

    def show(self, name: str) -> str:
        """Go to a conversation, or to a new one with this character; returns the name."""
        if name not in self.names:
            raise CharacterError(f"没有叫 {name!r} 的角色 [unknown character]，可选：{'、'.join(self.names)}")
        if name not in self.sessions:
            card = self.characters[name]
            self.sessions[name] = ChatSession(self.model, self.tokenizer, card, **self.generation)
        self.name = name
        return name

    def open(self, content: bytes) -> str:
        """Open an exported conversation or a card (JSON or PNG) beside the others, go to it, and return its name."""
        return self.add(open_file(self.model, self.tokenizer, content, **self.generation))

    def new(self, card: SessionMeta) -> str:
        """Another conversation with this persona, beside those there are."""
        return self.add(ChatSession(self.model, self.tokenizer, card, **self.generation))

    def branch(self, name: str, index: int) -> str:
        """Another conversation that goes on after the exchange `index` of this one."""
        exported = self.sessions[name].export()
        exported |= {"history": exported["history"][: index + 1]}
        del exported["alternatives"], exported["alternative"]
        return self.add(ChatSession.restore(self.model, self.tokenizer, exported))

    def add(self, session: ChatSession) -> str:
        """Keep a conversation under a name that is free, go to it, and return the name."""
        name, number = session.session_meta.bot_name, 2
        while name in self.names:
            name, number = f"{session.session_meta.bot_name} ({number})", number + 1
        self.sessions[name] = session
        self.name = name
        return name

    def rename(self, old: str, new: str) -> str:
        """Call a conversation something else; the others keep their places. Returns the new name."""
        new = new.strip()[:64]
        if not new or (new != old and new in self.names):
            raise ChatError(f"名字不能用 [name taken or empty]：{new!r}，请换一个")
        self.sessions = {new if name == old else name: session for name, session in self.sessions.items()}
        self.name = new if self.name == old else self.name
        return new

    def drop(self, name: str) -> str:
        """Throw a conversation away, and return the name of another one to go to."""
        self.sessions.pop(name).stop()
        return self.show(next(iter(self.names), ""))


def change_persona(session: ChatSession, persona) -> None:
    """Go on under another persona. Before the first message its greeting is said, too."""
    session.set_persona(persona)
    if not any(query for query, _ in session.history):
        session.clear()


def edit_exchange(session: ChatSession, query: str, response: str, index: int = -1) -> None:
    """Change both sides of an exchange, by default the last; a greeting has no query to change."""
    is_greeting = session.history and not session.history[index][0]
    session.edit(None if is_greeting else query, response, index)
