"""Talking to a character: `chat` and `stream_chat` for one reply, `ChatSession` for a conversation."""

from collections import deque
from collections.abc import Iterator
from contextlib import closing

from ..characters.personas import as_session_meta
from ..model.kv_cache import PromptCache, new_cache
from .fitting import build_turns, context_limit, fit_prompt, warn_dropped
from .generation import GenerationParameters, Reply, decode_growing, model_defaults


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
    response = _last(stream_chat(model, tokenizer, session_meta, query, history, **generation))
    return response, [*map(list, history or []), [query, response]]


def stream_chat(model, tokenizer, session_meta, query, history=None, **generation) -> Iterator[str]:
    """Like `chat`, but yields the growing reply. Closing the iterator stops the model within one token."""
    request = _Request(model, tokenizer, session_meta, query, [] if history is None else history, generation)
    if request.dropped:
        warn_dropped(request.dropped)
    yield from _read(tokenizer, request.reply(new_cache(model)).start())


def _read(tokenizer, reply: Reply) -> Iterator[str]:
    with closing(iter(reply)) as pieces:
        yield from decode_growing(tokenizer, pieces)


def _last(replies: Iterator[str]) -> str:
    with closing(replies):
        return deque(replies, maxlen=1).pop()


class _Request:
    """One reply to be generated: everything is checked when it is made, before anything changes."""

    def __init__(self, model, tokenizer, session_meta, query, history, generation: dict, dropped: int = 0):
        self.model, self.tokenizer = model, tokenizer
        self.parameters = GenerationParameters.check({**model_defaults(model), **generation})
        self.input_ids, self.dropped, max_new_tokens = fit_prompt(
            tokenizer,
            as_session_meta(session_meta),
            build_turns(query, history),
            self.parameters,
            context_limit(model, self.parameters),
            dropped,
        )
        self.config = self.parameters.to_config(max_new_tokens)

    def reply(self, cache: PromptCache, on_end=None) -> Reply:
        return Reply(self.model, self.input_ids, self.config, cache, self.parameters.seed, on_end)
