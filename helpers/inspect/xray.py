"""What a notebook shows: a prompt or a training sequence as coloured tokens."""

import html
from dataclasses import dataclass, field

from ..characters.personas import as_session_meta
from ..model.tokenization import NEWLINE_ID, PREFIX_TOKENS

# Kind of token -> (label, background). Text is always dark, so that it reads in light and dark themes.
TOKEN_KINDS = {
    "prefix": ("前缀 prefix", "#ffd6a5"),
    "persona": ("人设 persona", "#e0e0e0"),
    "user": ("用户 user", "#cfe8ff"),
    "bot": ("角色 character", "#d3f4d3"),
    "reply": ("回复从这里开始 reply starts here", "#ffadad"),
}
NEWLINE = f"↵{NEWLINE_ID}"  # the one id to remember: a reply ends there
LABEL_KINDS = {
    "context": ("只读不学 context, label -100", "#e0e0e0"),
    "learned": ("要学的 learned", "#d3f4d3"),
}


@dataclass(frozen=True)
class PromptXray:
    """Tokens as (id, piece, kind); shown in colour in a notebook, as lines in a terminal."""

    tokens: tuple[tuple[int, str, str], ...]
    kinds: dict[str, tuple[str, str]] = field(default_factory=lambda: TOKEN_KINDS)  # kind -> (label, background)

    def _repr_html_(self) -> str:
        spans = "".join(_token_html(token_id, piece, self.kinds[kind][1]) for token_id, piece, kind in self.tokens)
        legend = " ".join(f'<span style="{_style(color)}">{label}</span>' for label, color in self.kinds.values())
        return f'<div style="line-height:2">{legend}<br>{spans}</div>'

    def __repr__(self) -> str:
        lines, kind_before = [], None
        for token_id, piece, kind in self.tokens:
            if kind != kind_before or (lines and lines[-1].endswith(NEWLINE)):
                lines.append(f"{self.kinds[kind][0]}:")
                kind_before = kind
            lines[-1] += f" {_visible(token_id, piece)}"
        return "\n".join(lines)


def prompt_xray(tokenizer, session_meta, messages: list[dict]) -> PromptXray:
    """The prompt for a reply to `messages`, token by token, each with the part of the prompt it belongs to.

    No field can contain a newline token, so the lines of the prompt are its parts: the persona's, then one a message,
    then the character's name, after which the reply starts.
    """
    meta = as_session_meta(session_meta)
    ids = tokenizer.apply_chat_template(messages, session_meta=meta, add_generation_prompt=True)["input_ids"]
    persona_lines = 1 + bool(meta.bot_info) + bool(meta.user_info)
    roles = {"user": "user", "assistant": "bot"}
    kinds = ["persona"] * persona_lines + [roles[message["role"]] for message in messages] + ["reply"]
    tokens, line = [], 0
    for position, token_id in enumerate(ids):
        kind = "prefix" if position < len(PREFIX_TOKENS) else kinds[line]
        tokens.append((token_id, tokenizer.convert_ids_to_tokens(token_id), kind))
        line += token_id == NEWLINE_ID
    return PromptXray(tuple(tokens))


def label_view(tokenizer, row: dict) -> PromptXray:
    """A training sequence (`input_ids`, `labels`) token by token: what the loss counts, and what is only read."""
    ids, labels = row["input_ids"], row["labels"]
    kinds = ["context" if label == -100 else "learned" for label in labels]
    return PromptXray(tuple(zip(ids, tokenizer.convert_ids_to_tokens(ids), kinds)), LABEL_KINDS)


def _visible(token_id: int, piece: str) -> str:
    return NEWLINE if token_id == NEWLINE_ID else piece.replace("▁", "␣")


def _style(color: str) -> str:
    return f"background:{color};color:#111;border-radius:3px;padding:1px 2px;margin:0 1px"


def _token_html(token_id: int, piece: str, color: str) -> str:
    text = html.escape(_visible(token_id, piece))
    end = "<br>" if token_id == NEWLINE_ID else ""
    return f'<span title="id {token_id}" style="{_style(color)}">{text}</span>{end}'
