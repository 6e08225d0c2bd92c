"""What the web page looks like: its components, their layout, and how a conversation is drawn in them.

The conversation is HTML that this project escapes itself, not a `gr.Chatbot`: that one reads Markdown, and what its
sanitiser lets through still makes the browser fetch pictures.
"""

from functools import partial

import gradio as gr

from ..chat.session import ChatSession
from .bubbles import STYLE, bubbles, meter, notice
from .texts import PERSONA_FIELDS, SLIDERS, label, slider_values

REFRESH_SECONDS = 1.0  # how soon a tab sees what was said in another one
VARIANTS = {"send": "primary", "save": "primary", "stop": "stop"}

# Only fonts of the reader's own machine: Gradio's default theme brings files, other themes ask Google.
SANS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
THEME = gr.themes.Default(primary_hue="blue", font=SANS, font_mono=["ui-monospace", "monospace"])
# The bubbles are those of the notebook; here Gradio's colours carry the theme, light or dark.
HEAD = f"""{STYLE}<style>
.cg-scroll{{--jp-ui-font-color0:var(--body-text-color);--jp-brand-color1:var(--color-accent);
  --jp-layout-color1:var(--background-fill-primary);
  --jp-layout-color2:color-mix(in srgb,var(--body-text-color) 10%,var(--background-fill-primary));
  height:max(280px,calc(100vh - 390px));overflow:hidden auto;padding:8px 12px;border-radius:8px;
  border:1px solid var(--border-color-primary);background:var(--background-fill-primary);
  flex-direction:column-reverse!important;flex-wrap:nowrap!important;gap:0!important}}
.cg-scroll>*{{flex:0 0 auto!important;overflow:visible!important;min-height:0!important}}
.cg-scroll .cg-message{{font-size:15px}}
.cg-line{{--jp-error-color1:var(--error-text-color,#b00020);--jp-ui-font-color1:var(--body-text-color-subdued)}}
.cg-line progress{{accent-color:var(--color-accent);width:120px}}
.cg-links{{--jp-content-link-color:var(--link-text-color);line-height:2}}
.cg-buttons{{flex-wrap:wrap!important;gap:8px!important;align-items:center}}
.cg-buttons>*{{flex:0 1 auto!important;min-width:44px!important;width:auto!important}}
.cg-together{{flex-wrap:nowrap!important}}
</style>"""


class WebView:
    """The components of the page, `blocks`, for conversations of these names and a model with `context` tokens."""

    def __init__(self, names: list[str], context: int, language: str):
        self.context, self.language, self.text = context, language, partial(label, language=language)
        self.buttons: dict[str, gr.components.Component] = {}
        # Uploaded files are read at once and deleted within the hour.
        self.blocks = gr.Blocks(title=self.text("title"), analytics_enabled=False, delete_cache=(3600, 3600))
        with self.blocks:
            self.visitor = gr.BrowserState("", storage_key="characterglm-visitor")
            self.tab = gr.State()
            self.clock = gr.Timer(REFRESH_SECONDS, active=False)  # until the tab knows whose it is
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._add_chat(names)
                with gr.Column(scale=2, min_width=320):
                    self._add_settings()

    def _add_chat(self, names: list[str]) -> None:
        self.picker = gr.Dropdown(names, label=self.text("character"), filterable=False, elem_id="picker")
        with gr.Column(elem_classes="cg-scroll", elem_id="conversation"):
            self.draft = gr.HTML(elem_id="draft")  # first, because the column is turned over: it keeps the end in view
            self.log = gr.HTML(elem_id="log")
        self.problem = gr.HTML(elem_classes="cg-line", elem_id="problem", visible=False)
        self.box = gr.Textbox(placeholder=self.text("message"), show_label=False, lines=1, max_lines=6, elem_id="box")
        with gr.Row(elem_classes="cg-buttons"):
            self._add_buttons("send", "stop", "regenerate")
            with gr.Row(elem_classes="cg-buttons cg-together"):
                self._add_buttons("previous")
                self.position = gr.HTML(elem_id="position")
                self._add_buttons("next")
            self._add_buttons("undo", "edit", "clear")
        with gr.Group(visible=False) as self.editor:
            self.query = gr.Textbox(label=self.text("query"), lines=2, elem_id="query")
            self.response = gr.Textbox(label=self.text("response"), lines=3, elem_id="response")
            with gr.Row():
                self._add_buttons("save", "cancel")
        self.meter = gr.HTML(elem_classes="cg-line", elem_id="meter")

    def _add_settings(self) -> None:
        with gr.Accordion(self.text("persona")):
            self.persona = {
                name: gr.Textbox(label=self.text(name), lines=1 if name.endswith("name") else 3, elem_id=name)
                for name in PERSONA_FIELDS
            }
            self._add_buttons("apply")
        with gr.Accordion(self.text("parameters")):
            self.sliders = {
                name: gr.Slider(low, high, step=step, label=name, elem_id=name)
                for name, (low, high, step) in {**SLIDERS, "max_length": (64, self.context, 64)}.items()
            }
        with gr.Accordion(self.text("files"), open=False, elem_id="files"):
            self._add_buttons("export")
            self.links = gr.HTML(elem_classes="cg-links", elem_id="links")
            types = {"type": "binary", "file_types": [".json", ".png"]}
            self.buttons["upload"] = gr.UploadButton(self.text("import"), size="md", elem_id="upload", **types)

    def _add_buttons(self, *names: str) -> None:
        for name in names:
            variant = VARIANTS.get(name, "secondary")
            self.buttons[name] = gr.Button(self.text(name), variant=variant, size="md", elem_id=name)

    # --- what changes: component -> its new value or properties

    def conversation(self, session: ChatSession) -> dict:
        draft, several = session.draft, len(session.alternatives) > 1
        idle = draft is None
        enabled = {name: idle != (name == "stop") for name in self.buttons if name != "cancel"}
        return {
            self.log: "".join(bubbles(session.session_meta, session.history if idle else draft[0])),
            **self.growing(session, draft),
            **{self.buttons[name]: gr.update(interactive=on) for name, on in enabled.items()},
            **{self.buttons[name]: gr.update(interactive=idle, visible=several) for name in ("previous", "next")},
            self.position: gr.update(value=f"{session.alternative + 1}/{len(session.alternatives)}", visible=several),
            self.meter: meter(session, self.language),
        }

    def growing(self, session: ChatSession, draft: tuple | None) -> dict:
        """Only the exchange being written: all that changes from token to token."""
        return {self.draft: "".join(bubbles(session.session_meta, [[draft[1], f"{draft[2]} ▌"]])) if draft else ""}

    def settings(self, name: str, names: list[str], session: ChatSession) -> dict:
        values = slider_values(session, self.context)
        return {
            self.picker: gr.update(choices=names, value=name),
            **{box: getattr(session.session_meta, field, "") for field, box in self.persona.items()},
            **{
                self.sliders[key]: gr.update(value=v, minimum=low, maximum=high)
                for key, (v, low, high) in values.items()
            },
            self.editor: gr.update(visible=False),
            self.links: "",
        }

    def error(self, text: str) -> dict:
        """A problem below the conversation; an empty text takes it away."""
        return {self.problem: gr.update(value=notice(text, "error") if text else "", visible=bool(text))}

    def editing(self, query: str, response: str) -> dict:
        """The form with both sides of the last exchange; a greeting has no query to change."""
        return {
            self.editor: gr.update(visible=True),
            self.query: gr.update(value=query, visible=bool(query)),
            self.response: response,
        }
