"""Training data: conversations in the shapes that people keep them in, every bad row named by line and cause."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, StringConstraints, TypeAdapter, ValidationError

from ..characters.cards import open_content
from ..characters.dialogues import Dialogue, load_dialogues
from ..characters.personas import (
    SYSTEM_CHARACTER,
    SessionMeta,
    Unicode,
    as_session_meta,
    field_problems,
    load_characters,
    read_bytes,
)
from ..errors import CharacterError, DataError
from .report import BadRow, DataReport
from .rows import read_rows

# What pydantic calls a problem -> our cause; anything else is a wrong type.
CAUSE_OF_ERROR = {
    "missing": "missing field",
    "string_pattern_mismatch": "empty",
    "too_short": "empty",
    "string_unicode": "broken encoding",
    "value_error": "broken encoding",
}
# The names under which files keep the four fields of a persona when there is no `session_meta`.
PROFILE_NAMES = {
    "bot_name": ("bot_name", "character_name"),
    "bot_info": ("bot_info", "bot_profile", "character_profile"),
    "user_name": ("user_name",),
    "user_info": ("user_info", "user_profile"),
}
PERSONA_KEYS = {"id", "session_meta", "system", *(name for names in PROFILE_NAMES.values() for name in names)}
BOT_SPEAKERS, USER_SPEAKERS = {"assistant", "bot", "character", "gpt"}, {"user", "human"}


@dataclass(frozen=True)
class Sample(Dialogue):
    """A conversation to train on, and the line of the file that it begins in.

    Its `id` is the row's own, else the first thing the user says: rows that begin with the same words then fall on the
    same side of the split (`held_out`), whatever their order in the file.
    """

    line: int


# --- 1. The shapes of a row: each becomes a list of (speaker, text)


def _join_parts(content: Any) -> Any:
    # Multimodal data keeps a text in parts. Anything but text parts is left as it is, for pydantic to refuse.
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


Line = Annotated[Unicode, StringConstraints(pattern=r"\S")]
Pairs = list[tuple[Unicode, Line]]


class _Single(BaseModel):
    question: Unicode | None = Field(validation_alias=AliasChoices("instruction", "prompt", "content"))
    input: Unicode | None = ""
    reply: Line = Field(validation_alias=AliasChoices("output", "response", "summary"))
    history: Pairs | None = None


class _Turn(BaseModel):
    speaker: Line = Field(validation_alias=AliasChoices("role", "from", "speaker"))
    text: Annotated[Line, BeforeValidator(_join_parts)] = Field(
        validation_alias=AliasChoices("content", "value", "utterance")
    )


PAIRS = TypeAdapter(Annotated[Pairs, Field(min_length=1)])
TURNS = TypeAdapter(Annotated[list[_Turn], Field(min_length=1)])
LISTS = ("messages", "conversations", "dialogue", "history")
SINGLES = {"instruction": "output", "prompt": "response", "content": "summary"}


def _read_shape(row: dict) -> tuple[list[tuple[str, str]], set[str]]:
    """What is said in a row, and the fields that say it."""
    single = {*SINGLES, *SINGLES.values()}
    found = [name for name in LISTS if name in row]
    if not set(found) - {"history"} and single & row.keys():
        return _from_single(_Single.model_validate(row)), single | {"input", "history"}
    if not found:
        shapes = [*("/".join(pair) for pair in SINGLES.items()), *LISTS]
        raise BadRow("unknown format", f"字段是 {'、'.join(map(str, row))}；认识的有 {'、'.join(shapes)}")
    name, turns = found[0], row[found[0]]
    if name == "history" and not (isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns)):
        return _from_pairs(turns), {name}
    return [(turn.speaker, turn.text) for turn in TURNS.validate_python(turns)], {name}


def _from_single(single: _Single) -> list[tuple[str, str]]:
    question = "\n".join(text for text in (single.question, single.input) if text and text.strip())
    if not question:
        raise BadRow("empty", "没有一句用户的话")
    return _from_pairs([*(single.history or []), (question, single.reply)])


def _from_pairs(pairs: list) -> list[tuple[str, str]]:
    pairs = PAIRS.validate_python(pairs)
    if any(not query.strip() for query, _ in pairs[1:]):
        raise BadRow("empty", "只有第一轮的 query 可以为空（角色先开口）")
    said = [said for query, reply in pairs for said in (("user", query), ("assistant", reply))]
    return said if pairs[0][0].strip() else said[1:]


# --- 2. From rows to samples


def load_samples(file, card=None, *, on_bad_row: Literal["skip", "raise"] = "skip") -> tuple[list[Sample], DataReport]:
    """The conversations of a data file (see `data/lora/README.md` for the shapes), and a report on what was left out.

    Args:
        card: a `SessionMeta` or a dict: the persona of rows that do not bring their own.
        on_bad_row: "skip" leaves bad rows out, "raise" refuses the file, as if no row were usable.

    Raises:
        DataError: the file cannot be read, or has no usable row.
    """
    if on_bad_row not in ("skip", "raise"):
        raise DataError(f"on_bad_row 应为 'skip' 或 'raise' [invalid on_bad_row]，收到 {on_bad_row!r}")
    card = None if card is None else as_session_meta(card)
    report, samples, seen = DataReport(Path(file).name), [], set()
    for line, row in read_rows(Path(file), report.notes):
        report.rows += 1
        try:
            sample, unused = _parse_row(row, line, card)
            content = _content(sample)
            if content in seen:
                raise BadRow("duplicate", f"{sample.history[-1][1]:.40}")
        except BadRow as bad:
            report.add(line, bad)
        else:
            seen.add(content)
            samples.append(sample)
            report.unused.update(unused)
    described = sum(sample.card.bot_name == SYSTEM_CHARACTER for sample in samples)
    if described and card is not None:
        report.notes.append(f"{described} 行的人设取自 system，没有用 card [persona from system]")
    report.check(on_bad_row, samples)
    return samples, report


def _parse_row(row: Any, line: int, card: SessionMeta | None) -> tuple[Sample, list[str]]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong type", f"应是 JSON 对象，收到 {type(row).__name__}")
    if "\ufffd" in json.dumps(row, ensure_ascii=False, default=str):
        raise BadRow("broken encoding", "含有无法解码的字节；请把文件另存为 UTF-8")
    try:
        said, keys = _read_shape(row)
        system = [str(row.get("system") or ""), *(text for speaker, text in said if speaker == "system")]
        meta = _persona(row, card, " ".join(filter(str.strip, system)))
    except ValidationError as error:
        cause = CAUSE_OF_ERROR.get(error.errors()[0]["type"], "wrong type")
        raise BadRow(cause, field_problems(error, "整行")) from None
    except CharacterError as error:
        raise BadRow("wrong type", str(error)) from None
    history = _pair([(_is_bot(speaker, meta), text) for speaker, text in said if speaker != "system"])
    own_id = row.get("id")
    first_words = next(query for query, _ in history if query)
    unused = [str(name) for name in row.keys() - keys - PERSONA_KEYS if row[name] not in (None, "", [])]
    return Sample(first_words.strip() if own_id in (None, "") else str(own_id), meta, history, line), unused


def _persona(row: dict, card: SessionMeta | None, system: str) -> SessionMeta:
    """Of the row itself, else what its system text describes (as for the API server), else the card."""
    given = {field: row[name] for field, names in PROFILE_NAMES.items() for name in names if name in row}
    if "session_meta" in row or "bot_name" in given:
        meta = as_session_meta(row.get("session_meta", given))
        if system:
            meta.bot_info = f"{meta.bot_info} {system}".strip()
        return meta
    if system:
        return as_session_meta({**given, "bot_name": SYSTEM_CHARACTER, "bot_info": system})
    if card is None:
        raise BadRow("no persona", "行里没有 session_meta，也没有给出 card")
    return card


def _is_bot(speaker: str, meta: SessionMeta) -> bool:
    if speaker in {meta.bot_name, *BOT_SPEAKERS}:
        return True
    if speaker in {meta.user_name, *USER_SPEAKERS}:
        return False
    raise BadRow("wrong type", f"说话人 {speaker} 既不是 {meta.bot_name} 也不是 {meta.user_name}")


def _pair(utterances: list[tuple[bool, str]]) -> list[list[str]]:
    """[query, response] pairs of (is the character's, text); what one side says in a row is joined by a space.

    What the user says last has no reply to learn from and is left out.
    """
    history: list[list[str]] = []
    for is_bot, text in utterances:
        if not is_bot and (not history or history[-1][1]):
            history.append([text, ""])
        elif not history:
            history.append(["", text])
        else:
            history[-1][is_bot] = " ".join(filter(None, (history[-1][is_bot], text)))
    history = [pair for pair in history if pair[1]]
    if not any(query for query, _ in history):
        raise BadRow("empty", "没有一句回答：角色的话之前要有用户的话")
    return history


# --- 3. What to do with them


def read_card(name_or_file) -> SessionMeta:
    """A persona by the name of a shipped character, or from a file: JSON with the four fields, or a character card."""
    if str(name_or_file) in (shipped := load_characters()):
        return shipped[str(name_or_file)]
    found = open_content(read_bytes(Path(name_or_file)))
    return as_session_meta(found)


def split_samples(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out): a fixed tenth is held out, chosen by a hash of each sample's id.

    Where that leaves one of them empty, as when all begin with the same words, the hash is of the whole conversation.
    Raises `DataError` if one is still empty.
    """
    held_out = [sample.held_out for sample in samples]
    if len(set(held_out)) < 2:
        print("按 id 或第一句话分不开，改按整段对话分出留出集 [split by whole conversations]", flush=True)
        held_out = [dataclasses.replace(sample, id=_content(sample)).held_out for sample in samples]
    if len(set(held_out)) < 2:
        raise DataError(
            f"数据太少，分不出训练集和留出集 [too few rows]：{len(samples)} 条可用的对话，{sum(held_out)} 条留出。"
            "请准备至少几十条；如果文件里不止这些，看看读取报告里哪些行没有用上"
        )
    training, kept = ([s for s, held in zip(samples, held_out) if held is side] for side in (False, True))
    return training, kept


def _content(sample: Sample) -> str:
    return json.dumps([sample.card.model_dump(), sample.history], ensure_ascii=False)


def replay_dialogues(count: int) -> list[Dialogue]:
    """`count` training dialogues of the shipped characters, evenly spread over them.

    Mixed into the training data, they keep the model from forgetting the others while it learns a new character.
    """
    dialogues = [dialogue for dialogue in load_dialogues() if not dialogue.held_out]
    return [dialogues[position * len(dialogues) // count] for position in range(min(count, len(dialogues)))]
