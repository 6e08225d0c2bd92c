"""One person's conversations: one with each character, and those opened from files. Showing another loses none."""

from ..characters.personas import SessionMeta, load_characters
from ..chat.session import ChatSession
from ..errors import CharacterError
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
        self.show(name or next(iter(self.characters), ""))

    @property
    def session(self) -> ChatSession:
        return self.sessions[self.name]

    @property
    def names(self) -> list[str]:
        """All that can be shown: the characters, then what was opened."""
        return list(dict.fromkeys([*self.characters, *self.sessions]))

    def show(self, name: str) -> None:
        if name not in self.names:
            raise CharacterError(f"没有叫 {name!r} 的角色 [unknown character]，可选：{'、'.join(self.names)}")
        if name not in self.sessions:
            card = self.characters[name]
            self.sessions[name] = ChatSession(self.model, self.tokenizer, card, **self.generation)
        self.name = name

    def open(self, content: bytes) -> str:
        """Open an exported conversation or a card (JSON or PNG) beside the others, go to it, and return its name."""
        session = open_file(self.model, self.tokenizer, content, **self.generation)
        name, number = session.session_meta.bot_name, 2
        while name in self.names:
            name, number = f"{session.session_meta.bot_name} ({number})", number + 1
        self.sessions[name] = session
        self.name = name
        return name


def change_persona(session: ChatSession, persona) -> None:
    """Go on under another persona. Before the first message its greeting is said, too."""
    session.set_persona(persona)
    if not any(query for query, _ in session.history):
        session.clear()


def edit_last(session: ChatSession, query: str, response: str) -> None:
    """Change both sides of the last exchange; a greeting has no query to change."""
    is_greeting = session.history and not session.history[-1][0]
    session.edit(None if is_greeting else query, response)
