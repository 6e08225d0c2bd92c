"""Parts of the notebook panel that know nothing of a conversation: persona form, parameter sliders, edit form."""

from collections.abc import Callable

import ipywidgets as widgets

from ..characters.personas import CharacterCard, SessionMeta, as_session_meta
from ..chat.generation import GenerationParameters
from .controls import SLIDERS

WIDE = {"description_width": "130px"}
FULL = widgets.Layout(width="98%")
PERSONA_LABELS = {
    "bot_name": "角色名 bot_name",
    "bot_info": "人设 bot_info",
    "user_name": "你的名字 user_name",
    "user_info": "你的身份 user_info",
    "greeting": "开场白 greeting",
}


def button(label: str, icon: str, tooltip: str, style: str = "") -> widgets.Button:
    """A button as wide as its label."""
    layout = widgets.Layout(width="auto")
    return widgets.Button(description=label, icon=icon, tooltip=tooltip, button_style=style, layout=layout)


def row(*children: widgets.Widget) -> widgets.HBox:
    """Widgets side by side, which go on in the next line where the window is narrow."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", width="100%"))


class PersonaForm:
    """The five texts of a character card."""

    def __init__(self):
        self.fields = {
            name: widgets.Text(description=label, style=WIDE, layout=FULL)
            if name.endswith("name")
            else widgets.Textarea(description=label, style=WIDE, layout=FULL, rows=3)
            for name, label in PERSONA_LABELS.items()
        }
        self.apply = button("应用人设", "check", "换上这个人设，对话保留 [apply persona]", "info")
        self.widget = widgets.VBox([*self.fields.values(), row(self.apply)])

    def show(self, session_meta: SessionMeta) -> None:
        """Fill the form."""
        for name, field in self.fields.items():
            field.value = getattr(session_meta, name, "")

    def card(self, source: str) -> CharacterCard:
        """What the form holds; `CharacterError` names the field at fault."""
        return as_session_meta({name: field.value for name, field in self.fields.items()} | {"source": source})


class ParameterSliders:
    """Generation parameters; `on_change(name, value)` is called when the reader moves a slider."""

    on_change: Callable[[str, float], None] | None = None

    def __init__(self, context: int):
        self.context, self._showing = context, False
        self.sliders: dict[str, widgets.Widget] = {
            name: widgets.FloatSlider(
                min=low, max=high, step=step, description=name, style=WIDE, layout=FULL, readout_format=".2f"
            )
            for name, (low, high, step) in SLIDERS.items()
        }
        self.sliders["max_length"] = widgets.IntSlider(
            value=context, min=64, max=context, step=64, description="max_length", style=WIDE, layout=FULL
        )
        for slider in self.sliders.values():
            slider.observe(self._moved, "value")
        self.widget = widgets.VBox(list(self.sliders.values()))

    def show(self, parameters: GenerationParameters) -> None:
        """Move the sliders to these values, even if they lie outside the usual range."""
        self._showing = True
        for name, slider in self.sliders.items():
            value = getattr(parameters, name) or self.context
            slider.min, slider.max = min(slider.min, value), max(slider.max, value)
            slider.value = value
        self._showing = False

    def _moved(self, change) -> None:
        if self.on_change is not None and not self._showing:
            self.on_change(change.owner.description, change.new)


class EditForm:
    """Both sides of the last exchange, to be changed; hidden until it is opened."""

    def __init__(self):
        self.query = widgets.Textarea(description="你的话", rows=2, layout=FULL)
        self.response = widgets.Textarea(description="回复", rows=3, layout=FULL)
        self.save = button("保存", "check", "改成这样 [save]", "info")
        self.cancel = button("取消", "times", "不改 [cancel]")
        self.cancel.on_click(lambda _: self.close())
        self.widget = widgets.VBox([self.query, self.response, row(self.save, self.cancel)])
        self.close()

    def open(self, query: str, response: str) -> None:
        """Show the form; a greeting has no query to change."""
        self.query.value, self.response.value = query, response
        self.query.layout.display = "" if query else "none"
        self.widget.layout.display = ""

    def close(self) -> None:
        """Hide the form."""
        self.widget.layout.display = "none"

    def changes(self) -> dict[str, str]:
        """Arguments for `ChatSession.edit`."""
        query = {} if self.query.layout.display == "none" else {"query": self.query.value}
        return query | {"response": self.response.value}
