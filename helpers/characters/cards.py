"""Character-card V2, the format of role-play front-ends, as JSON and inside a PNG: out and in."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Annotated

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, BeforeValidator

from ..errors import CharacterError
from .personas import CharacterCard, Name, Text, check_fields, check_size, parse_json_object, read_bytes

CARD_EXTENSION = "characterglm"  # where a character-card V2 keeps what V2 has no field for
# What V2 requires and CharacterGLM's prompt has no place for.
EMPTY_TEXTS = (
    *("personality", "scenario", "mes_example", "creator_notes", "system_prompt"),
    *("post_history_instructions", "creator"),
)
MAX_PIXELS = 25_000_000  # a picture of a few kilobytes can claim to have billions
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def export_card_v2(card: CharacterCard) -> dict:
    """`card` as a character-card V2 (the JSON format of role-play front-ends).

    Source: https://github.com/malfoyslastname/character-card-spec-v2
    """
    empty = dict.fromkeys(EMPTY_TEXTS, "") | {"alternate_greetings": [], "tags": [], "character_version": "1.0"}
    ours = {"user_name": card.user_name, "user_info": card.user_info, "source": card.source}
    written = {"name": card.bot_name, "description": card.bot_info, "first_mes": card.greeting}
    data = {**empty, **written, "extensions": {CARD_EXTENSION: ours}}
    return {"spec": "chara_card_v2", "spec_version": "2.0", "data": data}


def export_card_png(card: CharacterCard, picture: str | Path | None = None) -> bytes:
    """`card` as a PNG file with a character-card V2 inside, as role-play front-ends exchange them.

    It shows the image file `picture`, or by default a plain card in a colour of the character's own.
    """
    colour = f"hsl({sum(card.bot_name.encode()) % 360}, 45%, 60%)"
    image = Image.new("RGB", (256, 384), colour) if picture is None else _open_image(read_bytes(Path(picture)))
    card_json = json.dumps(export_card_v2(card), ensure_ascii=False)
    text = PngImagePlugin.PngInfo()
    text.add_text("chara", base64.b64encode(card_json.encode()).decode())
    file = io.BytesIO()
    image.convert("RGBA" if image.has_transparency_data else "RGB").save(file, "PNG", pnginfo=text)
    return file.getvalue()


def import_card_v2(card: dict | bytes | str | Path) -> CharacterCard:
    """A character-card V2 as a `CharacterCard`: a dict, or the path or content of a JSON or PNG file.

    `description`, `personality` and `scenario` become `bot_info`; `{{char}}` and `{{user}}` become the names. What
    CharacterGLM's prompt has no place for (example dialogues, system prompts, lore books) is left out.
    """
    if not isinstance(card, dict):
        name, content = ("", card) if isinstance(card, bytes) else (str(card), read_bytes(Path(card)))
        card = parse_json_object(_card_text(content) if content.startswith(PNG_SIGNATURE) else content, name)
    if card.get("spec") != "chara_card_v2":
        raise CharacterError("这不是 character card V2 [not a V2 card]：需要 spec='chara_card_v2'；V1 的卡请先转成 V2")
    data = check_fields(_CardData, card.get("data"), "V2 卡 data 的")
    ours = data.extensions.get(CARD_EXTENSION)
    persona = {"user_name": "用户", "source": "character card V2", **(ours if isinstance(ours, dict) else {})}
    info = " ".join(text for text in (data.description, data.personality, data.scenario) if text.strip())
    names = {"char": data.name, "bot": data.name, "user": persona["user_name"]}
    persona |= {"bot_name": data.name, "bot_info": _fill_names(info, names)}
    return check_fields(CharacterCard, persona | {"greeting": _fill_names(data.first_mes, names)})


class _CardData(BaseModel):  # what is used of a character-card V2
    name: Name
    description: Text = ""
    personality: Text = ""
    scenario: Text = ""
    first_mes: Text = ""
    extensions: Annotated[dict, BeforeValidator(lambda value: {} if value is None else value)] = {}


def _fill_names(text: str, names: dict[str, str]) -> str:
    """Replace {{char}}, <BOT>, {{user}} and <USER> in any case, as the V1 and V2 specifications ask for."""
    marks = re.compile(r"\{\{(char|user)\}\}|<(bot|user)>", re.IGNORECASE)
    return marks.sub(lambda mark: str(names[(mark[1] or mark[2]).lower()]), text)


def _card_text(png: bytes) -> bytes:
    """The JSON text of the card in a PNG file: base64 in the text chunk `chara`."""
    image = _open_image(png)
    if "chara" not in image.text:
        hint = "它只有 V3 的卡，请另存为 V2" if "ccv3" in image.text else "聊天软件转发图片时常会丢掉卡，请用原文件"
        raise CharacterError(f"这个 PNG 里没有角色卡 V2 [no card in PNG]：{hint}")
    try:
        return base64.b64decode(image.text["chara"], validate=True)
    except ValueError as error:
        raise CharacterError(f"PNG 里的角色卡已损坏 [damaged card]：不是 base64（{error}）") from None


def _open_image(content: bytes) -> Image.Image:
    """The decoded image; text chunks may stand at the end of a file, so all of it is read."""
    check_size(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise CharacterError(f"读不了这张图片 [damaged image]：{error}。请重新下载或另存一次") from None
    raise CharacterError(f"图片太大 [image too large]：{image.size}，最多 {MAX_PIXELS:,} 像素。请先缩小")
