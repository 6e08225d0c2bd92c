"""`chat` and `stream_chat`: one reply to a query and a history."""

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import closing

from ..characters.personas import as_session_meta
from ..model.kv_cache import new_cache
from .fitting import ContextWarning, build_turns, context_limit, fit_prompt, with_examples
from .generation import decode_growing, parameters_for
from .reply import Reply


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
        ChatError: a text, history or parameter is not valid, or the prompt cannot fit; CharacterError: the persona.
    """
    response = last(stream_chat(model, tokenizer, session_meta, query, history, **generation))
    return response, [*map(list, history or []), [query, response]]


def stream_chat(model, tokenizer, session_meta, query, history=None, **generation) -> Iterator[str]:
    """Like `chat`, but yields the growing reply. Closing the iterator stops the model within one token."""
    history = [] if history is None else history
    reply, _ = make_reply(model, tokenizer, session_meta, query, history, generation)
    yield from read(tokenizer, reply.start())


def make_reply(
    model,
    tokenizer,
    session_meta,
    query,
    history,
    generation: dict,
    dropped: int = 0,
    cache=None,
    on_end=None,
    begun="",
) -> tuple[Reply, int]:
    """A reply that has not been started, and how many of the oldest exchanges its prompt leaves out. It goes on from `begun`.

    Everything is checked here, before anything changes. Warns if more than `dropped` exchanges are left out.
    """
    parameters = parameters_for(model, generation)
    session_meta, context = as_session_meta(session_meta), context_limit(model, parameters)
    turns = with_examples(session_meta, build_turns(query, history, begun))
    fitted = fit_prompt(tokenizer, session_meta, turns, parameters, context, dropped)
    input_ids, now_dropped, max_new_tokens = fitted
    config = parameters.to_config(max_new_tokens)
    if now_dropped > dropped:
        text = f"对话超出上下文长度 [context full]：最早的 {now_dropped} 轮没有放进 prompt，人设保留"
        # With `warn`, Python shows a text only once: a second conversation would lose its turns in silence.
        warnings.warn_explicit(text, ContextWarning, __file__, 0, registry={})
    return Reply(model, input_ids, config, cache or new_cache(model), parameters.seed, on_end), now_dropped


def read(tokenizer, reply: Reply) -> Iterator[str]:
    """The text of a started reply as it grows. Closing the iterator stops the reply."""
    with closing(iter(reply)) as pieces:
        yield from decode_growing(tokenizer, pieces)


def last(texts: Iterator[str]) -> str:
    """The last text, with the iterator closed even if Ctrl-C comes in between."""
    with closing(texts):
        return deque(texts, maxlen=1).pop()
