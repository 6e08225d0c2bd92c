"""What the web page looks like: its components, their layout, and how a conversation is drawn in them.

The conversation is HTML that this project escapes itself, not a `gr.Chatbot`: that one reads Markdown, and what its
sanitiser lets through still makes the browser fetch pictures; and it has no swipe, no branch and nothing beside one message.
"""

from functools import partial
from pathlib import Path

import gradio as gr

from ..chat.session import ChatSession
from .bubbles import STYLE, meter, notice
from .conversations import Conversations
from .texts import PERSONA_FIELDS, SLIDERS, label, slider_values
from .web_parts import Parts

REFRESH_SECONDS = 1.0  # how soon a tab sees what was said in another one
VARIANTS = {"send": "primary", "save": "primary", "stop": "stop"}

# Only fonts of the reader's own machine: Gradio's default theme brings files, other themes ask Google.
SANS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
THEME = gr.themes.Default(primary_hue="blue", font=SANS, font_mono=["ui-monospace", "monospace"]).set(
    button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700"
)  # white on the usual 500 has a contrast of 3.7
# The bubbles are those of the notebook; in page.css, Gradio's colours carry the theme, light or dark.
CSS, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
HEAD = f"{STYLE}<style>{CSS}</style><script>{SCRIPT}</script>"
# Sends the event 'act'; the script may arrive after the first part is there.
CLICKS = "(function start() { window.cgClicks ? cgClicks(element, trigger, 'act') : setTimeout(start, 50) })()"


class WebView:
    """The components of the page, `blocks`, for characters of these names and a model with `context` tokens."""

    def __init__(self, names: list[str], context: int, language: str, model_text: str):
        self.context, self.language, self.text = context, language, partial(label, language=language)
        self.parts = Parts(language, model_text)
        self.buttons: dict[str, gr.components.Component] = {}
        self.uploads: list[gr.UploadButton] = []
        # Uploaded files are read at once and deleted within the hour.
        self.blocks = gr.Blocks(title=self.text("title"), analytics_enabled=False, delete_cache=(3600, 3600))
        with self.blocks:
            self.visitor = gr.BrowserState("", storage_key="characterglm-visitor")
            self.tab = gr.State()
            self.clock = gr.Timer(REFRESH_SECONDS, active=False)  # until the tab knows whose it is
            with gr.Column(elem_id="home") as self.home:
                self.gallery = self._html("gallery")
                self._add_upload()
            with gr.Column(elem_id="chat", visible=False) as self.chat:
                self._add_chat()
            with gr.Sidebar(
                self.text("settings"), position="right", open=False, width=380, visible=False
            ) as self.drawer:
                self._add_settings(names)

    def _html(self, name: str, **options) -> gr.HTML:
        """A part of our own, whose buttons call actions."""
        return gr.HTML(elem_id=name, elem_classes="cg-page", js_on_load=CLICKS, apply_default_css=False, **options)

    def _add_chat(self) -> None:
        self.head = self._html("head")
        with gr.Column(elem_classes="cg-scroll", elem_id="conversation"):
            self.draft = gr.HTML(elem_id="draft")  # first, because the column is turned over: it keeps the end in view
            self.log = self._html("log")
        self.problem = self._html("problem", visible=False)
        with gr.Group(visible=False) as self.editor:
            self.query = gr.Textbox(label=self.text("query"), lines=2, elem_id="query")
            self.response = gr.Textbox(label=self.text("response"), lines=3, elem_id="response")
            with gr.Row():
                self._add_buttons("save", "cancel")
        self.box = gr.Textbox(
            placeholder=self.text("message"),
            label=self.text("query"),
            show_label=False,
            lines=1,
            max_lines=6,
            elem_id="box",
        )
        with gr.Row(elem_classes="cg-buttons"):
            self._add_buttons("send", "stop", "undo", "impersonate")
            self.meter = gr.HTML(elem_id="meter")

    def _add_settings(self, names: list[str]) -> None:
        with gr.Accordion(self.text("conversation")):
            self.title = gr.Textbox(label=self.text("name"), elem_id="title")
            self._add_buttons("rename")
            self.talk = self._html("talk")
        with gr.Accordion(self.text("persona"), open=False, elem_id="persona"):
            self.persona = {
                name: gr.Textbox(label=self.text(name), lines=1 if name.endswith("name") else 3, elem_id=name)
                for name in PERSONA_FIELDS
            }
            self._add_buttons("apply")
        with gr.Accordion(self.text("parameters"), open=False, elem_id="parameters"):
            self.sliders = {
                name: gr.Slider(low, high, step=step, label=name, elem_id=name, buttons=[])
                for name, (low, high, step) in {**SLIDERS, "max_length": (64, self.context, 64)}.items()
            }
            self._add_buttons("reset")
        with gr.Accordion(self.text("files"), open=False, elem_id="files"):
            self._add_buttons("export", "export_all")
            self.links = gr.HTML(elem_classes="cg-links", elem_id="links")
            self._add_upload()
        with gr.Accordion(self.text("duet"), open=False, elem_id="duet"):
            self.other = gr.Dropdown(names, label=self.text("other"), elem_id="other")
            self.topic = gr.Textbox(label=self.text("topic"), elem_id="topic")
            self._add_buttons("start", "go_on")

    def _add_buttons(self, *names: str) -> None:
        for name in names:
            variant = VARIANTS.get(name, "secondary")
            self.buttons[name] = gr.Button(self.text(name), variant=variant, size="md", elem_id=name)

    def _add_upload(self) -> None:
        types = {"type": "binary", "file_types": [".json", ".png", ".charx", ".jpg", ".webp"]}
        self.uploads.append(
            gr.UploadButton(self.text("import"), size="md", elem_id=f"upload{len(self.uploads)}", **types)
        )

    # --- what changes: component -> its new value or properties

    def conversation(self, session: ChatSession) -> dict:
        draft = session.draft
        idle = draft is None
        enabled = {name: idle != (name == "stop") for name in self.buttons if name != "cancel"}
        return {
            self.log: self.parts.log(session),
            **self.growing(session, draft),
            **{self.buttons[name]: gr.update(interactive=on) for name, on in enabled.items()},
            self.meter: meter(session, self.language),
        }

    def growing(self, session: ChatSession, draft: tuple | None) -> dict:
        """Only the exchange being written: all that changes from token to token."""
        rows = [("user", draft[1]), ("bot", f"{draft[2]} ▌")] if draft else []
        return {self.draft: "".join(self.parts.row(session.session_meta, side, text) for side, text in rows if text)}

    def proposal(self, session: ChatSession, text: str | None) -> dict:
        """What the model would say in the reader's place, while it grows."""
        return {self.draft: "" if text is None else self.parts.row(session.session_meta, "user", f"{text} ▌")}

    def place(self, at_home: bool, conversations: Conversations) -> dict:
        """The gallery, or the talk."""
        shown = {self.home: gr.update(visible=at_home), self.chat: gr.update(visible=not at_home)}
        shown |= {self.drawer: gr.update(visible=not at_home)}
        return shown | ({self.gallery: self.parts.gallery(conversations)} if at_home else {})

    def settings(self, name: str, session: ChatSession, unapplied: tuple[str, ...] | None) -> dict:
        """What belongs to the conversation shown: who it is with, its persona (as it is being changed), its parameters."""
        meta = session.session_meta
        fields = unapplied or [getattr(meta, field, "") for field in self.persona]
        return {
            self.head: self.parts.head(name, session),
            self.title: name,
            self.talk: self.parts.button("drop", name, self.text("drop"), "cg-text", ask=True),
            **dict(zip(self.persona.values(), fields)),
            **self.unapplied(session, unapplied is not None),
            **self.parameters(session),
            self.editor: gr.update(visible=False),
            self.links: "",
        }

    def unapplied(self, session: ChatSession, some: bool) -> dict:
        text = self.text("unapplied" if some else "apply")
        return {self.buttons["apply"]: gr.update(value=text, interactive=session.draft is None)}

    def parameters(self, session: ChatSession) -> dict:
        """The sliders, as they are in force."""
        values = slider_values(session, self.context).items()
        return {self.sliders[key]: gr.update(value=v, minimum=low, maximum=high) for key, (v, low, high) in values}

    def error(self, text: str, can_fit: bool = False) -> dict:
        """A problem below the conversation; an empty text takes it away."""
        fit = self.parts.button("fit", inside=self.text("fit"), kind="") if can_fit else ""
        return {self.problem: gr.update(value=notice(text, "error") + fit if text else "", visible=bool(text))}

    def editing(self, query: str, response: str) -> dict:
        """The form with both sides of an exchange; a greeting has no query to change."""
        return {
            self.editor: gr.update(visible=True),
            self.query: gr.update(value=query, visible=bool(query)),
            self.response: response,
        }


def within(slider: gr.Slider) -> str:
    """What is typed beyond a slider's ends becomes the end, as it then shows; Gradio would show it, but send what was typed."""
    return f"(tab, value) => [tab, Math.min({slider.maximum}, Math.max({slider.minimum}, value))]"
