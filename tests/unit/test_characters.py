"""Personas: the shipped cards, validation that names the field, and character cards V1 to V3, in and out."""

import base64
import io
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

import helpers
from helpers.characters.cards import open_content
from helpers.characters.macros import CardWarning, example_turns, fill_macros
from helpers.characters.personas import CHARACTERS_FILE, MAX_TEXT, CharacterCard, SessionMeta, as_session_meta
from helpers.demo.faces import face
from helpers.demo.files import open_file
from helpers.errors import CharacterError

META = {"bot_name": "阿九", "bot_info": "飞船", "user_name": "林舟", "user_info": "船长"}

# The fields of `data` that the specification requires, with their types (character_book is optional).
V2_FIELDS = {
    **dict.fromkeys(("name", "description", "personality", "scenario", "first_mes", "mes_example"), str),
    **dict.fromkeys(("creator_notes", "system_prompt", "post_history_instructions"), str),
    **dict.fromkeys(("creator", "character_version"), str),
    **dict.fromkeys(("alternate_greetings", "tags"), list),
    "extensions": dict,
}


@pytest.fixture
def foreign_card():
    """A card as another program writes it: placeholders, lore book, fields of its own, no extension of ours."""
    return {
        "spec": "chara_card_v2",
        "spec_version": "2.0",
        "create_date": "2024-1-1",
        "data": {
            "name": "Seraphina",
            "description": "{{char}} guards the forest. {{USER}} was hurt.",
            "personality": "kind",
            "scenario": "<BOT> finds <user>.",
            "first_mes": "*{{Char}} smiles.* Hello, {{user}}!",
            "mes_example": "<START>\n{{user}}: hi",
            "character_book": {"entries": []},
            "system_prompt": "Write {{char}}'s next reply.",
            "talkativeness": "0.5",
            "tags": ["fantasy"],
        },
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# --- the shipped cards


def test_shipped_cards():
    cards = helpers.load_characters()
    assert len(cards) >= 12
    for name, card in cards.items():
        assert card.bot_name == name
        texts = (card.bot_name, card.bot_info, card.user_name, card.user_info, card.greeting)
        assert all(text.strip() == text != "" for text in texts), name
        assert not any(text.splitlines()[1:] for text in texts), f"{name}: the prompt has one line a field"
        assert card.source
    assert cards["苏梦远"].user_name == "陆星辰"


def test_no_shipped_name_comes_twice():
    names = []
    json.loads(
        CHARACTERS_FILE.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: names.extend(k for k, _ in pairs)
    )
    cards = [name for name in names if name not in CharacterCard.model_fields]
    assert len(cards) == len(set(cards)) >= 12


def test_shipped_personas_and_greetings_all_differ():
    cards = helpers.load_characters().values()
    for field in ("bot_info", "user_info", "greeting"):
        assert len({getattr(card, field) for card in cards}) == len(cards), field


def test_get_character():
    assert helpers.get_character("林黛玉") == helpers.load_characters()["林黛玉"]
    with pytest.raises(CharacterError, match="unknown character.*苏梦远.*林黛玉"):
        helpers.get_character("林代玉")


# --- validation


@pytest.mark.parametrize("field", META)
@pytest.mark.parametrize(
    "value", [5, ["x"], {}, True, b"x", "\ud800", "长" * (MAX_TEXT + 1)], ids=lambda v: repr(v)[:10]
)
def test_invalid_field_is_named(field, value):
    with pytest.raises(CharacterError, match=f"invalid persona.*{field}"):
        as_session_meta({**META, field: value})


@pytest.mark.parametrize("field", ["bot_name", "user_name"])
@pytest.mark.parametrize("value", ["", "  ", "\n", None, "名" * 65])
def test_a_name_is_needed(field, value):
    with pytest.raises(CharacterError, match=field):
        as_session_meta({**META, field: value})


def test_missing_bot_name_is_named():
    with pytest.raises(CharacterError, match="bot_name"):
        as_session_meta({"bot_info": "飞船"})


@pytest.mark.parametrize("value", [None, "阿九", 5, [META]])
def test_a_persona_is_a_dict_or_a_session_meta(value):
    with pytest.raises(CharacterError, match=f"session_meta required.*{type(value).__name__}"):
        as_session_meta(value)


def test_none_is_an_empty_text():
    meta = as_session_meta({**META, "bot_info": None, "user_info": None})
    assert (meta.bot_info, meta.user_info) == ("", "")


def test_defaults_and_unknown_keys():
    assert as_session_meta({"bot_name": "阿九", "extra": 1}) == SessionMeta(bot_name="阿九", user_name="用户")


def test_a_dict_with_a_greeting_is_a_card():
    assert as_session_meta({**META, "greeting": "你来了"}) == CharacterCard(**META, greeting="你来了")


def test_texts_are_kept_as_given():
    text = "  第一行\n第二行 <b> </s> [MASK] 😀"
    assert as_session_meta({**META, "bot_info": text}).bot_info == text


def test_a_persona_stays_valid_when_it_is_changed():
    meta = SessionMeta(**META)
    with pytest.raises(ValueError, match="bot_name"):
        meta.bot_name = ""
    assert meta.bot_name == "阿九"


# --- files


def test_cards_from_a_file_of_ones_own(tmp_path):
    file = write(tmp_path / "mine.json", {"阿九": META})
    assert helpers.load_characters(file) == {"阿九": CharacterCard(**META)}


def test_file_from_a_windows_editor(tmp_path):
    file = tmp_path / "bom.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"阿九": META}).encode())
    assert list(helpers.load_characters(file)) == ["阿九"]


@pytest.mark.parametrize("card, problem", [({**META, "bot_info": 5}, "bot_info"), ("文字", "整体"), ([], "整体")])
def test_invalid_card_in_a_file_is_named(tmp_path, card, problem):
    file = write(tmp_path / "cards.json", {"好的": META, "坏的": card})
    with pytest.raises(CharacterError, match=f"坏的.*{problem}"):
        helpers.load_characters(file)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"x"', "[" * 100_000], ids=lambda c: c[:6])
@pytest.mark.parametrize("read", [helpers.load_characters, helpers.import_card])
def test_junk_file_is_refused(tmp_path, read, content):
    with pytest.raises(CharacterError, match="junk.json"):
        read(write(tmp_path / "junk.json", content))


@pytest.mark.parametrize("read", [helpers.load_characters, helpers.import_card])
def test_unreadable_file_is_refused(tmp_path, read):
    binary = tmp_path / "card.json"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(CharacterError, match="invalid JSON"):
        read(binary)
    with pytest.raises(CharacterError, match="file not found"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(CharacterError, match="cannot read"):
        read(tmp_path)
    binary.write_bytes(b" " * 20_000_001)
    with pytest.raises(CharacterError, match="file too large"):
        read(binary)


# --- character-card V2


@pytest.mark.parametrize("card", helpers.load_characters().values(), ids=lambda card: card.bot_name)
def test_v2_round_trip(card, tmp_path):
    exported = helpers.export_card_v2(card)
    assert helpers.import_card(exported) == card
    assert helpers.import_card(str(write(tmp_path / "card.json", exported))) == card


def test_v2_export_has_what_the_specification_requires():
    card = CharacterCard(**META, greeting="你来了")
    exported = helpers.export_card_v2(card)
    assert (exported["spec"], exported["spec_version"]) == ("chara_card_v2", "2.0")
    assert set(exported) == {"spec", "spec_version", "data"}
    assert {field: type(value) for field, value in exported["data"].items()} == V2_FIELDS
    assert exported["data"]["name"] == "阿九"
    assert exported["data"]["description"] == "飞船"
    assert exported["data"]["first_mes"] == "你来了"


def test_import_of_a_foreign_card(foreign_card):
    card = helpers.import_card(foreign_card)
    assert card.bot_name == "Seraphina"
    assert card.user_name == "用户"
    assert card.bot_info == "Seraphina guards the forest. 用户 was hurt. kind Seraphina finds 用户."
    assert card.greeting == "*Seraphina smiles.* Hello, 用户!"
    assert card.source == "character card"
    assert card.examples == []  # "hi" has no answer


def test_placeholders_are_filled_once(foreign_card):
    foreign_card["data"] |= {"name": "{{user}}", "description": "{{char}} and <USER>"}
    assert helpers.import_card(foreign_card).bot_info.startswith("{{user}} and 用户")


@pytest.mark.parametrize("extensions", [None, {}, {"characterglm": None}, {"characterglm": "x"}, {"depth_prompt": {}}])
def test_other_extensions_do_no_harm(foreign_card, extensions):
    foreign_card["data"]["extensions"] = extensions
    assert helpers.import_card(foreign_card).user_name == "用户"


def test_fields_may_be_null_or_missing(foreign_card):
    foreign_card["data"] = {"name": "Seraphina", "description": None, "first_mes": None}
    card = helpers.import_card(foreign_card)
    assert (card.bot_info, card.greeting) == ("", "")


@pytest.mark.parametrize(
    "field, value",
    [
        *(("name", value) for value in (None, "", 5, ["x"], "x" * 65)),
        *((field, 5) for field in ("description", "personality", "scenario", "first_mes")),
        ("description", ["a", "b"]),
        ("extensions", "x"),
    ],
)
def test_wrong_type_in_a_foreign_card_is_named(foreign_card, field, value):
    foreign_card["data"][field] = value
    with pytest.raises(CharacterError, match=rf"chara_card_v2.*invalid persona.*{field}"):
        helpers.import_card(foreign_card)


def test_wrong_type_in_our_extension_is_named(foreign_card):
    foreign_card["data"]["extensions"] = {"characterglm": {"user_name": None}}
    with pytest.raises(CharacterError, match="user_name"):
        helpers.import_card(foreign_card)


def test_too_long_a_persona_is_named(foreign_card):
    foreign_card["data"] |= {"description": "x" * 60_000, "personality": "y" * 60_000}
    with pytest.raises(CharacterError, match="bot_info.*100000"):
        helpers.import_card(foreign_card)


@pytest.mark.parametrize("data", [None, "x", [], 5])
def test_v2_card_without_data_is_refused(foreign_card, data):
    with pytest.raises(CharacterError, match="invalid persona.*name"):
        helpers.import_card({**foreign_card, "data": data})


@pytest.mark.parametrize("card", [{}, {"spec": "lorebook_v3", "data": {"name": "x"}}, {"name": "x"}, {"spec": "x"}])
def test_other_json_is_no_card(card):
    with pytest.raises(CharacterError, match="not a character card"):
        helpers.import_card(card)


# --- cards in a PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, size=(1, 1)) -> bytes:
    """A grey PNG file with these chunks after the picture, where other programs write the card."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + b"".join(chunks) + chunk(b"IEND", b"")


def chara(text: bytes) -> bytes:
    return chunk(b"tEXt", b"chara\0" + text)


@pytest.mark.parametrize("card", helpers.load_characters().values(), ids=lambda card: card.bot_name)
def test_png_round_trip(card, tmp_path):
    content = helpers.export_card_png(card)
    assert len(content) < 10_000
    assert helpers.import_card(content) == card
    file = tmp_path / "card.anything"
    file.write_bytes(content)
    assert helpers.import_card(file) == helpers.import_card(str(file)) == card


def test_png_shows_the_given_picture_and_only_the_new_card(tmp_path):
    old, new = (CharacterCard(**{**META, "bot_name": name}) for name in ("旧名", "新名"))
    picture = tmp_path / "old.png"
    Image.open(io.BytesIO(helpers.export_card_png(old))).resize((30, 40)).save(picture)
    content = helpers.export_card_png(new, picture)
    assert helpers.import_card(content) == new
    assert Image.open(io.BytesIO(content)).size == (30, 40)


def test_png_of_another_program(foreign_card):
    text = base64.b64encode(json.dumps(foreign_card).encode())
    assert helpers.import_card(png(chara(text))).bot_name == "Seraphina"


def test_card_from_the_content_of_a_json_file(foreign_card):
    assert helpers.import_card(json.dumps(foreign_card).encode()).bot_name == "Seraphina"


GOOD = base64.b64encode(json.dumps(helpers.export_card_v2(CharacterCard(**META))).encode())


@pytest.mark.parametrize(
    "content, problem",
    [
        (png(), "no card in picture.*聊天软件"),
        (png(chara(b"!!!")), "damaged card"),
        (png(chara("é".encode("latin-1"))), "damaged card"),
        (png(chara(GOOD[:-5])), "damaged card|invalid JSON"),
        (png(chara(base64.b64encode(b"\xff{"))), "invalid JSON"),
        (png(chara(base64.b64encode(b"[1]"))), "not a JSON object"),
        (png(chara(base64.b64encode(b'{"name": "V1"}'))), "not a character card"),
        (png(chunk(b"zTXt", b"chara\0\0" + zlib.compress(b"A" * 100_000_000))), "file too large"),
        (png(chunk(b"zTXt", b"chara\0\0not zlib")), "damaged card"),
        (png(chara(GOOD))[:30], "no card in picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 50, "no card in picture"),
        (b"GIF89a", "damaged image"),
        (b" " * 20_000_001, "file too large"),
        (b"\x89PNG\r\n\x1a\n" + b" " * 20_000_001, "file too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_png_is_refused(content, problem):
    with pytest.raises(CharacterError, match=problem):
        helpers.import_card(content)


def test_picture_that_cannot_be_read_is_refused(tmp_path):
    text = write(tmp_path / "picture.png", "%!PS-Adobe-3.0 EPSF-3.0")
    with pytest.raises(CharacterError, match="damaged image"):
        helpers.export_card_png(CharacterCard(**META), text)
    with pytest.raises(CharacterError, match="file not found"):
        helpers.export_card_png(CharacterCard(**META), tmp_path / "nowhere.png")


# --- cards as they are found

CLIENTS = Path(__file__).parents[1] / "clients" / "cards"
V3 = {"spec": "chara_card_v3", "spec_version": "3.0"}


@pytest.mark.parametrize("file", ["st119_export.json", "st119_export.png", "v1.json"])
def test_cards_of_sillytavern(file):
    card = helpers.import_card(CLIENTS / file)
    assert (card.bot_name, card.bot_info, card.greeting) == ("V1er", "v1 d kind forest", "yo")


def test_round_trip_through_sillytavern_changes_nothing():
    then = {"openers": [], "face": ""}  # cards had none when the file was made
    card = helpers.get_character("苏梦远").model_copy(update=then)
    assert helpers.import_card(CLIENTS / "st119_sumengyuan_roundtrip.png") == card


def test_a_picture_without_a_card():
    with pytest.raises(CharacterError, match="no card in picture.*聊天软件"):
        helpers.import_card(CLIENTS / "reencoded.jpg")


def test_a_png_holds_both_specs():
    text = Image.open(io.BytesIO(helpers.export_card_png(CharacterCard(**META)))).text
    specs = [json.loads(base64.b64decode(text[key]))["spec"] for key in ("chara", "ccv3")]
    assert specs == ["chara_card_v2", "chara_card_v3"]


def packed(name, spec="chara_card_v2", **fields) -> bytes:
    return base64.b64encode(json.dumps({"spec": spec, "data": {"name": name, **fields}}).encode())


def test_the_newer_card_counts():
    v3, old = (chunk(b"tEXt", b"ccv3\0" + packed("three", "chara_card_v3", modification_date=n)) for n in (200, 100))
    assert helpers.import_card(png(chara(packed("two")), v3)).bot_name == "three"
    assert helpers.import_card(png(chara(packed("two", modification_date=150)), old)).bot_name == "two"
    assert helpers.import_card(png(v3)).bot_name == "three"


@pytest.mark.parametrize(
    "text", [GOOD.rstrip(b"="), GOOD[:40] + b"\r\n" + GOOD[40:], GOOD.translate(bytes.maketrans(b"+/", b"-_"))]
)
@pytest.mark.parametrize("keyword", [b"chara", b"Chara", b"CCV3"])
def test_lenient_text_chunks(text, keyword):
    compressed = chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))
    international = chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text)
    for written in (chunk(b"tEXt", keyword + b"\0" + text), compressed, international):
        assert helpers.import_card(png(written)).bot_name == "阿九"


def test_a_large_compressed_card():
    fields = {"character_book": {"entries": [{"content": f"{n} 条"} for n in range(100_000)]}}
    large = chunk(b"zTXt", b"chara\0\0" + zlib.compress(packed("big", **fields)))
    assert helpers.import_card(png(large)).bot_name == "big"


def archive(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name.replace("_", "."), content)
    return file.getvalue()


def test_charx():
    assert (
        helpers.import_card(archive(card_json=json.dumps({**V3, "data": META | {"name": "x"}}).encode())).bot_name
        == "x"
    )
    for bad, problem in [
        (archive(other_json=b"{}"), "no card in archive"),
        (archive(card_json=b"A" * 20_000_001), "file too large"),
        (archive(card_json=b"{}").replace(b"PK\x03\x04", b"PK\0\0"), "damaged archive"),
    ]:
        with pytest.raises(CharacterError, match=problem):
            helpers.import_card(bad)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("prefix", [b"", b"ASCII\0\0\0"])
def test_card_in_exif(kind, prefix):
    file, exif = io.BytesIO(), Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = prefix + GOOD
    Image.new("RGB", (8, 8)).save(file, kind, exif=exif)
    assert helpers.import_card(file.getvalue()).bot_name == "阿九"


def test_greetings_and_examples_survive(tmp_path):
    examples = [["你好", "嗯"], ["冷吗", "习惯了"]]
    card = CharacterCard(**META, greeting="一", alternate_greetings=["二", "三"], examples=examples)
    assert helpers.import_card(helpers.export_card_png(card)) == card


def test_a_long_card_opens():
    assert len(helpers.import_card({"name": "x", "description": "diary " * 2000}).bot_info) == 12_000


def test_chat_log_of_sillytavern_is_a_conversation():
    found = open_content((CLIENTS / "st_chat.jsonl").read_bytes())
    assert found["session_meta"]["bot_name"] == "苏梦远" and found["session_meta"]["user_name"] == "Anon"
    assert found["history"][0] == ["", "陆导您好！今天我们一起聊点什么呢？"]
    assert found["history"][1][0] == "你好，最近怎么样？" and "原来是冷啊。" in found["history"][1][1]


# --- macros

NAMES = {"char": "阿青", "user": "旅人"}


@pytest.mark.parametrize(
    "text, filled",
    [
        ("{{ Char }} 和 {{USER}}", "阿青 和 旅人"),
        ("a{{// a note}}b{{comment: x}}c{{original}}", "abc"),
        ("a \n{{trim}}\n b", "ab"),
        ("{{random:x,x}}{{random::y::y}}{{pick::z}}", "xyz"),
        ("{{random:{{char}},{{pick:{{char}},阿青}}}}", "阿青"),
        ("<START>{{newline}}x", "\nx"),
    ],
)
def test_macros(text, filled):
    assert fill_macros(text, NAMES) == filled


def test_random_is_chosen_once_by_seed():
    text = "{{random:a,b,c,d,e,f,g,h}}" * 5
    chosen = {fill_macros(text, NAMES, seed) for seed in (1, 1, 2, 3)}
    assert len(chosen) == 3 and all(len(choice) == 5 for choice in chosen)


def test_unknown_macros_stay_and_are_named():
    with pytest.warns(CardWarning, match="unknown macro.*{{getvar::x}}"):
        assert fill_macros("{{getvar::x}} {{char}}", NAMES) == "{{getvar::x}} 阿青"


def test_example_dialogues_become_turns():
    text = "<START>\n{{user}}: 你叫什么？\n{{char}}: 阿青。\n*低头*\n{{char}}: 你呢？\n<start>\n{{user}}:冷吗？\n{{char}}: 习惯了。\n{{user}}: 再见"
    assert example_turns(text, NAMES) == [["你叫什么？", "阿青。 *低头* 你呢？"], ["冷吗？", "习惯了。"]]
    assert example_turns("{{char}}: 来了", NAMES) == [["", "来了"]]
    assert example_turns("没有名字的一段话", NAMES) == []


def test_a_cards_own_picture_is_its_face(tmp_path):
    nano = helpers.load("nano")
    picture = tmp_path / "red.png"
    image = Image.new("RGB", (300, 400), "red")
    image.putpixel((0, 399), (0, 0, 255))
    image.save(picture)
    png = helpers.export_card_png(CharacterCard(bot_name="小满", bot_info="守灯塔。"), picture)
    meta = open_file(*nano, png).session_meta
    shown = re.fullmatch(
        r'<image href="data:image/jpeg;base64,(.+?)" width="48" height="48"/>', face("小满", meta.face)
    )
    (red, green, blue) = Image.open(io.BytesIO(base64.b64decode(shown[1]))).getpixel((48, 48))
    assert red > 240 > 15 > max(green, blue)
    assert (
        open_file(*nano, helpers.export_card_png(helpers.get_character("李白"), picture)).session_meta.face
        == "bun beard"
    )
    assert open_file(*nano, helpers.export_card_png(CharacterCard(bot_name="小满"))).session_meta.face == "", (
        "one plain colour"
    )
    broken = png[: png.index(b"IDAT") + 12] + bytes(64) + png[png.index(b"IDAT") + 76 :]
    assert open_file(*nano, broken).session_meta.bot_name == "小满"


@pytest.mark.parametrize(
    "features", ["data:image/svg+xml;base64,PHN2Zz4=", 'data:image/jpeg;base64,a"/><script>', "<b>"]
)
def test_no_other_picture_is_shown(features):
    assert (
        "image" not in face("小满", features)
        and "<script" not in face("小满", features)
        and "<b>" not in face("小满", features)
    )
