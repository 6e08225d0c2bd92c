"""Character cards, the format of role-play front-ends: V1, V2 and V3 in, V2 and V3 out.

A card is a JSON object; files carry it as such, in a picture, or in an archive (`card_files`). Its texts hold macros
such as {{char}} (`macros`).
"""

import base64
import io
import json
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, BeforeValidator

from ..errors import CharacterError
from .card_files import card_json, chat_log, is_json, open_image
from .macros import example_turns, fill_macros
from .personas import (
    SYSTEM_CHARACTER,
    CharacterCard,
    Name,
    Text,
    check_fields,
    load_characters,
    parse_json_object,
    read_bytes,
)

CHAT_FORMAT = "characterglm-chat/1"  # of the conversations that `ChatSession.export` writes
CARD_EXTENSION = "characterglm"  # where a card keeps what the format has no field for
OURS = ("user_name", "user_info", "source", "openers", "face")  # what that is
SPECS = {"chara_card_v2": "2.0", "chara_card_v3": "3.0"}
# What the format requires and CharacterGLM's prompt has no place for.
EMPTY_TEXTS = (
    *("personality", "scenario", "creator_notes", "system_prompt"),
    *("post_history_instructions", "creator"),
)


def export_card_v2(card: CharacterCard) -> dict:
    """`card` as a character-card V2 (the JSON format of role-play front-ends).

    Source: https://github.com/malfoyslastname/character-card-spec-v2
    """
    empty = dict.fromkeys(EMPTY_TEXTS, "") | {"tags": [], "character_version": "1.0"}
    ours = {name: getattr(card, name) for name in OURS}
    lines = [f"{{{{user}}}}: {query}\n{{{{char}}}}: {response}" for query, response in card.examples]
    examples = "".join(f"<START>\n{line}\n" for line in lines)
    written = {"name": card.bot_name, "description": card.bot_info, "first_mes": card.greeting}
    more = {"mes_example": examples, "alternate_greetings": card.alternate_greetings}
    return _marked({**empty, **written, **more, "extensions": {CARD_EXTENSION: ours}}, "chara_card_v2")


def _marked(data: dict, spec: str) -> dict:
    return {"spec": spec, "spec_version": SPECS[spec], "data": data}


def export_card_png(card: CharacterCard, picture: str | Path | None = None) -> bytes:
    """`card` as a PNG file with the card inside as V2 and as V3, as SillyTavern writes it.

    It shows the image file `picture`, or by default a plain card in a colour of the character's own.
    Source of V3: https://github.com/kwaroran/character-card-spec-v3
    """
    colour = f"hsl({sum(card.bot_name.encode()) % 360}, 45%, 60%)"
    image = Image.new("RGB", (256, 384), colour) if picture is None else open_image(read_bytes(Path(picture)))
    v2 = export_card_v2(card)
    v3 = _marked(v2["data"] | {"group_only_greetings": []}, "chara_card_v3")
    text = PngImagePlugin.PngInfo()
    for keyword, content in {"chara": v2, "ccv3": v3}.items():
        text.add_text(keyword, base64.b64encode(json.dumps(content, ensure_ascii=False).encode()).decode())
    file = io.BytesIO()
    image.convert("RGBA" if image.has_transparency_data else "RGB").save(file, "PNG", pnginfo=text)
    return file.getvalue()


def import_card(card: dict | bytes | str | Path, seed: int = 0) -> CharacterCard:
    """A character card V1, V2 or V3 as a `CharacterCard`: a dict, or the path or content of a file.

    `description`, `personality` and `scenario` become `bot_info`, `mes_example` the `examples`. What CharacterGLM's
    prompt has no place for (system prompts, lore books) is left out.

    Args:
        card: the file may be JSON, a PNG, JPEG or WebP picture, or a `.charx` archive; its content decides, not its name.
        seed: chooses for {{random}} and {{pick}}.

    Raises:
        CharacterError: not a card, damaged, or a field is not what it should be.
    """
    if not isinstance(card, dict):
        name, content = ("", card) if isinstance(card, bytes) else (str(card), read_bytes(Path(card)))
        card = card_json(content, name)
    if not is_card(card):
        raise CharacterError(
            "这不是角色卡 [not a character card]：V1 卡有 name 和 description，V2、V3 卡有 spec 和 data，请检查文件"
        )
    flat = not isinstance(card.get("data"), dict)
    data = check_fields(_CardData, card if flat else card["data"], f"{'V1' if flat else card.get('spec')} 角色卡的")
    ours = data.extensions.get(CARD_EXTENSION)
    persona = {"user_name": "用户", "source": "character card", **(ours if isinstance(ours, dict) else {})}
    names = {"char": data.name, "user": check_fields(_Names, persona, "角色卡的").user_name}
    info = " ".join(text for text in (data.description, data.personality, data.scenario) if text.strip())
    persona |= {"bot_name": data.name, "bot_info": fill_macros(info, names, seed)}
    persona |= {"greeting": fill_macros(data.first_mes, names, seed)}
    persona |= {"alternate_greetings": [fill_macros(text, names, seed) for text in data.alternate_greetings]}
    return check_fields(CharacterCard, persona | {"examples": example_turns(data.mes_example, names, seed)})


import_card_v2 = import_card  # its name before V1 and V3 were read, too


def is_card(content: dict) -> bool:
    """Whether a JSON object is a character card: V2 and V3 name their `spec`, V1 is recognised by its fields."""
    if spec := content.get("spec"):
        return str(spec).startswith("chara_card_v") and ("data" in content or "name" in content)
    data = content["data"] if isinstance(content.get("data"), dict) else content
    return "name" in data and bool({"description", "personality", "first_mes", "scenario"} & data.keys())


def open_content(content: bytes) -> CharacterCard | dict:
    """What is in a file that a person opens: a card; or a JSON object: a persona, or a conversation to be restored.

    A chat log of SillyTavern becomes a conversation, with the shipped character of that name if there is one.
    """
    if is_json(content):
        if (log := chat_log(content)) is not None:
            return _conversation(log)
        found = parse_json_object(content)
        return import_card(found) if is_card(found) or "spec" in found else found
    return import_card(content)


def _conversation(log: dict) -> dict:
    """A chat log in the form that `ChatSession.export` gives."""
    bot_name, user_name = log["names"]
    persona = load_characters().get(bot_name) or CharacterCard(bot_name=bot_name or SYSTEM_CHARACTER)
    meta = persona.model_dump() | ({"user_name": user_name} if user_name else {})
    return {"format": CHAT_FORMAT, "session_meta": meta, "history": log["history"], "generation": {}}


def _none_is(empty: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: empty if value is None else value)


class _Names(BaseModel):
    user_name: Name


class _CardData(BaseModel):  # what is used of a card
    name: Name
    description: Text = ""
    personality: Text = ""
    scenario: Text = ""
    first_mes: Text = ""
    mes_example: Text = ""
    alternate_greetings: Annotated[list[Text], _none_is([])] = []
    extensions: Annotated[dict, _none_is({})] = {}
