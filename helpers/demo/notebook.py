"""The notebook face of the demo: `ChatPanel`, a chat in the output of a cell, made of ipywidgets."""

import threading
import time
from collections.abc import Callable

from ..characters.personas import CharacterCard
from ..chat.fitting import context_length
from ..chat.reply import Reply
from ..chat.session import ChatSession
from ..errors import BusyError
from .bubbles import STYLE, bubbles, download_links, meter
from .conversations import Conversations, change_persona, edit_exchange
from .files import exported_files
from .texts import DOUBLE_CLICK_SECONDS, error_text
from .view import PanelView

REFRESH_SECONDS = 0.1  # a growing reply is drawn this often; each time costs a message to the browser
ENTER_SECONDS = 0.1


class ChatPanel:
    """A chat with every character, shown by the last line of a cell or by `display`.

    Each character has a conversation of its own, so changing the character, and opening a file, loses none. Replies are
    written in the background: the cell is done at once, and the kernel stays free. The panel lives in the kernel, not
    in the page: show it again after a reload, or twice side by side.

    The methods do what the buttons do, but raise where a button shows the error in the panel. With `block=True` a reply
    is written before the method returns; until then the kernel hears no button. Arguments as of `Conversations`.
    """

    def __init__(self, model, tokenizer, characters=None, character: str | None = None, **generation):
        self.conversations = Conversations(model, tokenizer, characters, character, **generation)
        self.view = PanelView(self.conversations.names, self.conversations.name, context_length(model))
        self._drawing: threading.Thread | None = None
        self._clicked = float("-inf")  # when
        self._showing = False  # whether sliders move because a conversation is being shown
        self._connect()
        self._show_conversation()

    @property
    def session(self) -> ChatSession:
        return self.conversations.session

    def send(self, text: str | None = None, block: bool = False) -> None:
        """Say `text`, by default what is in the input line. If an error comes of it, it is put back there."""
        query = self.view.input.value if text is None else text
        if text is None and not query.strip():
            return  # the second click of two
        reply = self.session.begin(query)
        self.view.input.value = ""
        self._follow(reply, block, query)

    def regenerate(self, block: bool = False) -> None:
        """Write another reply to the last message; the old ones can be shown again with `swipe`."""
        self._follow(self.session.begin_again(), block)

    def stop(self) -> None:
        self.session.stop()

    def swipe(self, step: int) -> None:
        """Show the next (1) or the previous (-1) reply to the last message."""
        self.session.swipe(step)
        self.refresh()

    def undo(self) -> None:
        """Take the last exchange back. Its text returns to the input line, unless something is written there."""
        query = self.session.undo()
        self.view.input.value = self.view.input.value or query
        self.refresh()

    def edit(self, query: str | None = None, response: str | None = None) -> None:
        self.session.edit(query, response)
        self.view.close_editor()
        self.refresh()

    def clear(self) -> None:
        self.session.clear()
        self.refresh()

    def set_persona(self, card: CharacterCard) -> None:
        """Go on under another persona. Before the first message its greeting is shown, too."""
        change_persona(self.session, card)
        self._show_conversation()

    def open(self, content: bytes) -> None:
        """Open an exported conversation or a card (JSON or PNG) beside the others, and show it."""
        if self.session.draft is not None:
            raise BusyError("正在生成回复 [busy]：请等它结束，或按“停止”")
        name = self.conversations.open(content)
        self.view.picker.options = self.conversations.names  # may pick the first
        self.view.picker.value = name
        self._show_conversation()

    def close(self) -> None:
        """Let go of the model. What was said stays on the page, but nothing can be done with it any more."""
        if self.conversations is not None:
            self.stop()
            self.wait()
        self.conversations = None  # ipywidgets keeps the widgets, and so this panel, as long as the kernel lives
        view = self.view
        for widget in (view.picker, view.input, view.upload, *view.buttons.values(), *view.sliders.values()):
            widget.disabled = True

    def wait(self) -> None:
        """Return when the reply being written has ended and is drawn."""
        if self._drawing is not None:
            self._drawing.join()

    def refresh(self) -> None:
        """Draw the session as it is now; needed only after the session itself was used."""
        self.view.show(self.session)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live panel and, for pages without a kernel, the conversation as text and HTML."""
        static = "".join(bubbles(self.session.session_meta, self.session.history))
        return {
            **self.view.widget._repr_mimebundle_(**kwargs),
            "text/plain": self.session.to_markdown(),
            "text/html": f"{STYLE}<div>{static}</div>",
        }

    def _follow(self, reply: Reply, block: bool, query: str = "") -> None:
        """Draw a reply while it grows, in a thread of its own or, if `block`, in this one."""

        def draw() -> None:
            while not reply.wait(REFRESH_SECONDS):
                self.view.draw(self.session)
            self.refresh()  # what the session made of it: the whole reply, or nothing after an error
            if reply.error is not None:
                self.view.input.value = self.view.input.value or query
                raise reply.error

        self.view.draw(self.session)
        if block:
            draw()
        else:
            self._drawing = threading.Thread(target=self._attempt, args=[draw], daemon=True)
            self._drawing.start()

    # --- from the widgets to the methods

    def _connect(self) -> None:
        view = self.view
        actions = {
            "send": self.send,
            "stop": self.stop,
            "regenerate": lambda: self._once(self.regenerate),
            "undo": lambda: self._once(self.undo),
            "clear": lambda: self._once(self.clear),
            "previous": lambda: self.swipe(-1),
            "next": lambda: self.swipe(1),
            "edit": self._open_editor,
            "save": self._save,
            "cancel": view.close_editor,
            "apply": self._apply_persona,
            "export": self._export,
        }
        for name, action in actions.items():
            view.buttons[name].on_click(lambda _, action=action: self._attempt(action))
        view.input.on_msg(self._entered)
        view.picker.observe(self._picked, "value")
        view.upload.observe(self._uploaded, "value")
        for slider in view.sliders.values():
            slider.observe(self._parameter_moved, "value")

    def _once(self, action: Callable[[], None]) -> None:
        """Ignore the second click of a double click, which would undo twice."""
        before, self._clicked = self._clicked, time.monotonic()
        if self._clicked - before > DOUBLE_CLICK_SECONDS:
            action()

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something for the reader; an exception in a widget's callback would vanish, so it is shown."""
        self.view.show_error("")
        try:
            action()
        except Exception as error:
            self.view.show_error(error_text(error))

    def _entered(self, _, content: dict, buffers) -> None:
        if content.get("event") == "submit":  # the Enter key: the browser sends the text right after it
            threading.Timer(ENTER_SECONDS, self._attempt, [self.send]).start()

    def _picked(self, change) -> None:
        if self.session.draft is not None:  # the browser had not yet heard that it must wait
            self.view.picker.value = self.conversations.name
        elif change.new != self.conversations.name:
            self.conversations.show(change.new)
            self._show_conversation()

    def _show_conversation(self) -> None:
        self.view.show_error("")
        self.view.close_editor()
        self._showing = True
        self.view.show_settings(self.session)
        self._showing = False
        self.refresh()

    def _parameter_moved(self, change) -> None:
        if not self._showing:
            self.session.set_generation(**{change.owner.description: change.new})
            self.view.meter.value = meter(self.session)

    def _uploaded(self, change) -> None:
        if change.new:
            self._attempt(lambda: self.open(bytes(change.new[0]["content"])))
            self.view.upload.value = ()  # so that the same file can be chosen again

    def _open_editor(self) -> None:
        self.session.edit()  # changes nothing, but refuses while a reply is written, or if there is nothing to edit
        self.view.open_editor(*self.session.history[-1])

    def _save(self) -> None:
        edit_exchange(self.session, self.view.query.value, self.view.response.value)
        self.view.close_editor()
        self.refresh()

    def _apply_persona(self) -> None:
        fields = {name: field.value for name, field in self.view.persona.items()}
        self.set_persona(dict(self.session.session_meta) | fields)

    def _export(self) -> None:
        self.view.links.value = download_links(exported_files(self.session))
