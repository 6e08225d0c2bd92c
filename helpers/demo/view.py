"""What the notebook panel looks like: its widgets, their layout, and how a conversation is drawn in them."""

import ipywidgets as widgets

from ..chat.session import ChatSession
from .bubbles import STYLE, bubbles, meter, notice
from .texts import PERSONA_FIELDS, SLIDERS, label, slider_values

AUTO = {"width": "auto"}
FULL = {"style": {"description_width": "130px"}, "layout": {"width": "98%"}}
# Key: (icon, tooltip, colour).
BUTTONS = {
    "send": ("paper-plane", "发送 [send]", "primary"),
    "stop": ("stop", "停下，已经写出的保留 [stop]", "warning"),
    "regenerate": ("refresh", "换一种回复，原来的保留 [regenerate]", ""),
    "previous": ("", "上一条回复 [previous]", ""),
    "next": ("", "下一条回复 [next]", ""),
    "undo": ("undo", "撤回上一轮 [undo]", ""),
    "edit": ("pencil", "改上一轮的任何一边 [edit]", ""),
    "clear": ("trash", "重新开始这段对话 [clear]", ""),
    "save": ("check", "改成这样 [save]", "info"),
    "cancel": ("times", "不改 [cancel]", ""),
    "apply": ("check", "换上这个人设，对话保留 [apply persona]", "info"),
    "export": ("download", "JSON、Markdown、角色卡 [export]", ""),
}


class PanelView:
    """The widgets of a `ChatPanel`, which decides what they do; `context` is the model's length in tokens."""

    def __init__(self, names: list[str], picked: str, context: int):
        self.context = context
        self.picker = widgets.Dropdown(options=names, value=picked, description=label("character"))
        self.log = widgets.VBox(layout={"height": "380px", "overflow": "hidden auto", "padding": "6px"})
        self.log.layout.flex_flow = "column-reverse"  # keeps the newest message in view
        self.log.add_class("cg-log")
        # Not continuous: then the browser sends what is typed, whole, before it reports a click.
        self.input = widgets.Text(placeholder=label("message"), continuous_update=False)
        self.input.layout = {"flex": "1 1 200px", "width": "auto"}
        self.buttons = {
            key: widgets.Button(description=label(key), icon=icon, tooltip=tip, button_style=style, layout=AUTO)
            for key, (icon, tip, style) in BUTTONS.items()
        }
        self.upload = widgets.FileUpload(accept=".json,.png", description="导入", tooltip="对话或角色卡 [import]")
        self.position, self.links = widgets.Label(), widgets.HTML()
        self.status, self.meter = widgets.HTML(), widgets.HTML()
        self.persona = {
            name: (widgets.Text if name.endswith("name") else widgets.Textarea)(description=label(name), **FULL)
            for name in PERSONA_FIELDS
        }
        self.sliders = {
            name: widgets.FloatSlider(min=low, max=high, step=step, description=name, readout_format=".2f", **FULL)
            for name, (low, high, step) in SLIDERS.items()
        }
        self.sliders["max_length"] = widgets.IntSlider(min=64, max=context, step=64, description="max_length", **FULL)
        self.query = widgets.Textarea(description=label("query"), layout=FULL["layout"])
        self.response = widgets.Textarea(description=label("response"), layout=FULL["layout"])
        self.widget = self._arranged()
        self.show_error("")

    def _arranged(self) -> widgets.VBox:
        self.links.add_class("cg-links")
        self.swipes = widgets.HBox([self.buttons["previous"], self.position, self.buttons["next"]])
        self.editor = widgets.VBox([self.query, self.response, self._row("save", "cancel")])
        persona = widgets.VBox([*self.persona.values(), self._row("apply")])
        files = widgets.VBox([self._row("export", self.upload), self.links])
        more = widgets.Accordion([persona, widgets.VBox([*self.sliders.values()]), files])
        more.titles = ("人设 persona", "参数 parameters", "导入与导出 files")
        talk = [self._row(self.input, "send", "stop"), self._row("regenerate", self.swipes, "undo", "edit", "clear")]
        below = [self.editor, self.status, self.meter, more]
        return widgets.VBox([widgets.HTML(STYLE), self.picker, self.log, *talk, *below])

    def _row(self, *parts) -> widgets.HBox:
        """Widgets and buttons side by side, which go on in the next line where the window is narrow."""
        children = [self.buttons[part] if isinstance(part, str) else part for part in parts]
        return widgets.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center", "width": "100%"})

    def show(self, session: ChatSession) -> None:
        """Draw the conversation, which of its alternatives is shown, and how much of the context it takes."""
        self.draw(session)
        self.position.value = f"{session.alternative + 1}/{len(session.alternatives)}"
        self.swipes.layout.display = "" if len(session.alternatives) > 1 else "none"
        self.meter.value = meter(session)
        self.links.value = ""  # they were of the conversation as it was

    def draw(self, session: ChatSession) -> None:
        """One widget a message: only those that change travel to the browser. The log lists them from the bottom up."""
        draft = session.draft
        past, query, text = draft or ([], "", "")
        wanted = bubbles(session.session_meta, [*past, [query, f"{text} ▌"]] if draft else session.history)
        present = list(self.log.children)[::-1]
        kept = present[: len(wanted)] + [widgets.HTML() for _ in wanted[len(present) :]]
        for message, value in zip(kept, wanted):
            message.value = value
        if len(kept) != len(present):
            self.log.children = kept[::-1]
        for message in present[len(wanted) :]:
            message.close()
        # While a reply is written it can only be stopped; text and parameters may be changed for the next one.
        busy = draft is not None
        for key, button in self.buttons.items():
            button.disabled = busy != (key == "stop") and key != "cancel"
        self.picker.disabled = self.upload.disabled = busy

    def show_settings(self, session: ChatSession) -> None:
        for name, field in self.persona.items():
            field.value = getattr(session.session_meta, name, "")
        for name, (value, low, high) in slider_values(session, self.context).items():
            slider = self.sliders[name]
            slider.min, slider.max, slider.value = low, high, value

    def show_error(self, text: str) -> None:
        """A problem below the conversation; an empty text takes it away."""
        self.status.value = notice(text, "error")
        self.status.layout.display = "" if text else "none"

    def open_editor(self, query: str, response: str) -> None:
        """Both sides of an exchange, to be changed; a greeting has no query to change."""
        self.query.value, self.response.value = query, response
        self.query.layout.display = "" if query else "none"
        self.editor.layout.display = ""

    def close_editor(self) -> None:
        self.editor.layout.display = "none"
