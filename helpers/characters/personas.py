"""Personas: `SessionMeta` (the four fields of CharacterGLM's prompt) and `CharacterCard` (with greeting, examples and source).

Whatever is wrong with a persona or its file is a `CharacterError` that names the field or the file.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import CharacterError
from ..paths import PROJECT_DIR

CHARACTERS_FILE = PROJECT_DIR / "data" / "characters.json"
DEFAULT_CHARACTER = "苏梦远"  # used when none is named
SYSTEM_CHARACTER = "角色"  # the name of a character that only a system message describes
MAX_FILE_BYTES = 20_000_000
MAX_TEXT = 100_000  # characters; what a model can take is counted in tokens, where the prompt is made


def _valid_unicode(text: str) -> str:
    text.encode("utf-8")  # half a surrogate pair raises a ValueError here, or much later in the tokenizer
    return text


Unicode = Annotated[str, AfterValidator(_valid_unicode)]
Name = Annotated[Unicode, StringConstraints(min_length=1, max_length=64, pattern=r"\S")]
Text = Annotated[
    Unicode, BeforeValidator(lambda value: "" if value is None else value), StringConstraints(max_length=MAX_TEXT)
]

Exchange = Annotated[list[Text], Field(min_length=2, max_length=2)]  # [query, response]


class SessionMeta(BaseModel):
    """Who talks to whom: CharacterGLM's `session_meta`. A plain dict with these keys is accepted everywhere.

    Texts are kept as given; the chat template turns line breaks into spaces and leaves an empty `*_info` line out.
    """

    model_config = ConfigDict(extra="ignore", strict=True, validate_assignment=True)

    bot_name: Name = Field(description="The character's name, at most 64 characters.")
    bot_info: Text = Field("", description="The character's persona.")
    user_name: Name = Field("用户", description="The name the user goes by.")
    user_info: Text = Field("", description="What the character knows about the user.")


class CharacterCard(SessionMeta):
    """A `SessionMeta` with the character's first line and where the character comes from."""

    greeting: Text = Field("", description="The character speaks first with this line, if it is not empty.")
    source: Text = Field("original", description="'original' or the public-domain work.")
    alternate_greetings: list[Text] = Field([], description="Other first lines.")
    openers: list[Text] = Field([], description="First lines that are offered to the reader.")
    face: Text = Field("", description="How a face is drawn for it, see `demo/faces.py`.")
    examples: list[Exchange] = Field([], description="[[query, response], ...]: how the character talks.")


def as_session_meta(value: SessionMeta | dict) -> SessionMeta:
    """`value` as a validated `SessionMeta`; a dict with a greeting becomes a `CharacterCard`."""
    if isinstance(value, SessionMeta):
        return value
    if not isinstance(value, dict):
        needed = "请给出含 bot_name、bot_info、user_name、user_info 的 dict"
        got = type(value).__name__
        raise CharacterError(f"缺少人设 session_meta [session_meta required]：{needed}，收到的是 {got}")
    return check_fields(CharacterCard if "greeting" in value else SessionMeta, value)


def load_characters(file: str | Path = CHARACTERS_FILE) -> dict[str, CharacterCard]:
    """All character cards of a JSON file, by name."""
    cards = read_json_object(Path(file))
    return {name: check_fields(CharacterCard, card, f"角色 {name} 的") for name, card in cards.items()}


def get_character(name: str, characters: dict[str, SessionMeta] | None = None) -> SessionMeta:
    """The card called `name`, by default a shipped one; the error for an unknown one lists the known names."""
    characters = load_characters() if characters is None else characters
    if name not in characters:
        raise CharacterError(f"没有叫 {name!r} 的角色 [unknown character]，可选：{'、'.join(characters)}")
    return characters[name]


def check_fields(model: type[BaseModel], fields: Any, whose: str = "") -> Any:
    """`fields` as a `model`; `CharacterError` that begins with `whose` and names the field at fault."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise CharacterError(f"{whose}人设不合格 [invalid persona]：{field_problems(error, '整体')}") from None


def field_problems(error: ValidationError, whole: str) -> str:
    """What pydantic found wrong, field by field, in one line; `whole` names a problem that belongs to no field."""

    def place(parts: tuple) -> str:  # pydantic also names the types it has tried, which are no field's name
        return ".".join(str(part) for part in parts if isinstance(part, int) or part.isidentifier()) or whole

    return "；".join(f"{place(e['loc'])}：{said(e)}" for e in error.errors())


# What pydantic calls a problem: what a reader is told, with its own figures. Anything rarer keeps pydantic's English.
PROBLEMS = {
    "missing": "没有给 [required]",
    "string_type": "应是一段文字 [not a text]",
    "string_too_short": "不能是空的 [must not be empty]",
    "string_pattern_mismatch": "不能只有空白 [must not be blank]",
    "string_too_long": "最多 {max_length} 个字 [at most {max_length} characters]",
    "too_short": "至少要有 {min_length} 项 [at least {min_length} items]",
    "too_long": "最多 {max_length} 项 [at most {max_length} items]",
    "list_type": "应是一个列表 [not a list]",
    "dict_type": "应是一个对象 [not an object]",
    "int_type": "应是整数 [not a whole number]",
    "float_type": "应是数字 [not a number]",
    "bool_type": "应是 true 或 false [true or false]",
    "finite_number": "应是有限的数 [not finite]",
    "greater_than": "应大于 {gt} [must be above {gt}]",
    "greater_than_equal": "至少是 {ge} [at least {ge}]",
    "less_than": "应小于 {lt} [must be below {lt}]",
    "less_than_equal": "最多是 {le} [at most {le}]",
}


def said(problem: dict) -> str:
    """One of pydantic's problems in the words of this project."""
    known = PROBLEMS.get(problem["type"])
    return known.format(**problem.get("ctx", {})) if known else problem["msg"]


def read_json_object(file: Path) -> dict:
    return parse_json_object(read_bytes(file), str(file))


def read_bytes(file: Path) -> bytes:
    """The content of a file, at most one byte more than `check_size` allows."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise CharacterError(f"找不到角色文件 [file not found]：{file}") from None
    except OSError as error:
        raise CharacterError(f"读不了角色文件 [cannot read file]：{file}（{error}）") from None


def parse_json_object(content: bytes, name: str = "") -> dict:
    """The JSON object in the content of a file called `name`."""
    check_size(content)
    try:
        parsed = json.loads(content.decode("utf-8-sig"))  # Windows editors begin a file with a mark
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CharacterError(f"角色文件不是有效的 UTF-8 JSON [invalid JSON]：{name}（{error}）") from None
    if not isinstance(parsed, dict):
        raise CharacterError(f"角色文件的内容不是 JSON 对象 [not a JSON object]：{name}")
    return parsed


def check_size(content: bytes) -> None:
    if len(content) > MAX_FILE_BYTES:
        raise CharacterError(f"文件太大 [file too large]：角色卡最多 {MAX_FILE_BYTES // 1_000_000} MB")
