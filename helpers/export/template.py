"""The chat template of a copy: CharacterGLM's prompt for programs that know nothing of CharacterGLM.

The prompt itself is the project's own template (`helpers/model/chat_template.jinja`). Around it, `export_template.jinja`
finds the persona and keeps text text, with nothing that one of the engines lacks (Jinja2, llama.cpp, @huggingface/jinja).
"""

import re
from pathlib import Path

from ..characters.personas import SYSTEM_CHARACTER, SessionMeta
from ..model.tokenization import CHAT_TEMPLATE, PREFIX_TOKENS

EXPORT_TEMPLATE = Path(__file__).with_name("export_template.jinja").read_text(encoding="utf-8")
# What str.splitlines() takes for the end of a line; "\r\n" first, because it is one.
LINE_BREAKS = ["\r\n", *"\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"]
# What str.strip() takes off beyond ASCII, the usual ones first.
WIDE_SPACES = [*"\u3000\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f"]
# No text may spell a control token, be it with the help of the brackets around a name. Noncharacters, which Unicode keeps
# for use inside programs, see to that, in one of two ways:
# - a folder: NOTHING parts every "<" and "[" from what follows; the normalizer of tokenizer.json takes it out again, and
#   ESCAPED stands for the escape itself, so that what is left is what the user wrote;
# - a GGUF, which has no normalizer: the names of the control tokens begin with ESCAPE, which is taken out of the text.
ESCAPE, ESCAPED, NOTHING = "\ufdd0", "\ufdd0\ufdd1", "\ufdd0\ufdd2"


def folder_template(persona: SessionMeta) -> str:
    """For a tokenizer whose normalizer takes `NOTHING` out and turns `ESCAPED` into `ESCAPE`.

    Args:
        persona: who speaks when a request names nobody.
    """
    replaced = {ESCAPE: ESCAPED, "<": f"<{NOTHING}", "[": f"[{NOTHING}"}
    return _template(persona, "".join(PREFIX_TOKENS), replaced)


def gguf_template(persona: SessionMeta) -> str:
    """For a vocabulary in which the name of every control token begins with `ESCAPE`."""
    return _template(persona, "".join(ESCAPE + token for token in PREFIX_TOKENS), {ESCAPE: ""})


def _template(persona: SessionMeta, prefix: str, replaced: dict[str, str]) -> str:
    constants = {
        "DEFAULT_PERSONA": {name: getattr(persona, name) for name in SessionMeta.model_fields},
        "SYSTEM_CHARACTER": SYSTEM_CHARACTER,
        "USER_NAME": SessionMeta.model_fields["user_name"].default,
        "LINE_BREAKS": LINE_BREAKS,
        "WIDE_SPACES": WIDE_SPACES,
    }
    written = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in constants.items()]
    replacements = "".join(f".replace({_literal(old)}, {_literal(new)})" for old, new in replaced.items())
    parts = {
        "CONSTANTS": "\n".join(written),
        "PROMPT": _prompt(),
        "BEGIN": f"{{{{- {_literal(prefix)} ~ prompt{replacements} -}}}}",
    }
    # In one pass: what is put in is not searched again.
    return re.sub(r"\{#- ([A-Z]+) -#\}", lambda found: parts[found[1]], EXPORT_TEMPLATE).rstrip("\n")


def _prompt() -> str:
    """The project's template from its first output on: without its `flat`, its comment, and the mask for training."""
    start = CHAT_TEMPLATE.index("{%- set bot =")
    return re.sub(r"\{%- *(end)?generation *-%\}", "", CHAT_TEMPLATE[start:]).strip()


def _literal(value) -> str:
    """A Jinja literal. Not JSON: llama.cpp knows no \\u escape, and Jinja makes one of every bare line break it finds."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"}
    return "'" + "".join(escapes.get(character, character) for character in value) + "'"
