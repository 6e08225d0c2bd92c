"""The role-play dialogues of `data/dialogues/`: reading, splitting, and turning them into chat messages."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .characters import CharacterCard, load_characters
from .errors import HelpersError

DIALOGUES_DIR = Path(__file__).parent.parent / "data" / "dialogues"
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Dialogue:
    """One conversation: `history` is a list of [query, response]; the first query is "" if the character begins."""

    id: str
    card: CharacterCard
    history: list[list[str]]

    @property
    def messages(self) -> list[dict]:
        """The conversation as chat messages."""
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


def load_dialogues(directory: Path = DIALOGUES_DIR) -> list[Dialogue]:
    """All dialogues of a directory of JSONL files, in file order.

    Raises:
        HelpersError: naming file and line of a row that is not valid.
    """
    cards = load_characters()
    return [_parse(file, number, line, cards) for file in sorted(directory.glob("*.jsonl")) for number, line in _lines(file)]


def _lines(file: Path):
    return enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)


def _parse(file: Path, number: int, line: str, cards: dict) -> Dialogue:
    try:
        row = json.loads(line)
        return Dialogue(row["id"], cards[row["character"]], [[query, response] for query, response in row["history"]])
    except (ValueError, KeyError, TypeError) as error:
        raise HelpersError(f"{file.name} 第 {number} 行无效 [invalid dialogue]：{error!r}") from None
