"""The files in which a conversation or a character leaves one face of the demo and enters another."""

import io
import json
import re
import zipfile
from contextlib import suppress

from ..characters.card_files import is_picture
from ..characters.cards import export_card_png, export_card_v2, open_content
from ..characters.personas import CharacterCard
from ..chat.session import ChatSession
from ..errors import CharacterError, ChatError
from .faces import picture_face

# Ending of the file name: what is in the file. Of two that fit, the later one decides.
EXPORTS = {
    ".json": lambda session: _json(session.export()),
    ".md": lambda session: session.to_markdown().encode(),
    "_card.json": lambda session: _json(export_card_v2(_card(session))),
    "_card.png": lambda session: export_card_png(_card(session)),
}


def exported_files(session: ChatSession) -> dict[str, bytes]:
    """File name to content: the conversation as JSON and Markdown, its character as a card in JSON (V2) and PNG (V2 and V3)."""
    name = _safe(session.session_meta.bot_name)
    return {name + ending: export(session) for ending, export in EXPORTS.items()}


def exported_all(sessions: dict[str, ChatSession]) -> bytes:
    """All conversations by name as JSON, in one ZIP file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, session) in enumerate(sessions.items(), start=1):  # no two names become one
            archive.writestr(f"{number:02d}_{_safe(name)}.json", _json(session.export()))
    return file.getvalue()


def exported_file(session: ChatSession, name: str) -> bytes:
    """The content of a file of this name, whose ending says what is wanted; `ChatError` for other endings."""
    for ending in reversed(EXPORTS):
        if name.endswith(ending):
            return EXPORTS[ending](session)
    raise ChatError(f"不认识的文件类型 [unknown file type]：{name!r}。文件名以 {'、'.join(EXPORTS)} 结尾")


def open_file(model, tokenizer, content: bytes, **generation) -> ChatSession:
    """A session from the content of a file: an exported conversation goes on, a character begins a new one.

    A character is a card (V1, V2 or V3, see `import_card`), or a plain persona as it stands beside a fine-tuned adapter. `generation`
    is for a new conversation; an exported one brings its own.

    Raises:
        CharacterError, ChatError: not such a file, or damaged.
    """
    found = open_content(content)
    if isinstance(found, dict) and "bot_name" not in found:
        return ChatSession.restore(model, tokenizer, found)
    if is_picture(content) and not getattr(found, "face", ""):
        with suppress(CharacterError):  # the card is whole where its picture may not be
            found = found.model_copy(update={"face": picture_face(content)})
    return ChatSession(model, tokenizer, found, **generation)


def _safe(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)


def _card(session: ChatSession) -> CharacterCard:
    return CharacterCard(**session.session_meta.model_dump())


def _json(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
