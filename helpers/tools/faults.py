"""Errors that people meet with CharacterGLM, recognised by their text: why they happen and the way out.

Those of other programs are in a table, faults.toml. The project's own messages, each with an English key phrase in
brackets, say themselves what to do: they are read from the code that says them.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The cause and the way out that all errors of the old remote code share.
REMOTE_CODE = {
    "cause": "旧的远程代码与 transformers {since} 不兼容",
    "way_out": "先 import helpers，再用标准的 AutoTokenizer / AutoModelForCausalLM，不要执行远程代码",
    "english": "The old remote code breaks with transformers {since}: import helpers first, then stock AutoTokenizer / "
    "AutoModelForCausalLM; run no remote code.",
}
PACKAGE = Path(__file__).parents[1]
# "... [out of memory]: ...", not "names[i]"; every message begins with "[error]" on the command line.
PHRASE = re.compile(r"""(?<![\w)\]"'])\[(?!error\])([A-Za-z][^][{}\n]*)\]""")
CHINESE = re.compile("[\u4e00-\u9fff]")


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
    """The known errors whose text occurs in `text`, a traceback or a log: own messages, then as in `KNOWN_ERRORS`."""
    return [*dict.fromkeys(_own_in(text)), *(error for error in KNOWN_ERRORS if re.search(error.pattern, text))]


def _own_in(text: str) -> Iterator[KnownError]:
    for line in text.splitlines():
        for phrase in PHRASE.findall(line):
            if whole := own_messages().get(phrase):
                # The line as it was, with its values, unless only a part of the message was quoted.
                said = line.strip() if len(line) >= len(whole) and "\n" not in whole else whole
                english = f"A message of this project, which says what to do: [{phrase}]"
                yield KnownError(re.escape(f"[{phrase}]"), "这是本项目自己的提示，怎么办就写在里面", said, english)


@cache
def own_messages() -> dict[str, str]:
    """{key phrase: message} of all that this package says, from its code; "…" stands for a value."""
    found: dict[str, str] = {}
    for file in sorted(set(PACKAGE.rglob("*.py")) - set(PACKAGE.glob("cli/*"))):  # cli: help texts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            message = _text(node)
            for phrase in PHRASE.findall(message) if CHINESE.search(message) else ():
                found[phrase] = max(found.get(phrase, ""), message, key=len)
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
