"""Who uses the web page: each browser has its conversations, each of its tabs shows one of them."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from ..chat.session import ChatSession
from ..errors import BusyError
from .conversations import Conversations

MAX_VISITORS = 500  # the least recently seen is forgotten
MAX_CACHES = 8  # conversations that keep their KV cache: that of a 6B conversation of 2,000 tokens takes 57 MB


class Visitors:
    """Finds a browser's conversations again by the id it keeps; `make` makes those of a new visitor."""

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
