"""The role-play dialogues of `data/dialogues/`: reading, splitting, and turning them into chat messages."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from ..errors import HelpersError
from ..paths import PROJECT_DIR
from .personas import CharacterCard, field_problems, load_characters

DIALOGUES_DIR = PROJECT_DIR / "data" / "dialogues"
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Dialogue:
    """One conversation: `history` is a list of [query, response]; the first query is "" if the character begins."""

    id: str
    card: CharacterCard
    history: list[list[str]]

    @property
    def messages(self) -> list[dict]:
        return history_to_messages(self.history)

    @property
    def held_out(self) -> bool:
        """Whether the conversation is kept out of training: a fixed tenth, chosen by a hash of its id."""
        digest = hashlib.sha256(self.id.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def history_to_messages(history: Iterable) -> list[dict]:
    """[query, response] pairs as user and assistant messages; an empty query (a greeting) is left out."""
    messages = []
    for query, response in history:
        if query:
            messages.append({"role": "user", "content": query})
        messages.append({"role": "assistant", "content": response})
    return messages


class _Row(BaseModel):
    id: str = Field(min_length=1)
    character: str
    history: list[tuple[str, Annotated[str, Field(pattern=r"\S")]]] = Field(min_length=1)


def load_dialogues(directory: Path = DIALOGUES_DIR) -> list[Dialogue]:
    """All dialogues of a directory of JSONL files, in file order; `HelpersError` names file and line of a bad row."""
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise HelpersError(f"没有对话文件 [no dialogue files]：{directory} 里应有 .jsonl 文件")
    cards = load_characters()
    return [dialogue for file in files for dialogue in _read(file, cards)]


def _read(file: Path, cards: dict) -> Iterator[Dialogue]:
    where = file.name
    try:
        with file.open(encoding="utf-8") as lines:  # not splitlines(): U+2028 may stand in a JSON string
            for number, line in enumerate(lines, start=1):
                where = f"{file.name} 第 {number} 行"
                row = _Row.model_validate_json(line)
                if row.character not in cards:
                    raise ValueError(f"没有叫 {row.character} 的角色")
                if any(not query.strip() for query, _ in row.history[1:]):
                    raise ValueError("只有第一轮的 query 可以为空")
                yield Dialogue(row.id, cards[row.character], [list(entry) for entry in row.history])
    except UnicodeDecodeError as error:
        raise HelpersError(f"{file.name} 不是 UTF-8 文本 [invalid UTF-8]：{error}") from None
    except ValueError as error:
        problem = field_problems(error, "整行") if isinstance(error, ValidationError) else str(error)
        raise HelpersError(f"{where}无效 [invalid dialogue]：{problem}") from None
