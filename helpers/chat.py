"""Talking to a character: `chat` and `stream_chat` for one reply, `ChatSession` for a conversation."""

import bisect
import threading
import time
import warnings
from collections.abc import Iterator

from .characters import CharacterCard, SessionMeta, as_session_meta
from .errors import BusyError, ChatError
from .generation import GenerationParameters, PromptCache, decode_growing, stream_tokens

EXPORT_FORMAT = "characterglm-chat/1"


class ContextWarning(UserWarning):
    """The conversation no longer fits the model's context: its oldest turns are not in the prompt."""


def chat(model, tokenizer, session_meta, query, history=None, **generation):
    """One reply, as the original `model.chat`.

    Args:
        session_meta: a `SessionMeta` or a dict with bot_name, bot_info, user_name, user_info.
        query: what the user says; line breaks become spaces.
        history: list of [query, response]; the query of the first may be "" (a greeting by the character).
        **generation: `do_sample`, `temperature`, `top_p`, `seed`, ...; see `GenerationParameters`.

    Returns:
        `(response, history)`, the history a new list with this exchange at its end.

    Raises:
        ChatError: an empty or invalid text, a malformed history, a senseless parameter, a prompt that cannot fit.
        CharacterError: an invalid persona.
    """
    response = ""
    for response in stream_chat(model, tokenizer, session_meta, query, history, **generation):
        pass
    return response, [*map(list, history or []), [query, response]]


def stream_chat(model, tokenizer, session_meta, query, history=None, **generation) -> Iterator[str]:
    """Like `chat`, but yields the growing reply. Closing the iterator stops the model within one token."""
    request = _Request(model, tokenizer, session_meta, query, history or [], generation)
    if request.dropped:
        warn_dropped(request.dropped)
    yield from request.stream(PromptCache(), threading.Event())


def build_messages(query: str, history) -> list[dict]:
    """The chat messages of a history and a new query.

    Raises:
        ChatError: a text is empty or not valid Unicode, or the history is not a list of [query, response].
    """
    messages = []
    for position, entry in enumerate(history):
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise ChatError(f"history 第 {position + 1} 项应为 [query, response] [malformed history]，收到 {entry!r:.80}")
        if entry[0] != "" or position > 0:
            messages.append({"role": "user", "content": _checked(entry[0], f"history 第 {position + 1} 项的 query")})
        reply = _checked(entry[1], f"history 第 {position + 1} 项的 response", may_be_empty=True)
        messages.append({"role": "assistant", "content": reply})
    return [*messages, {"role": "user", "content": _checked(query, "query")}]


def _checked(text, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise ChatError(f"{where} 应为字符串 [not a string]，收到 {type(text).__name__}")
    if not text.strip() and not may_be_empty:
        raise ChatError(f"{where} 是空的 [empty text]：请先写点什么")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ChatError(f"{where} 含有不成对的代理字符 [invalid Unicode]：请检查文本的编码") from None
    return text


def encode_prompt(tokenizer, session_meta, query: str, history) -> list[int]:
    """The ids of the prompt, from [gMASK] <sop> to the character's name."""
    return tokenizer.apply_chat_template(
        build_messages(query, history), session_meta=session_meta, add_generation_prompt=True
    )["input_ids"]


def fit_history(tokenizer, session_meta, query: str, history, limit: int, dropped: int = 0) -> tuple[list[int], int]:
    """The prompt with as much of the history as `limit` tokens allow. The persona always stays.

    When exchanges must go, the oldest go until the prompt is down to three quarters of the limit: dropping one in every
    turn would change the beginning of every prompt, and no KV cache could be reused.

    Args:
        dropped: how many of the oldest exchanges are left out already.

    Returns:
        `(input_ids, dropped)`.

    Raises:
        ChatError: the persona and the query alone are longer than `limit`.
    """

    def prompt(start: int) -> list[int]:
        return encode_prompt(tokenizer, session_meta, query, history[start:])

    dropped = min(dropped, len(history))
    input_ids = prompt(dropped)
    if len(input_ids) > limit:
        # Fewer exchanges never make a longer prompt, so the smallest number to drop can be found by bisection.
        starts = range(len(history))
        dropped = bisect.bisect_left(starts, True, key=lambda start: len(prompt(start)) <= limit * 3 // 4)
        input_ids = prompt(dropped)
    if len(input_ids) > limit:
        raise ChatError(
            f"人设和这句话太长 [prompt too long]：共 {len(input_ids)} 个 token，最多 {limit}。请缩短人设或这句话"
        )
    return input_ids, dropped


def warn_dropped(dropped: int) -> None:
    """Say that the oldest exchanges are no longer in the prompt."""
    warnings.warn(
        f"对话超出上下文长度 [context full]：最早的 {dropped} 轮没有放进 prompt，人设保留", ContextWarning, stacklevel=3
    )


class _Request:
    """One reply to be generated: everything is checked when it is made, before anything changes."""

    def __init__(self, model, tokenizer, session_meta, query, history, generation: dict, dropped: int = 0):
        self.model, self.tokenizer = model, tokenizer
        self.parameters = GenerationParameters.check(generation)
        context = min(self.parameters.max_length or context_length(model), context_length(model))
        reserve = min(self.parameters.max_new_tokens, max(1, context // 4))  # room for the reply
        self.input_ids, self.dropped = fit_history(
            tokenizer, as_session_meta(session_meta), query, history, context - reserve, dropped
        )
        self.max_new_tokens = min(self.parameters.max_new_tokens, context - len(self.input_ids))

    def stream(self, cache: PromptCache, stop: threading.Event) -> Iterator[str]:
        config = self.parameters.to_config(self.max_new_tokens)
        tokens = stream_tokens(
            self.model, self.input_ids, config, cache=cache, stop=stop, seed=self.parameters.seed
        )
        try:
            yield from decode_growing(self.tokenizer, self._timed(tokens))
        finally:
            tokens.close()

    def _timed(self, tokens):
        self.started, self.first_token, self.tokens_generated = time.perf_counter(), None, 0
        for piece in tokens:
            self.finished = time.perf_counter()
            self.first_token = self.first_token or self.finished
            self.tokens_generated += len(piece)
            yield piece

    def statistics(self) -> dict:
        """Prompt and reply length in tokens, time to first token in seconds, and tokens per second after it."""
        if not self.tokens_generated:
            return {}
        decoding = self.finished - self.first_token
        speed = (self.tokens_generated - 1) / decoding if self.tokens_generated > 1 and decoding > 0 else None
        return {
            "prompt_tokens": len(self.input_ids),
            "new_tokens": self.tokens_generated,
            "time_to_first_token": self.first_token - self.started,
            "tokens_per_second": speed,
        }


def context_length(model) -> int:
    """How many tokens, prompt and reply together, the model was made for (32,768 for the 6B)."""
    return model.config.max_position_embeddings


class ChatSession:
    """A conversation with one character, which keeps the KV cache from turn to turn.

    Only tokens that differ from the last prompt are computed again, so the time to the first token does not grow with
    the conversation. `history` is a list of [query, response] and may be read at any time.

    Args:
        session_meta: persona; a `CharacterCard` with a greeting lets the character speak first.
        **generation: defaults for every reply of this session; `send` can override them.
    """

    def __init__(self, model, tokenizer, session_meta, **generation):
        GenerationParameters.check(generation)
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.statistics: dict = {}  # of the last reply, see _Request.statistics
        self.dropped_turns = 0  # oldest exchanges that were not in the last prompt
        self._cache, self._stop, self._busy = PromptCache(), threading.Event(), threading.Lock()
        self.session_meta = as_session_meta(session_meta)
        self.history: list[list[str]] = []
        self.clear()

    def send(self, query: str, **generation) -> str:
        """Say something and return the whole reply. Raises as `chat`, and `BusyError` while a reply is written."""
        return _last(self.stream(query, **generation))

    def stream(self, query: str, **generation) -> Iterator[str]:
        """Say something and yield the growing reply.

        When the reply ends, or is stopped or the iterator is closed, what there is of it joins the history. If an
        error is raised the history stays as it was.
        """
        return self._reply(query, len(self.history), generation)

    def stop(self) -> None:
        """End the reply being written, within one token; what there is of it is kept. From any thread."""
        self._stop.set()

    def regenerate(self, **generation) -> str:
        """Answer the last query again, in place of the last reply, and return the new one."""
        return _last(self.stream_again(**generation))

    def stream_again(self, **generation) -> Iterator[str]:
        """Like `regenerate`, but yields the growing reply. The old one stays if an error is raised."""
        return self._reply(self._last_exchange()[0], len(self.history) - 1, generation)

    def undo(self) -> str:
        """Take the last exchange back and return its query."""
        with self._not_busy():
            query, _ = self._last_exchange()
            self.history.pop()
            return query

    def edit(self, query: str | None = None, response: str | None = None) -> None:
        """Change either side of the last exchange (of a greeting only the response)."""
        with self._not_busy():
            if not self.history:
                raise ChatError("还没有可以编辑的对话 [nothing to edit]")
            old_query, old_response = self.history[-1]
            if query is not None:
                self._last_exchange()
                old_query = _checked(query, "query")
            if response is not None:
                old_response = _checked(response, "response")
            self.history[-1] = [old_query, old_response]

    def set_persona(self, session_meta) -> None:
        """Go on with the same history under another persona."""
        with self._not_busy():
            self.session_meta = as_session_meta(session_meta)

    def clear(self) -> None:
        """Begin anew: only the greeting of the card, if it has one, remains."""
        with self._not_busy():
            greeting = getattr(self.session_meta, "greeting", "").strip()
            self.history = [["", greeting]] if greeting else []
            self.statistics, self.dropped_turns = {}, 0

    def export(self) -> dict:
        """The conversation as a JSON-serialisable dict, to be opened again with `ChatSession.restore`."""
        return {
            "format": EXPORT_FORMAT,
            "session_meta": self.session_meta.model_dump(),
            "generation": dict(self.generation),
            "history": [list(entry) for entry in self.history],
        }

    def to_markdown(self) -> str:
        """The conversation as Markdown, a paragraph a message."""
        names = (self.session_meta.user_name, self.session_meta.bot_name)
        lines = [f"**{name}**：{text}" for entry in self.history for name, text in zip(names, entry) if text]
        return "\n\n".join(lines)

    @classmethod
    def restore(cls, model, tokenizer, exported: dict) -> "ChatSession":
        """A session from what `export` returned.

        Raises:
            ChatError: not an exported conversation, or damaged; CharacterError: an invalid persona.
        """
        if not isinstance(exported, dict) or exported.get("format") != EXPORT_FORMAT:
            raise ChatError(f"这不是导出的对话 [not an exported chat]：需要 format={EXPORT_FORMAT!r}")
        history, generation = exported.get("history"), exported.get("generation", {})
        if not isinstance(history, list) or not isinstance(generation, dict):
            raise ChatError("导出的对话已损坏 [damaged export]：history 应为列表，generation 应为对象")
        build_messages("检查", history)
        meta = exported.get("session_meta")
        card = CharacterCard.model_validate(meta) if isinstance(meta, dict) and "greeting" in meta else meta
        session = cls(model, tokenizer, as_session_meta(card), **generation)
        session.history = [list(entry) for entry in history]
        return session

    def _reply(self, query, position: int, generation: dict) -> Iterator[str]:
        """Generate a reply to `query` after `history[:position]` and put the exchange at `position`."""
        with self._not_busy():
            past = self.history[:position]
            parameters = {**self.generation, **generation}
            request = _Request(
                self.model, self.tokenizer, self.session_meta, query, past, parameters, self.dropped_turns
            )
            self._note_dropped(request.dropped)
            self._stop = threading.Event()
            response = ""
            try:
                for response in request.stream(self._cache, self._stop):
                    yield response
            except GeneratorExit:
                pass  # the reader left: keep what there is
            self.history = [*past, [query, response]]
            self.statistics = request.statistics()

    def _note_dropped(self, dropped: int) -> None:
        if dropped > self.dropped_turns:
            warn_dropped(dropped)
        self.dropped_turns = dropped

    def _last_exchange(self) -> list[str]:
        if not self.history or not self.history[-1][0]:
            raise ChatError("还没有说过话 [no exchange yet]：先用 send 说一句")
        return self.history[-1]

    def _not_busy(self):
        return _Exclusive(self._busy)


class _Exclusive:
    """Hold a lock or refuse at once: a second reply, or an edit, while one is being written would lose text."""

    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            raise BusyError("正在生成回复 [busy]：请等它结束，或先 stop()")

    def __exit__(self, *exc):
        self.lock.release()


def _last(replies: Iterator[str]) -> str:
    response = ""
    for response in replies:
        pass
    return response
