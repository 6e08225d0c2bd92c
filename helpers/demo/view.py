"""What the notebook panel looks like: its widgets, their layout, and how a conversation is drawn in them."""

import ipywidgets as widgets

from ..chat.session import ChatSession
from .bubbles import STYLE, bubbles, download_link, notice
from .forms import EditForm, ParameterSliders, PersonaForm, button, row
from .status import meter_text


class PanelView:
    """The widgets of a `ChatPanel`, which decides what they do.

    Args:
        names: the conversations to pick from.
        picked: the one picked.
        context: the model's context length in tokens.
    """

    def __init__(self, names: list[str], picked: str, context: int):
        layout = widgets.Layout
        self.picker = widgets.Dropdown(
            options=names, value=picked, description="角色", layout=layout(max_width="300px")
        )
        self.picker.style.description_width = "auto"
        self.log = widgets.VBox(layout=layout(height="380px", overflow="hidden auto", padding="6px"))
        self.log.layout.flex_flow = "column-reverse"  # keeps the newest message in view
        self.log.add_class("cg-log")
        # Not continuous: then the browser sends what is typed, whole, before it reports a click.
        self.input = widgets.Text(placeholder="说点什么…（Enter 发送）", continuous_update=False)
        self.input.layout = layout(flex="1 1 200px", width="auto")
        self.position = widgets.Label()
        self.previous, self.next = button("‹", "", "上一条回复 [previous]"), button("›", "", "下一条回复 [next]")
        self.buttons = {
            "send": button("发送", "paper-plane", "发送 [send]", "primary"),
            "stop": button("停止", "stop", "停下，已经写出的保留 [stop]", "warning"),
            "regenerate": button("重说", "refresh", "换一种回复，原来的保留 [regenerate]"),
            "undo": button("撤回", "undo", "撤回上一轮 [undo]"),
            "edit": button("编辑", "pencil", "改上一轮的任何一边 [edit]"),
            "clear": button("清空", "trash", "重新开始这段对话 [clear]"),
            "export": button("导出", "download", "JSON、Markdown、角色卡 [export]"),
        }
        self.upload = widgets.FileUpload(accept=".json,.png", description="导入", tooltip="对话或角色卡 [import]")
        self.status, self.meter, self.links = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.persona, self.parameters, self.editor = PersonaForm(), ParameterSliders(context), EditForm()
        self.swipes = widgets.HBox([self.previous, self.position, self.next])
        self.widget = self._arranged()
        self.show_error("")

    def _arranged(self) -> widgets.VBox:
        buttons = self.buttons
        self.links.add_class("cg-links")
        files = widgets.VBox([row(buttons["export"], self.upload), self.links])
        more = widgets.Accordion([self.persona.widget, self.parameters.widget, files])
        more.titles = ("人设 persona", "参数 parameters", "导入与导出 files")
        return widgets.VBox(
            [
                widgets.HTML(STYLE),
                self.picker,
                self.log,
                row(self.input, buttons["send"], buttons["stop"]),
                row(buttons["regenerate"], self.swipes, buttons["undo"], buttons["edit"], buttons["clear"]),
                self.editor.widget,
                self.status,
                self.meter,
                more,
            ]
        )

    def show(self, session: ChatSession) -> None:
        """Draw the conversation, which of its alternatives is shown, and how much of the context it takes."""
        self.draw(session, session.history)
        self.position.value = f"{session.alternative + 1}/{len(session.alternatives)}"
        self.swipes.layout.display = "" if len(session.alternatives) > 1 else "none"
        self.show_meter(session)
        self.links.value = ""  # they were of the conversation as it was

    def show_meter(self, session: ChatSession) -> None:
        """Show how much of the context is taken, and how fast the last reply was."""
        used, limit = session.context_used()
        self.meter.value = f'<progress value="{used}" max="{limit}"></progress> {notice(meter_text(session))}'

    def draw(self, session: ChatSession, history: list[list[str]]) -> None:
        """One widget a message: only those that change travel to the browser. The log lists them from the bottom up."""
        wanted = bubbles(session.session_meta, history)
        present = list(self.log.children)[::-1]
        kept = present[: len(wanted)] + [widgets.HTML() for _ in wanted[len(present) :]]
        for message, value in zip(kept, wanted):
            message.value = value
        if len(kept) != len(present):
            self.log.children = kept[::-1]
        for message in present[len(wanted) :]:
            message.close()

    def show_settings(self, session: ChatSession) -> None:
        """Fill the persona form and move the sliders; what the reader was changing there is gone."""
        self.persona.show(session.session_meta)
        self.parameters.show(session.parameters)

    def show_links(self, files: dict[str, bytes]) -> None:
        """Offer files for download."""
        self.links.value = " ".join(download_link(name, content) for name, content in files.items())

    def show_error(self, text: str) -> None:
        """Show a problem below the conversation; an empty text takes it away."""
        self.status.value = notice(text, "error")
        self.status.layout.display = "" if text else "none"

    def set_busy(self, busy: bool) -> None:
        """While a reply is written it can only be stopped; text and parameters may be changed for the next one."""
        for name, each in self.buttons.items():
            each.disabled = busy != (name == "stop")
        for each in (self.picker, self.upload, self.persona.apply, self.editor.save, self.previous, self.next):
            each.disabled = busy
