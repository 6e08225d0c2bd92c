"""Training data: instruction rows and conversations from JSON or JSONL files, every bad row named by line and cause."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from ..characters.cards import import_card_v2
from ..characters.dialogues import Dialogue, load_dialogues
from ..characters.personas import (
    SessionMeta,
    Unicode,
    as_session_meta,
    field_problems,
    load_characters,
    read_json_object,
)
from ..errors import CharacterError, DataError

CAUSES = {
    "invalid json": "不是有效的 JSON",
    "broken encoding": "编码损坏",
    "unknown format": "不认识的格式",
    "missing field": "缺少字段",
    "wrong type": "类型或取值不对",
    "empty": "内容为空",
    "no persona": "没有人设",
    "duplicate": "重复",
    "too long": "太长",
}
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
BOT_SPEAKERS, USER_SPEAKERS = {"assistant", "bot", "character"}, {"user"}

Line = Annotated[Unicode, StringConstraints(pattern=r"\S")]


@dataclass(frozen=True)
class Sample(Dialogue):
    """A conversation to train on, and the line of the file that it begins in.

    Its `id` is the row's own, else the first thing the user says: rows that begin with the same words then fall on the
    same side of the split (`held_out`), whatever their order in the file.
    """

    line: int


class BadRow(Exception):
    """One row cannot be used; `cause` is a key of `CAUSES`."""

    def __init__(self, cause: str, detail: str):
        super().__init__(detail)
        self.cause, self.detail = cause, detail


@dataclass
class DataReport:
    """How many rows a file has, and what is wrong with which. `print` it, or show it in a notebook."""

    file: str
    rows: int = 0
    problems: list[tuple[int, str, str]] = field(default_factory=list)  # (line, cause, detail)

    def add(self, line: int, bad: BadRow) -> None:
        """Note a bad row."""
        self.problems.append((line, bad.cause, bad.detail))

    def count_by_cause(self) -> Counter:
        """How many bad rows there are of each cause."""
        return Counter(cause for _, cause, _ in self.problems)

    def refuse(self, on_bad_row: str, kept: list) -> None:
        """Raise `DataError` if nothing is left, or if there are bad rows and they are fatal."""
        if not kept:
            raise DataError(f"没有一行可用的数据 [no usable rows]：{self}")
        if self.problems and on_bad_row == "raise":
            raise DataError(f"数据里有不合格的行 [bad rows]：{self}")

    def __str__(self) -> str:
        lines = [f"{self.file}：{self.rows} 行，可用 {self.rows - len(self.problems)} 行"]
        for cause, count in self.count_by_cause().most_common():
            examples = [(line, detail) for line, other, detail in self.problems if other == cause]
            where = "、".join(str(line) for line, _ in examples[:5]) + (" 等" if count > 5 else "")
            lines.append(f"  {CAUSES[cause]} [{cause}] {count} 行：第 {where} 行。例如 {examples[0][1]:.100}")
        return "\n".join(lines)

    __repr__ = __str__


class _InstructionRow(BaseModel):
    instruction: Line
    input: Unicode | None = ""
    output: Line

    def history(self) -> list[list[str]]:
        return [["\n".join(text for text in (self.instruction, self.input) if text), self.output]]


class _PairsRow(BaseModel):
    history: list[tuple[Unicode, Line]] = Field(min_length=1)


class _Message(BaseModel):
    role: Literal["user", "assistant"]
    content: Line


class _MessagesRow(BaseModel):
    messages: list[_Message] = Field(min_length=1)


class _Utterance(BaseModel):
    speaker: Line
    utterance: Line


class _DialogueRow(BaseModel):
    dialogue: list[_Utterance] = Field(min_length=1)


def load_samples(file, card=None, *, on_bad_row: Literal["skip", "raise"] = "skip") -> tuple[list[Sample], DataReport]:
    """The conversations of a JSON array or a JSONL file, and a report on the rows that cannot be used.

    A row is one of: `instruction`, `input`, `output`; `history`, a list of [query, response] or of messages;
    `messages` with `role` and `content`; CharacterDial's `dialogue` of `speaker` and `utterance`. It may carry its
    persona (`session_meta`, or `bot_name`, `bot_profile`, ...); if it does not, the persona is `card`.

    Args:
        card: a `SessionMeta` or a dict; needed for instruction data.
        on_bad_row: "skip" leaves bad rows out, "raise" refuses the file.

    Raises:
        DataError: the file cannot be read, has no usable row, or (with "raise") any bad row.
    """
    if on_bad_row not in ("skip", "raise"):
        raise DataError(f"on_bad_row 应为 'skip' 或 'raise' [invalid on_bad_row]，收到 {on_bad_row!r}")
    card = None if card is None else as_session_meta(card)
    report, samples, seen = DataReport(Path(file).name), [], set()
    for line, row in _read_rows(_read_text(Path(file))):
        report.rows += 1
        try:
            sample = _parse_row(row, line, card)
            content = (sample.card.model_dump_json(), json.dumps(sample.history))
            if content in seen:
                raise BadRow("duplicate", f"{sample.history[-1][1]:.40}")
        except BadRow as bad:
            report.add(line, bad)
        else:
            seen.add(content)
            samples.append(sample)
    report.refuse(on_bad_row, samples)
    return samples, report


def read_card(name_or_file) -> SessionMeta:
    """A persona by the name of a shipped character, or from a JSON file: the four fields, or a character card V2.

    Raises:
        CharacterError: no such character or file, or not a valid persona.
    """
    if str(name_or_file) in (shipped := load_characters()):
        return shipped[str(name_or_file)]
    content = read_json_object(Path(name_or_file))
    return import_card_v2(content) if "spec" in content else as_session_meta(content)


def split_samples(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(training, held-out): a fixed tenth is held out, chosen by a hash of each sample's id.

    Raises:
        DataError: one of the two would be empty.
    """
    held_out = [sample for sample in samples if sample.held_out]
    training = [sample for sample in samples if not sample.held_out]
    if not training or not held_out:
        raise DataError(
            f"数据太少，分不出训练集和留出集 [too few rows]：{len(training)} 条训练，{len(held_out)} 条留出。"
            "请准备至少几十条"
        )
    return training, held_out


def replay_dialogues(count: int) -> list[Dialogue]:
    """`count` training dialogues of the shipped characters, evenly spread over them.

    Mixed into the training data, they keep the model from forgetting the others while it learns a new character.
    """
    dialogues = [dialogue for dialogue in load_dialogues() if not dialogue.held_out]
    return [dialogues[position * len(dialogues) // count] for position in range(min(count, len(dialogues)))]


def _read_text(file: Path) -> str:
    try:
        # A byte that is not UTF-8 becomes U+FFFD, by which its row is recognised.
        return file.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"读不了数据文件 [cannot read file]：{file}（{error}）") from None


def _read_rows(text: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every row; the value is a `BadRow` where the text is not JSON."""
    if text.lstrip().startswith("["):
        yield from _read_array(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 may stand in a JSON string
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BadRow("invalid json", str(error))


def _read_array(text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array one by one, so that each has its line number and a damaged end costs only the end."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    counted, line, position = 0, 1, text.index("[") + 1
    while True:
        position = between.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, BadRow("invalid json", f"{error}；从这里往后都没有读")
            return
        yield line, value


def _parse_row(row: Any, line: int, card: SessionMeta | None) -> Sample:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong type", f"应是 JSON 对象，收到 {type(row).__name__}")
    if "\ufffd" in json.dumps(row, ensure_ascii=False):
        raise BadRow("broken encoding", "含有无法解码的字节；请把文件另存为 UTF-8")
    try:
        meta = _persona(row, card)
        history = _history(row, meta)
    except ValidationError as error:
        cause = CAUSE_OF_ERROR.get(error.errors()[0]["type"], "wrong type")
        raise BadRow(cause, field_problems(error, "整行")) from None
    except CharacterError as error:
        raise BadRow("wrong type", str(error)) from None
    own_id = row.get("id")
    return Sample(str(own_id) if own_id else _first_words(history), meta, history, line)


def _persona(row: dict, card: SessionMeta | None) -> SessionMeta:
    if "session_meta" in row:
        return as_session_meta(row["session_meta"])
    given = {field: row[name] for field, names in PROFILE_NAMES.items() for name in names if name in row}
    if "bot_name" in given:
        return as_session_meta(given)
    if card is None:
        raise BadRow("no persona", "行里没有 session_meta，也没有给出 card")
    return card


def _history(row: dict, meta: SessionMeta) -> list[list[str]]:
    """The conversation of a row as [query, response] pairs."""
    if "instruction" in row or "output" in row:
        return _InstructionRow.model_validate(row).history()
    turns = row.get("messages", row.get("history"))
    if isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns):
        messages = _MessagesRow(messages=turns).messages
        return _pair([(message.role == "assistant", message.content) for message in messages])
    if "dialogue" in row:
        utterances = _DialogueRow.model_validate(row).dialogue
        return _pair([(_is_bot(said.speaker, meta), said.utterance) for said in utterances])
    if "history" in row:
        history = [list(pair) for pair in _PairsRow.model_validate(row).history]
        if any(not query.strip() for query, _ in history[1:]):
            raise BadRow("empty", "只有第一轮的 query 可以为空（角色先开口）")
        return _with_a_question(history)
    raise BadRow("unknown format", f"字段是 {'、'.join(map(str, row))}")


def _is_bot(speaker: str, meta: SessionMeta) -> bool:
    for names, is_bot in (({meta.bot_name} | BOT_SPEAKERS, True), ({meta.user_name} | USER_SPEAKERS, False)):
        if speaker in names:
            return is_bot
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
    return _with_a_question([pair for pair in history if pair[1]])


def _with_a_question(history: list[list[str]]) -> list[list[str]]:
    if not any(query.strip() for query, _ in history):
        raise BadRow("empty", "没有一句回答：角色的话之前要有用户的话")
    return history


def _first_words(history: list[list[str]]) -> str:
    return next(query for query, _ in history if query.strip()).strip()
