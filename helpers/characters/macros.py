"""What other programs write into card texts for us to fill in: {{char}}, {{random:a,b}}, example dialogues.

    fill_macros("{{Char}} meets {{ user }}.{{// a note}}", {"char": "阿青", "user": "旅人"})  ->  "阿青 meets 旅人."

Nothing is evaluated: a macro is looked up by its name, and one that is not known stays as it is, with a `CardWarning`.
"""

import random
import re
import warnings

MOST_NESTED = 8  # {{random:{{pick:a,b}},c}} is two deep
NAMES = {"char": "\ue000", "bot": "\ue000", "user": "\ue001"}  # stand in for the names until all else is done
NAME = re.compile(r"\{\{\s*(char|user|bot)\s*\}\}|<(char|bot|user)>", re.IGNORECASE)
TRIM = re.compile(r"\s*\{\{\s*trim\s*\}\}\s*", re.IGNORECASE)
START = re.compile(r"<START>", re.IGNORECASE)
INNERMOST = re.compile(r"\{\{([^{}]*)\}\}")


class CardWarning(UserWarning):
    """Something in a card has no meaning here and was left as it is, or out."""


def fill_macros(text: str, names: dict[str, str], seed: int = 0) -> str:
    """`text` with the macros of the V1 to V3 specifications and of SillyTavern filled in.

    Args:
        names: what "char" and "user" stand for. A name that looks like a macro is not filled again.
        seed: for {{random}} and {{pick}}: the same seed and text always choose the same.
    """
    chance = random.Random(f"{seed} {text}")
    unknown = set()

    def value(macro: re.Match) -> str:
        name, _, rest = macro[1].strip().partition(":")
        name = name.strip().lower()
        if name in ("random", "pick") and rest:
            options = rest[1:].split("::") if rest.startswith(":") else rest.split(",")
            return chance.choice(options).strip()
        # A comment, or what stands for something that is empty here.
        if name.startswith("//") or name in ("comment", "hidden_key", "original", "noop"):
            return ""
        if name == "newline":
            return "\n"
        unknown.add(macro[0])
        return macro[0]

    text = TRIM.sub("", START.sub("", NAME.sub(lambda mark: NAMES[(mark[1] or mark[2]).lower()], text)))
    for _ in range(MOST_NESTED):
        text, before = INNERMOST.sub(value, text), text
        if text == before:
            break
    if unknown:
        shown = "、".join(sorted(unknown))[:200]
        warnings.warn(f"不认识的宏，照原样留着 [unknown macro]：{shown}", CardWarning, stacklevel=2)
    return re.sub("[\ue000\ue001]", lambda mark: names["char" if mark[0] == NAMES["char"] else "user"], text)


def example_turns(text: str, names: dict[str, str], seed: int = 0) -> list[list[str]]:
    """The example dialogues of a card (`mes_example`) as a history, a list of [query, response].

    A line without a name goes on with the one before it. What has no answer is left out; of two replies in a row, the
    second joins the first, because only the first query of a history may be empty.
    """
    user_line, char_line = (re.compile(rf"\s*{re.escape(names[who])}\s*[:：]") for who in ("user", "char"))
    history: list[list[str]] = []
    for block in START.split(text):
        query, speaks = "", False  # `speaks`: the character has the word
        for line in filter(str.strip, fill_macros(block, names, seed).splitlines()):
            if said := user_line.match(line):
                query, speaks = ("" if speaks else query), False
            elif said := char_line.match(line):
                if query or not history:
                    history.append([query, ""])
                query, speaks = "", True
            words = line[said.end() :].strip() if said else line.strip()
            if speaks:
                history[-1][1] = f"{history[-1][1]} {words}".strip()
            elif said or query:
                query = f"{query} {words}".strip()
    return [[query, response] for query, response in history if response]
