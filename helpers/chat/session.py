"""`ChatSession`: a conversation that keeps its KV cache, and can go back, change and be saved."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..characters.cards import CHAT_FORMAT
from ..characters.personas import as_session_meta
from ..errors import BusyError, ChatError
from ..model.kv_cache import new_cache
from .chat import last, make_reply, read
from .fitting import check_history, check_text, context_limit, encode_turns, history_to_messages, with_examples
from .generation import GenerationParameters, decode_reply, parameters_for
from .reply import Reply


class ChatSession:
    """A conversation with one character, which keeps the KV cache from turn to turn.

    Only tokens that differ from the last prompt are computed again, so the time to the first token does not grow with
    the conversation. `history` is a list of [query, response] and may be read at any time. `regenerate` keeps the old
    replies: `alternatives` has them all, `swipe` shows another one.

    Args:
        session_meta: persona; a `CharacterCard` with a greeting lets the character speak first.
        **generation: defaults for every reply of this session; `send` can override them.
    """

    def __init__(self, model, tokenizer, session_meta, **generation):
        GenerationParameters.check(generation)
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self._cache, self._lock = new_cache(model), threading.Lock()
        # Of the last reply: what was said before it, its query, itself, and the text that it goes on from.
        self._writing: tuple[list, str, Reply, str] | None = None
        self.session_meta = as_session_meta(session_meta)
        self.clear()

    def send(self, query: str, **generation) -> str:
        """Say something and return the whole reply. Raises as `chat`; everything is refused while a reply is written."""
        return last(self.stream(query, **generation))

    def stream(self, query: str, **generation) -> Iterator[str]:
        """Say something and yield the growing reply.

        When it ends, is stopped, or the iterator is closed, what there is of it joins the history; after an error the
        history stays as it was. An iterator that is neither read on nor closed keeps nobody waiting.
        """
        yield from read(self.tokenizer, self.begin(query, **generation))

    def begin(self, query: str, **generation) -> Reply:
        """Say something and return at once: the reply is written in the background, see `draft` and `error`."""
        return self._begin(generation, query)

    def stop(self) -> None:
        """End the reply being written, within one token; what there is of it is kept. From any thread."""
        if self._writing is not None:
            self._writing[2].stop()

    def regenerate(self, **generation) -> str:
        """Answer the last query again, in place of the last reply, and return the new one."""
        return last(self.stream_again(**generation))

    def stream_again(self, **generation) -> Iterator[str]:
        yield from read(self.tokenizer, self.begin_again(**generation))

    def begin_again(self, **generation) -> Reply:
        """Like `regenerate`, in the background. A seed of the session is raised: the same would write the same reply."""
        if (seed := self.generation.get("seed")) is not None:
            generation = {"seed": seed + len(self.alternatives), **generation}
        return self._begin(generation, again=True)

    def begin_more(self, **generation) -> Reply:
        """Let the last reply go on where it ends, by a token at least. As it was, it stays among the alternatives."""
        return self._begin({"min_new_tokens": 1, **generation}, again=True, begun=self._last_exchange()[1])

    @property
    def draft(self) -> tuple[list, str, str] | None:
        """While a reply is written: the history before it, its query, and its text so far."""
        if self._writing is None or not self._writing[2].running:
            return None
        past, query, reply, begun = self._writing
        return past, query, begun + decode_reply(self.tokenizer, reply.token_ids)

    @property
    def error(self) -> BaseException | None:
        """Why the last reply failed, until the conversation goes on or changes."""
        return self._writing and self._writing[2].error

    @property
    def alternatives(self) -> list[str]:
        """The replies to the last query, in the order made; one of them is in the history, see `alternative`."""
        before, after = self._others
        return [*before, self.history[-1][1], *after] if self.history else []

    @property
    def alternative(self) -> int:
        return len(self._others[0])

    def swipe(self, step: int = 1) -> str:
        """Put another alternative into the history: the next (1) or the previous (-1). At either end nothing happens."""
        with self._changing():
            greets = len(self.alternatives) > 1  # a card may have several greetings
            query, _ = self.history[-1] if greets else self._last_exchange()
            replies = self.alternatives
            shown = min(max(self.alternative + step, 0), len(replies) - 1)
            self._others = (replies[:shown], replies[shown + 1 :])
            self.history[-1] = [query, replies[shown]]
            return replies[shown]

    def undo(self) -> str:
        """Take the last exchange back, with all its alternatives, and return its query."""
        with self._changing():
            query, _ = self._last_exchange()
            self.history.pop()
            self._others = ([], [])
            return query

    def delete(self, index: int, following: bool = False) -> None:
        """Take an exchange out of the history, and all `following` ones if so asked. The others go on as if it never was."""
        with self._changing():
            self._exchange(index)
            if following or index == len(self.history) - 1:
                self._others = ([], [])
            del self.history[index : len(self.history) if following else index + 1]

    def edit(self, query: str | None = None, response: str | None = None, index: int = -1) -> None:
        """Change either side of an exchange, by default the last (of a greeting only the response). Alternatives stay."""
        with self._changing():
            old_query, old_response = self._exchange(index) if query is None else self._last_exchange(index)
            self.history[index] = [
                old_query if query is None else check_text(query, "query"),
                old_response if response is None else check_text(response, "response"),
            ]

    def set_persona(self, session_meta) -> None:
        """Go on with the same history under another persona. Only the shown reply stays of the alternatives."""
        with self._changing():
            self.session_meta = as_session_meta(session_meta)
            self._others = ([], [])

    @property
    def parameters(self) -> GenerationParameters:
        """What the next reply is generated with: the model's own defaults and, over them, `generation`."""
        return parameters_for(self.model, self.generation)

    def set_generation(self, **parameters) -> None:
        """Change defaults for the next replies, not for one that is being written. Raises `ChatError`, changing none."""
        generation = {**self.generation, **parameters}
        parameters_for(self.model, generation)
        self.generation = generation

    def context_used(self) -> tuple[int, int]:
        """`(tokens, limit)`: how long the next prompt is before anything is typed, and how long prompt and reply may be."""
        turns = [history_to_messages(self.history[self.dropped_turns :]), [{"role": "user", "content": ""}]]
        if not self.dropped_turns:
            turns = with_examples(self.session_meta, turns)
        return len(encode_turns(self.tokenizer, self.session_meta, turns)), context_limit(self.model, self.parameters)

    def clear(self) -> None:
        """Begin anew: only the greeting of the card, if it has one, remains."""
        with self._changing():
            greeting = getattr(self.session_meta, "greeting", "").strip()
            self.history: list[list[str]] = [["", greeting]] if greeting else []
            self.statistics: dict = {}  # of the last reply, see Reply.statistics
            self.dropped_turns = 0  # oldest exchanges that were not in the last prompt
            # Alternatives before and after the one shown; a card may have other greetings.
            others = list(getattr(self.session_meta, "alternate_greetings", [])) if greeting else []
            self._others: tuple[list[str], list[str]] = ([], others)

    def free_cache(self) -> None:
        """Give the memory of the KV cache back; the next reply computes its whole prompt again."""
        with self._changing():
            self._cache.clear()

    def export(self) -> dict:
        """The conversation as a JSON-serialisable dict, to be opened again with `ChatSession.restore`."""
        return {
            "format": CHAT_FORMAT,
            "session_meta": self.session_meta.model_dump(),
            "generation": dict(self.generation),
            "history": [list(entry) for entry in self.history],
            "alternatives": self.alternatives,
            "alternative": self.alternative,
        }

    def to_markdown(self) -> str:
        """The conversation as Markdown, a paragraph a message."""
        names = (self.session_meta.user_name, self.session_meta.bot_name)
        messages = [(name, text) for entry in self.history for name, text in zip(names, entry) if text]
        return "\n\n".join(f"**{name}**：{' '.join(text.splitlines())}" for name, text in messages)

    @classmethod
    def restore(cls, model, tokenizer, exported: dict) -> "ChatSession":
        """A session from what `export` returned; `ChatError` or `CharacterError` if it is something else or damaged."""
        if not isinstance(exported, dict) or exported.get("format") != CHAT_FORMAT:
            raise ChatError(f"这不是导出的对话 [not an exported chat]：需要 format={CHAT_FORMAT!r}")
        history, generation = exported.get("history"), exported.get("generation", {})
        if not isinstance(history, list) or not isinstance(generation, dict):
            raise ChatError("导出的对话已损坏 [damaged export]：history 应为列表，generation 应为对象")
        check_history(history)
        GenerationParameters.check(generation)  # before it becomes arguments
        session = cls(model, tokenizer, exported.get("session_meta"), **generation)
        session.history = [list(entry) for entry in history]
        session._others = ([], [])  # not the greetings of the card
        shown = session.alternatives  # all that older exports have
        replies, position = exported.get("alternatives", shown), exported.get("alternative", 0)
        if not isinstance(replies, list) or type(position) is not int or replies[position : position + 1] != shown:
            raise ChatError("导出的对话已损坏 [damaged export]：alternatives 里没有 history 的最后一条回复")
        for reply in replies:
            check_text(reply, "alternatives 的一条", may_be_empty=True)
        session._others = (replies[:position], replies[position + 1 :])
        return session

    def _begin(self, generation: dict, query="", again: bool = False, begun: str = "") -> Reply:
        with self._changing():
            if again:
                query, _ = self._last_exchange()
            past = self.history[: len(self.history) - again]
            earlier = self.alternatives if again else []

            def record(reply: Reply) -> None:  # when it has ended, whether or not somebody reads it
                self._others = (earlier, [])
                self.history = [*past, [query, begun + decode_reply(self.tokenizer, reply.token_ids)]]
                self.statistics = reply.statistics()

            about = (self.model, self.tokenizer, self.session_meta, query, past, {**self.generation, **generation})
            reply, self.dropped_turns = make_reply(*about, self.dropped_turns, self._cache, record, begun)
            self._writing = past, query, reply, begun
            return reply.start()  # only now: a stop() must find the reply it is meant for

    def _exchange(self, index: int) -> list[str]:
        if not -len(self.history) <= index < len(self.history):
            raise ChatError(
                "没有这一轮对话 [no such exchange]" if self.history else "还没有可以编辑的对话 [nothing to edit]"
            )
        return self.history[index]

    def _last_exchange(self, index: int = -1) -> list[str]:
        if not self.history or not self._exchange(index)[0]:
            raise ChatError("还没有说过话 [no exchange yet]：先用 send 说一句")
        return self.history[index]

    @contextmanager
    def _changing(self):
        """Refuse at once while a reply is written: a second one, or an edit, would lose text."""
        with self._lock:
            if self._writing is not None and self._writing[2].running:
                raise BusyError("正在生成回复 [busy]：请等它结束，或先 stop()")
            self._writing = None
            yield
