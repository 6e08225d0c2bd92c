"""Who speaks, and what has been said: from a checked request to a persona and turns of chat messages."""

from ..characters.personas import DEFAULT_CHARACTER, SYSTEM_CHARACTER, SessionMeta, as_session_meta, get_character
from ..chat.fitting import build_turns
from .schemas import ChatRequest, LessonRequest, Message


def lesson_prompt(request: LessonRequest) -> tuple[SessionMeta, list[list[dict]]]:
    """Persona and turns of a `POST /`. Raises ChatError or CharacterError."""
    persona = request.session_meta or get_character(request.character or DEFAULT_CHARACTER)
    return persona, build_turns(request.prompt, request.history or [])


def chat_prompt(request: ChatRequest, character: SessionMeta | None) -> tuple[SessionMeta, list[list[dict]]]:
    """Persona and turns of a chat completion.

    The persona is the `session_meta` of the request, else the character that its `model` names, else what the system
    messages say, else 苏梦远. System messages beside a persona are added to what it knows about the character.

    Args:
        character: the card that `model` stands for, if any.

    Raises:
        CharacterError: the persona with the system messages is too long.
    """
    given = request.chat_template_kwargs and request.chat_template_kwargs.session_meta
    system = " ".join(m.content for m in request.messages if m.role in ("system", "developer") and m.content.strip())
    persona = given or character or (None if system else get_character(DEFAULT_CHARACTER))
    if persona is None:
        persona = as_session_meta({"bot_name": SYSTEM_CHARACTER, "bot_info": system})
    elif system:
        persona = as_session_meta({**persona.model_dump(), "bot_info": f"{persona.bot_info} {system}".strip()})
    return persona, split_turns(request.messages)


def split_turns(messages: list[Message]) -> list[list[dict]]:
    """User and assistant messages in turns, each beginning with a user message; empty messages are left out."""
    turns: list[list[dict]] = []
    for message in messages:
        if message.role in ("user", "assistant") and message.content.strip():
            if message.role == "user" or not turns:
                turns.append([])
            turns[-1].append({"role": message.role, "content": message.content})
    return turns
