"""A conversation as HTML: the same bubbles in the live panel and in its static copy. All text is escaped."""

import base64
import html
import mimetypes
import re

from ..characters.personas import SessionMeta
from ..chat.session import ChatSession
from .texts import label, meter_text

STAGE_DIRECTION = re.compile(r"（[^（）]*）|\*[^*\n]+\*")
# JupyterLab's variables carry its theme; the second colour of each is for pages without them (GitHub, nbviewer).
STYLE = """<style>
.cg-message{padding:6px 10px;border-radius:10px;max-width:80%;width:fit-content;margin:3px 0;white-space:pre-wrap;
  overflow-wrap:anywhere;line-height:1.5;font-size:14px;color:var(--jp-ui-font-color0,#111);
  font-family:var(--jp-ui-font-family,sans-serif),"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
.cg-user{margin-left:auto;background:color-mix(in srgb,var(--jp-brand-color1,#1976d2) 25%,var(--jp-layout-color1,#fff))}
.cg-bot{background:var(--jp-layout-color2,#eee)}
.cg-name{font-size:12px;opacity:.75}
.cg-message em{opacity:.8}
.cg-narration{margin:3px auto;background:none;text-align:center}
.cg-narration .cg-name{display:none}
.cg-log{border:1px solid var(--jp-border-color2,#ccc);border-radius:4px;background:var(--jp-layout-color1,#fff)}
.cg-log>*{flex:0 0 auto}
.cg-small{font-size:12px;color:var(--jp-ui-font-color1,#333)}
.cg-error{color:var(--jp-error-color1,#b00020);white-space:pre-wrap;overflow-wrap:anywhere}
.cg-links a{color:var(--jp-content-link-color,#1976d2);text-decoration:underline;margin-right:12px}
</style>"""


def bubbles(session_meta: SessionMeta, history: list[list[str]]) -> list[str]:
    """One bubble of HTML a message, oldest first; an empty query (a greeting) and an empty reply have none."""
    sides = (("user", session_meta.user_name), ("bot", session_meta.bot_name))
    return [bubble(side, name, text) for entry in history for (side, name), text in zip(sides, entry) if text]


def bubble(side: str, name: str, text: str) -> str:
    """One message; what is done rather than said, in （…） or *…*, is set apart, and in the middle if there is nothing else."""
    said = STAGE_DIRECTION.sub(lambda found: f"<em>{found[0].strip('*')}</em>", html.escape(text))
    narration = " cg-narration" if STAGE_DIRECTION.fullmatch(text.strip()) else ""
    return f'<div class="cg-message cg-{side}{narration}"><div class="cg-name">{html.escape(name)}</div>{said}</div>'


def notice(text: str, kind: str = "small") -> str:
    """A line for the reader below the conversation; `kind` "error" makes it red."""
    role = "alert" if kind == "error" else "status"
    return f'<span class="cg-{kind}" role="{role}">{html.escape(text)}</span>'


def meter(session: ChatSession, language: str = "zh") -> str:
    """How full the context is, as a bar and in words, and how fast the last reply was."""
    used, limit = session.context_used()
    bar = f'<progress value="{used}" max="{limit}" aria-label="{label("context", language)}"></progress>'
    return f"{bar} {notice(meter_text(session, language))}"


def download_links(files: dict[str, bytes]) -> str:
    """Links that hold whole files, so that no server has to offer them."""
    links = []
    for name, content in files.items():
        kind = mimetypes.guess_type(name)[0] or "text/plain"
        data = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        links.append(f'<a download="{html.escape(name)}" href="{data}">{html.escape(name)}</a>')
    return " ".join(links)
