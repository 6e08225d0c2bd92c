"""Errors that people meet with CharacterGLM, recognised by their text: why they happen and the way out (faults.toml)."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

# The cause and the way out that all errors of the old remote code share.
REMOTE_CODE = {
    "cause": "旧的远程代码与 transformers {since} 不兼容",
    "way_out": "先 import helpers，再用标准的 AutoTokenizer / AutoModelForCausalLM，不要执行远程代码",
    "english": "The old remote code breaks with transformers {since}: import helpers first, then stock AutoTokenizer / "
    "AutoModelForCausalLM; run no remote code.",
}


@dataclass(frozen=True)
class KnownError:
    """An error: a regular expression for its text, the cause, and the way out in Chinese and in English."""

    pattern: str
    cause: str
    way_out: str
    english: str

    def __str__(self) -> str:
        return f"原因：{self.cause}\n怎么办：{self.way_out}\nIn English: {self.english}"


def _read_table() -> tuple[KnownError, ...]:
    table = tomllib.loads(Path(__file__).with_name("faults.toml").read_text(encoding="utf-8"))
    remote = [
        KnownError(row["pattern"], **{key: text.format(since=row["since"]) for key, text in REMOTE_CODE.items()})
        for row in table["remote_code"]
    ]
    return (*remote, *(KnownError(**row) for row in table["error"]))


KNOWN_ERRORS = _read_table()


def explain(text: str) -> list[KnownError]:
    """The known errors whose text occurs in `text`, a traceback or a log, in the order of `KNOWN_ERRORS`."""
    return [error for error in KNOWN_ERRORS if re.search(error.pattern, text)]
