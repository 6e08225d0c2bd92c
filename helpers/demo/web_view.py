"""What the web page looks like: its components, their layout, and how a conversation is drawn in them.

The conversation is HTML that this project escapes itself, not a `gr.Chatbot`: that one reads Markdown, and what its
sanitiser lets through still makes the browser fetch pictures.
"""

import gradio as gr

from ..chat.generation import GenerationParameters
from ..chat.session import ChatSession
from .bubbles import STYLE, bubbles, download_link, meter, notice
from .texts import PERSONA_FIELDS, SLIDERS, label

REFRESH_SECONDS = 1.0  # how soon a tab sees what was said in another one

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
    """The components of the page; `blocks` is the page.

    Args:
        names: the conversations to pick from.
        context: the model's context length in tokens.
        language: "zh" or "en".
    """

    def __init__(self, names: list[str], context: int, language: str):
        self.context, self.language = context, language
        # Uploaded files are read at once and deleted within the hour.
        self.blocks = gr.Blocks(title=self.text("title"), analytics_enabled=False, delete_cache=(3600, 3600))
        with self.blocks:
            self.visitor = gr.BrowserState("", storage_key="characterglm-visitor")
            self.tab = gr.State()
            self.clock = gr.Timer(REFRESH_SECONDS, active=False)  # until the tab knows whose it is
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._chat(names)
                with gr.Column(scale=2, min_width=320):
                    self._settings()

    def text(self, key: str) -> str:
        """A text of the page in its language."""
        return label(key, self.language)

    def _chat(self, names: list[str]) -> None:
        self.picker = gr.Dropdown(
            names, value=names[0], label=self.text("character"), filterable=False, elem_id="picker"
        )
        with gr.Column(elem_classes="cg-scroll", elem_id="conversation"):
            self.draft = gr.HTML(elem_id="draft")  # first, because the column is turned over: it keeps the end in view
            self.log = gr.HTML(elem_id="log")
        self.problem = gr.HTML(elem_classes="cg-line", elem_id="problem", visible=False)
        self.box = gr.Textbox(placeholder=self.text("message"), show_label=False, lines=1, max_lines=6, elem_id="box")
        with gr.Row(elem_classes="cg-buttons"):
            self.send = self._button("send", "primary")
            self.stop = self._button("stop", "stop")
            self.regenerate = self._button("regenerate")
            with gr.Row(elem_classes="cg-buttons cg-together"):
                self.previous = gr.Button("‹", size="md", elem_id="previous")
                self.position = gr.HTML(elem_id="position")
                self.next = gr.Button("›", size="md", elem_id="next")
            self.undo, self.edit, self.clear = self._button("undo"), self._button("edit"), self._button("clear")
        with gr.Group(visible=False) as self.editor:
            self.query = gr.Textbox(label=self.text("query"), lines=2, elem_id="query")
            self.response = gr.Textbox(label=self.text("response"), lines=3, elem_id="response")
            with gr.Row():
                self.save, self.cancel = self._button("save", "primary"), self._button("cancel")
        self.meter = gr.HTML(elem_classes="cg-line", elem_id="meter")

    def _settings(self) -> None:
        with gr.Accordion(self.text("persona")):
            self.persona = [
                gr.Textbox(label=self.text(name), lines=1 if name.endswith("name") else 3, elem_id=name)
                for name in PERSONA_FIELDS
            ]
            self.apply = self._button("apply")
        with gr.Accordion(self.text("parameters")):
            self.sliders = {
                name: gr.Slider(low, high, step=step, label=name, elem_id=name)
                for name, (low, high, step) in SLIDERS.items()
            }
            self.sliders["max_length"] = gr.Slider(64, self.context, step=64, label="max_length", elem_id="max_length")
        with gr.Accordion(self.text("files"), open=False, elem_id="files"):
            self.export = self._button("export")
            self.links = gr.HTML(elem_classes="cg-links", elem_id="links")
            self.upload = gr.UploadButton(
                self.text("import"), type="binary", file_types=[".json", ".png"], size="md", elem_id="upload"
            )

    def _button(self, name: str, variant: str = "secondary") -> gr.Button:
        return gr.Button(self.text(name), variant=variant, size="md", elem_id=name)

    # --- what changes: component -> its new value or properties

    def conversation(self, session: ChatSession) -> dict:
        """The conversation, what can be done with it now, and its meter."""
        draft, several = session.draft, len(session.alternatives) > 1
        idle = draft is None
        while_idle = (self.send, self.regenerate, self.undo, self.edit, self.clear, self.apply, self.save, self.upload)
        return {
            self.log: "".join(bubbles(session.session_meta, session.history if draft is None else draft[0])),
            self.draft: self._bubbles_of(session, draft),
            **{button: gr.update(interactive=idle) for button in while_idle},
            self.stop: gr.update(interactive=not idle),
            **{button: gr.update(visible=several, interactive=idle) for button in (self.previous, self.next)},
            self.position: gr.update(value=f"{session.alternative + 1}/{len(session.alternatives)}", visible=several),
            self.meter: meter(session, self.language),
        }

    def growing(self, session: ChatSession) -> dict:
        """Only the exchange being written: all that changes from token to token."""
        return {self.draft: self._bubbles_of(session, session.draft)}

    def _bubbles_of(self, session: ChatSession, draft: tuple | None) -> str:
        return "".join(bubbles(session.session_meta, [[draft[1], f"{draft[2]} ▌"]])) if draft else ""

    def settings(self, name: str, names: list[str], session: ChatSession) -> dict:
        """The conversation's name, its persona and its parameters."""
        parameters: GenerationParameters = session.parameters
        return {
            self.picker: gr.update(choices=names, value=name),
            **{box: getattr(session.session_meta, field, "") for field, box in zip(PERSONA_FIELDS, self.persona)},
            **{slider: self._slider(key, getattr(parameters, key)) for key, slider in self.sliders.items()},
            self.editor: gr.update(visible=False),
            self.links: "",
        }

    def _slider(self, name: str, value: float | None):
        """A slider at this value, even if it lies outside the usual range; None means the whole context."""
        value = self.context if value is None else value
        low, high, _ = SLIDERS.get(name, (64, self.context, 64))
        return gr.update(value=value, minimum=min(low, value), maximum=max(high, value))

    def error(self, text: str) -> dict:
        """A problem below the conversation; an empty text takes it away."""
        return {self.problem: gr.update(value=notice(text, "error") if text else "", visible=bool(text))}

    def editing(self, session: ChatSession) -> dict:
        """The form with both sides of the last exchange; a greeting has no query to change."""
        query, response = session.history[-1]
        return {
            self.editor: gr.update(visible=True),
            self.query: gr.update(value=query, visible=bool(query)),
            self.response: response,
        }

    def files(self, files: dict[str, bytes]) -> dict:
        """Links that hold the files themselves: the server keeps none."""
        return {self.links: " ".join(download_link(name, content) for name, content in files.items())}

    def card(self, values: tuple[str, ...], source: str) -> dict:
        """What the persona form holds, as the fields of a `CharacterCard`."""
        return dict(zip(PERSONA_FIELDS, values)) | {"source": source}
