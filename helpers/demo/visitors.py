"""Who uses the web page: each browser has its conversations, each of its tabs shows one of them."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from ..chat.session import ChatSession
from ..errors import BusyError
from .conversations import Conversations
from .status import BUSY, error_text

MAX_VISITORS = 500  # who has not been here for longest is forgotten
MAX_CACHES = 8  # conversations that keep their KV cache: that of a 6B conversation of 2,000 tokens takes 57 MB


class Writer:
    """Reads the replies of a session in a thread of its own: they go on when the page that asked for them is reloaded,
    and every tab can show them while they grow.

    `draft` is the exchange being written, [query, text so far], or None. `changes` counts what a tab may have missed.
    """

    def __init__(self, session: ChatSession, on_end: Callable[[ChatSession], None]):
        self.session, self.on_end = session, on_end
        self.draft: list[str] | None = None
        self.past: list[list[str]] = []  # what was said before the draft
        self.problem = ""  # why the last reply failed
        self.unsent = ""  # and to what
        self.changes = 0
        self._lock = threading.Lock()

    def send(self, query: str) -> None:
        """Begin a reply to `query`; `BusyError` while another is written."""
        self._start(self.session.stream(query), self.session.history, query)

    def regenerate(self) -> None:
        """Begin another reply to the last message."""
        history = self.session.history
        self._start(self.session.stream_again(), history[:-1], history[-1][0] if history else "")

    def _start(self, texts: Iterator[str], past: list[list[str]], query: str) -> None:
        with self._lock:
            if self.draft is not None:
                raise BusyError(BUSY)
            self.past, self.draft, self.problem = past, [query, ""], ""
        self.changes += 1
        threading.Thread(target=self._read, args=(texts, query), name="writer", daemon=True).start()

    def _read(self, texts: Iterator[str], query: str) -> None:
        try:
            for text in texts:
                self.draft = [query, text]
                self.changes += 1
            self.on_end(self.session)
        except Exception as error:
            self.problem, self.unsent = error_text(error), query
        finally:
            self.draft = None
            self.changes += 1


@dataclass
class Visitor:
    """The conversations of one browser, and who writes in them."""

    conversations: Conversations
    writers: dict[str, Writer]


class Visitors:
    """Finds a browser's conversations again by the id it keeps.

    Args:
        make: makes the conversations of a new visitor.
    """

    def __init__(self, make: Callable[[], Conversations]):
        self.make = make
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()  # least recently seen first
        self._cached: OrderedDict[int, ChatSession] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[str, Visitor]:
        """The visitor of this id; for an unknown one a new visitor with a new id, as nobody may choose their own."""
        with self._lock:
            if not isinstance(key, str) or key not in self._visitors:
                key = secrets.token_urlsafe(16)
                self._visitors[key] = Visitor(self.make(), {})
            self._visitors.move_to_end(key)
            if len(self._visitors) > MAX_VISITORS:
                self._visitors.popitem(last=False)
            return key, self._visitors[key]

    def writer(self, visitor: Visitor, name: str) -> Writer:
        """Who writes in the visitor's conversation of this name."""
        with self._lock:
            if name not in visitor.writers:
                visitor.writers[name] = Writer(visitor.conversations.sessions[name], self._keep_cache)
            return visitor.writers[name]

    def _keep_cache(self, session: ChatSession) -> None:
        """Let the conversations used last keep their KV cache, and the others give it back."""
        with self._lock:
            self._cached[id(session)] = session
            self._cached.move_to_end(id(session))
            _, oldest = self._cached.popitem(last=False) if len(self._cached) > MAX_CACHES else (0, None)
        if oldest is not None:
            with suppress(BusyError):  # in use again: it will be the newest when its reply ends
                oldest.free_cache()
