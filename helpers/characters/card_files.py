"""Where the JSON of a character card stands in a file: by itself, in a PNG, JPEG or WebP picture, or in a .charx archive.

Programs differ in how they write it, so this reads leniently: wrapped, URL-safe or unpadded base64, chunk names in any
case. Nothing is unpacked beyond `MAX_FILE_BYTES`.
"""

import base64
import binascii
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

from ..errors import CharacterError
from .personas import MAX_FILE_BYTES, check_size, parse_json_object

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
OTHER_PICTURES = (b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")  # beginnings of JPEG, GIF, WebP, BMP
MAX_PIXELS = 25_000_000  # a picture of a few kilobytes can claim to have billions
CHARX_CARD = "card.json"
NO_CARD = "这张图片里没有角色卡 [no card in picture]：聊天软件转发图片时常会丢掉卡，请用原文件"


def card_json(content: bytes, name: str = "") -> dict:
    """The JSON object in the content of a file called `name`; `CharacterError` says what is wrong with the file."""
    check_size(content)
    if content.startswith(PNG_SIGNATURE):
        return _newest([_decoded(text) for text in _png_cards(content)])
    if zipfile.is_zipfile(io.BytesIO(content)):
        return parse_json_object(_charx_card(content), CHARX_CARD)
    if content.startswith(OTHER_PICTURES):
        return _newest([_decoded(text) for text in _exif_cards(content)])
    return parse_json_object(content, name)


def is_json(content: bytes) -> bool:
    """Whether it is text: neither a picture nor an archive."""
    return content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def is_picture(content: bytes) -> bool:
    return content.startswith((PNG_SIGNATURE, *OTHER_PICTURES))


def _newest(cards: list[dict]) -> dict:
    """Of a V2 and a V3 card in one file the one that was written later; of the same age the V3, which can hold more."""

    def age(card: dict) -> tuple:
        data = card.get("data") if isinstance(card.get("data"), dict) else {}
        date = data.get("modification_date")
        return (date if isinstance(date, int | float) else 0, card.get("spec") == "chara_card_v3")

    if not cards:
        raise CharacterError(NO_CARD)
    return max(cards, key=age)


def _decoded(text: bytes) -> dict:
    """The card in a text, which is base64 or the JSON itself."""
    if not is_json(text):
        letters = re.sub(rb"\s+", b"", text).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        try:
            text = base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
        except binascii.Error as error:
            raise CharacterError(f"图片里的角色卡已损坏 [damaged card]：不是 base64（{error}）") from None
    return parse_json_object(text, "图片里的角色卡")


def _png_cards(png: bytes) -> Iterator[bytes]:
    """The texts of the chunks `chara` (V1 and V2) and `ccv3` (V3), compressed or not."""
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        chunk, place = png[place + 8 : place + 8 + length], place + 12 + length
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = chunk.partition(b"\0")
            if keyword.lower() in (b"chara", b"ccv3"):
                yield _chunk_text(kind, rest)


def _chunk_text(kind: bytes, rest: bytes) -> bytes:
    """The text of a chunk, from what follows its keyword."""
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _inflated(rest[1:])
    text = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated keyword
    return _inflated(text) if rest[:1] == b"\1" else text


def _inflated(packed: bytes) -> bytes:
    try:
        text = zlib.decompressobj().decompress(packed, MAX_FILE_BYTES + 1)
    except zlib.error as error:
        raise CharacterError(f"图片里的角色卡已损坏 [damaged card]：{error}。请用原文件") from None
    check_size(text)
    return text


def _charx_card(archive: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened, opened.open(CHARX_CARD) as card:
            return card.read(MAX_FILE_BYTES + 1)
    except KeyError:
        raise CharacterError(f"压缩包里没有 {CHARX_CARD} [no card in archive]：.charx 文件里应有它") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CharacterError(f"打不开这个压缩包 [damaged archive]：{error}。请重新下载") from None


def _exif_cards(picture: bytes) -> Iterator[bytes]:
    """The comment of a JPEG or WebP picture, if it looks like a card."""
    image = open_image(picture, decode=False)
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except (OSError, SyntaxError, ValueError, struct.error):  # EXIF that cannot be read is none
        return
    comment = comment.encode() if isinstance(comment, str) else bytes(comment)
    charset, text = comment[:8].rstrip(b"\0"), comment[8:]
    if charset == b"UNICODE":
        text = text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-16-be", "replace").encode()
    elif charset not in (b"ASCII", b""):
        text = comment
    if text.strip(b"\0 "):
        yield text.strip(b"\0 ")


def open_image(content: bytes, decode: bool = True) -> Image.Image:
    """The picture, with `decode` all of it. Raises CharacterError: damaged, of another kind, or too large."""
    check_size(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
        if image.width * image.height <= MAX_PIXELS:
            if decode:
                image.load()
            return image
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise CharacterError(f"读不了这张图片 [damaged image]：{error}。请重新下载或另存一次") from None
    raise CharacterError(f"图片太大 [image too large]：{image.size}，最多 {MAX_PIXELS:,} 像素。请先缩小")


def chat_log(content: bytes) -> dict | None:
    """A chat log of SillyTavern (.jsonl) as `{"names": (bot, user), "history": [[query, response], ...]}`; else None."""
    check_size(content)
    try:
        lines = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return None
    first = lines[0] if lines and isinstance(lines[0], dict) else {}
    if not {"user_name", "chat_metadata"} & first.keys() or "bot_name" in first:  # a persona has a user_name, too
        return None
    names: dict[bool, str] = {}
    history: list[list[str]] = []
    for line in lines[1:]:
        said = line.get("mes") if isinstance(line, dict) else None
        if not isinstance(said, str) or not said.strip() or line.get("is_system"):
            continue
        by_user = bool(line.get("is_user"))
        names.setdefault(by_user, str(line.get("name") or ""))
        if by_user or not history:
            history.append([said, ""] if by_user else ["", said])
        else:
            history[-1][1] = f"{history[-1][1]} {said}".strip()
    return {"names": (names.get(False), names.get(True)), "history": history}
