"""The notebook face of the demo: `ChatPanel`, a chat in the output of a cell, made of ipywidgets."""

import threading
import time
from collections.abc import Callable, Iterator

import ipywidgets as widgets

from ..characters.personas import CharacterCard
from ..chat.fitting import context_length
from ..chat.session import ChatSession
from ..errors import BusyError
from .bubbles import STYLE, bubbles
from .controls import DOUBLE_CLICK_SECONDS
from .conversations import Conversations, change_persona
from .files import exported_files
from .status import BUSY, error_text
from .view import PanelView

REFRESH_SECONDS = 0.1  # a growing reply is drawn this often; each time costs a message to the browser
ENTER_SECONDS = 0.1


class ChatPanel:
    """A chat with every character, shown by the last line of a cell or by `display`.

    Each character has a conversation of its own, so changing the character, and opening a file, loses none. Replies are
    written in a thread: the cell is done at once, and the kernel stays free. The panel lives in the kernel, not in the
    page: show it again after a reload, or twice side by side.

    The methods do what the buttons do, but raise where a button shows the error in the panel. With `block=True` a reply
    is written before the method returns; until then the kernel hears no button.

    Args:
        characters: name to card; by default those of `data/characters.json`.
        character: who is shown first; by default the first of them.
        **generation: defaults for all conversations, see `GenerationParameters`.

    Raises:
        CharacterError: an unknown character; ChatError: a senseless parameter.
    """

    def __init__(
        self,
        model,
        tokenizer,
        characters: dict[str, CharacterCard] | None = None,
        character: str | None = None,
        **generation,
    ):
        self.conversations = Conversations(model, tokenizer, characters, character, **generation)
        self.view = PanelView(self.conversations.names, self.conversations.name, context_length(model))
        self._writing, self._thread = threading.Lock(), None
        self._connect()
        self.view.set_busy(False)
        self._show_conversation()

    @property
    def session(self) -> ChatSession:
        """The conversation shown."""
        return self.conversations.session

    def send(self, text: str | None = None, block: bool = False) -> None:
        """Say `text`, by default what is in the input line. If an error comes of it, it is put back there."""
        query = self.view.input.value if text is None else text
        if text is None and not query.strip():
            return  # the second click of two
        self._write(self.session.stream(query), self.session.history, query, block)

    def regenerate(self, block: bool = False) -> None:
        """Write another reply to the last message; the old ones can be shown again with `swipe`."""
        history = self.session.history
        query = history[-1][0] if history else ""
        self._write(self.session.stream_again(), history[:-1], query, block)

    def stop(self) -> None:
        """End the reply being written; what there is of it is kept."""
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
        """Change either side of the last exchange."""
        self.session.edit(query, response)
        self.view.editor.close()
        self.refresh()

    def clear(self) -> None:
        """Begin this conversation anew."""
        self.session.clear()
        self.refresh()

    def set_persona(self, card: CharacterCard) -> None:
        """Go on under another persona. Before the first message its greeting is shown, too."""
        change_persona(self.session, card)
        self.view.show_settings(self.session)
        self.refresh()

    def open(self, content: bytes) -> None:
        """Open an exported conversation or a card (JSON or PNG) beside the others, and show it."""
        self._refuse_while_writing()
        name = self.conversations.open(content)
        self.view.picker.options = self.conversations.names  # may pick the first
        self.view.picker.value = name
        self._show_conversation()

    def wait(self) -> None:
        """Return when the reply being written has ended."""
        if self._thread is not None:
            self._thread.join()

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

    # --- from the widgets to the methods

    def _connect(self) -> None:
        view = self.view
        for name in ("send", "stop"):
            self._on_click(view.buttons[name], getattr(self, name))
        for name in ("regenerate", "undo", "clear"):
            self._on_click(view.buttons[name], getattr(self, name), once=True)
        self._on_click(view.previous, lambda: self.swipe(-1))
        self._on_click(view.next, lambda: self.swipe(1))
        self._on_click(view.buttons["edit"], self._open_editor)
        self._on_click(view.editor.save, lambda: self.edit(**view.editor.changes()))
        self._on_click(view.persona.apply, self._apply_persona)
        self._on_click(view.buttons["export"], self._export)
        view.input.on_msg(self._entered)
        view.picker.observe(self._picked, "value")
        view.upload.observe(self._uploaded, "value")
        view.parameters.on_change = self._parameter_moved

    def _on_click(self, button: widgets.Button, action: Callable[[], None], once: bool = False) -> None:
        """Let a button do something; `once` ignores the second click of a double click, which would undo twice."""
        last_click = float("-inf")

        def act(_):
            nonlocal last_click
            before, last_click = last_click, time.monotonic()
            if not once or last_click - before > DOUBLE_CLICK_SECONDS:
                self._attempt(action)

        button.on_click(act)

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
        if change.new == self.conversations.name:
            return
        if self._writing.locked():  # the browser had not yet heard that it must wait
            self.view.picker.value = change.old
            return
        self.conversations.show(change.new)
        self._show_conversation()

    def _show_conversation(self) -> None:
        self.view.show_error("")
        self.view.editor.close()
        self.view.show_settings(self.session)
        self.refresh()

    def _parameter_moved(self, name: str, value: float) -> None:
        self.session.set_generation(**{name: value})
        self.view.show_meter(self.session)

    def _uploaded(self, change) -> None:
        if change.new:
            self._attempt(lambda: self.open(bytes(change.new[0]["content"])))
            self.view.upload.value = ()  # so that the same file can be chosen again

    def _open_editor(self) -> None:
        self._refuse_while_writing()
        if self.session.history:
            self.view.editor.open(*self.session.history[-1])

    def _apply_persona(self) -> None:
        source = getattr(self.session.session_meta, "source", "original")
        self.set_persona(self.view.persona.card(source))

    def _export(self) -> None:
        self._refuse_while_writing()
        self.view.show_links(exported_files(self.session))

    # --- writing a reply

    def _write(self, texts: Iterator[str], past: list, query: str, block: bool) -> None:
        """Draw a reply while it grows, in a thread of its own or, if `block`, in this one."""
        if not self._writing.acquire(blocking=False):
            raise BusyError(BUSY)
        self.view.input.value = ""
        self.view.set_busy(True)
        if block:
            self._read(texts, past, query)
            return
        self._thread = threading.Thread(
            target=self._attempt, args=(lambda: self._read(texts, past, query),), daemon=True
        )
        self._thread.start()

    def _read(self, texts: Iterator[str], past: list, query: str) -> None:
        drawn = float("-inf")
        try:
            for text in texts:
                if time.monotonic() - drawn >= REFRESH_SECONDS:
                    self.view.draw(self.session, [*past, [query, f"{text} ▌"]])
                    drawn = time.monotonic()
        except Exception:
            self.view.input.value = self.view.input.value or query
            raise
        finally:
            self.refresh()  # what the session made of it: the whole reply, or nothing after an error
            self.view.set_busy(False)
            self._writing.release()

    def _refuse_while_writing(self) -> None:
        if self._writing.locked():
            raise BusyError(BUSY)
