"""Who uses the web page: a browser, which keeps an id and finds its conversations again by it, and its tabs."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from ..chat.reply import Reply
from ..chat.session import ChatSession
from ..errors import BusyError
from .conversations import Conversations
from .texts import DOUBLE_CLICK_SECONDS

MAX_VISITORS = 500  # the least recently seen is forgotten
MAX_CACHES = 8  # conversations that keep their KV cache: that of a 6B conversation of 2,000 tokens takes 57 MB


@dataclass
class Tab:
    """One tab of a browser: which of its conversations it shows, and what the clock has drawn of it."""

    conversations: Conversations
    name: str
    at_home: bool  # whether it shows the gallery
    drawn: object = None
    followed: int = 0  # how many events are drawing a reply here
    clicked: tuple = ()  # what was clicked last, and when
    sent: tuple[str, Reply] | None = None  # what was said last, until `_restore` has looked at it
    edited: int = -1  # the exchange in the form
    unapplied: dict[str, tuple[str, ...]] = field(default_factory=dict)  # personas being changed, by conversation
    proposal: ChatSession | None = None  # in which the model speaks for the reader
    going_on: bool = False  # whether the model speaks for both, one after the other

    @property
    def session(self) -> ChatSession:
        return self.conversations.sessions[self.name]

    def clicked_twice(self, *what) -> bool:
        """Whether this is the second click of a double click."""
        before, self.clicked = self.clicked, (what, time.monotonic())
        return bool(before) and before[0] == what and self.clicked[1] - before[1] < DOUBLE_CLICK_SECONDS


class Visitors:
    """Finds a browser's conversations again by the id it keeps; `make` makes those of a new one."""

    def __init__(self, make: Callable[[], Conversations]):
        self.make = make
        self._visitors: OrderedDict[str, Conversations] = OrderedDict()  # least recently seen first
        self._cached: OrderedDict[ChatSession, None] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[str, Conversations]:
        """The conversations of this id; for an unknown one new ones and a new id, as nobody may choose their own."""
        with self._lock:
            if key not in self._visitors:
                key = secrets.token_urlsafe(16)
                self._visitors[key] = self.make()
            self._visitors.move_to_end(key)
            if len(self._visitors) > MAX_VISITORS:
                self._visitors.popitem(last=False)
            return key, self._visitors[key]

    def keep_cache(self, session: ChatSession) -> None:
        """Called with a session that writes: the ones used last keep their KV cache, the others give it back."""
        with self._lock:
            self._cached[session] = None
            self._cached.move_to_end(session)
            for oldest in list(self._cached)[:-MAX_CACHES]:
                with suppress(BusyError):  # then it stays, until the next reply of somebody
                    oldest.free_cache()
                    del self._cached[oldest]
