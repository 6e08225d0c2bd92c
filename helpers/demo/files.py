"""The files in which a conversation or a character leaves one face of the demo and enters another."""

import json
import re

from ..characters import (
    PNG_SIGNATURE,
    CharacterCard,
    export_card_png,
    export_card_v2,
    import_card_v2,
    parse_json_object,
)
from ..chat import ChatSession


def exported_files(session: ChatSession) -> dict[str, bytes]:
    """File name to content: the conversation as JSON and Markdown, its character as a card V2 in JSON and PNG."""
    card = CharacterCard(**session.session_meta.model_dump())
    name = re.sub(r"[^\w-]+", "_", card.bot_name)
    return {
        f"{name}.json": _json(session.export()),
        f"{name}.md": session.to_markdown().encode(),
        f"{name}_card.json": _json(export_card_v2(card)),
        f"{name}_card.png": export_card_png(card),
    }


def open_file(model, tokenizer, content: bytes, **generation) -> ChatSession:
    """A session from the content of a file: an exported conversation goes on, a card (JSON or PNG) begins a new one.

    Args:
        **generation: defaults for a new conversation; an exported one brings its own.

    Raises:
        CharacterError, ChatError: not such a file, or damaged.
    """
    if content.startswith(PNG_SIGNATURE):
        return ChatSession(model, tokenizer, import_card_v2(content), **generation)
    parsed = parse_json_object(content)
    if "spec" in parsed:
        return ChatSession(model, tokenizer, import_card_v2(parsed), **generation)
    return ChatSession.restore(model, tokenizer, parsed)


def _json(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
