"""Which part of a conversation goes into the prompt: all of it, or what the model's context has room for."""

import bisect
from collections.abc import Callable
from functools import cache

from ..characters.dialogues import history_to_messages
from ..errors import ChatError, PromptTooLongError
from ..model.kv_cache import compiled_decoding
from .generation import GenerationParameters

MIN_REPLY_TOKENS = 16  # a prompt that leaves less room than this is refused


class ContextWarning(UserWarning):
    """The conversation no longer fits the model's context: its oldest turns are not in the prompt."""


def check_history(history) -> None:
    """`ChatError` unless it is a list of [query, response] in valid Unicode; only the first query may be ""."""
    if not isinstance(history, (list, tuple)):
        raise ChatError(f"history 应为列表 [malformed history]，每项是 [query, response]，收到 {history!r:.80}")
    for number, entry in enumerate(history, start=1):
        where = f"history 第 {number} 项"
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise ChatError(f"{where}应为 [query, response] [malformed history]，收到 {entry!r:.80}")
        check_text(entry[0], f"{where}的 query", may_be_empty=number == 1 and entry[0] == "")
        check_text(entry[1], f"{where}的 response", may_be_empty=True)


def check_text(text, where: str, may_be_empty: bool = False) -> str:
    """`text`, if something can be made of it; else `ChatError` that says `where`."""
    if not isinstance(text, str):
        raise ChatError(f"{where} 应为字符串 [not a string]，收到 {type(text).__name__}")
    if not text.strip() and not may_be_empty:
        raise ChatError(f"{where} 是空的 [empty text]：请先写点什么")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ChatError(f"{where} 含有不成对的代理字符 [invalid Unicode]：请检查文本的编码") from None
    return text


def build_turns(query: str, history, begun: str = "") -> list[list[dict]]:
    """The chat messages of each exchange, and of the new query with what is `begun` of its reply. Raises as `check_history`."""
    check_history(history)
    question = {"role": "user", "content": check_text(query, "query")}
    reply = [{"role": "assistant", "content": begun, "unfinished": True}] if begun.strip() else []
    return [*(history_to_messages([entry]) for entry in history), [question, *reply]]


def with_examples(session_meta, turns: list[list[dict]]) -> list[list[dict]]:
    """The turns, the example dialogues of a card before the first, which they stay with and are dropped with."""
    examples = history_to_messages(getattr(session_meta, "examples", []))
    return [[*examples, *turns[0]], *turns[1:]] if examples else turns


def encode_turns(tokenizer, session_meta, turns: list[list[dict]]) -> list[int]:
    """The ids of the prompt, from [gMASK] <sop> to the character's name, or to the end of an `unfinished` last message."""
    messages = [message for turn in turns for message in turn]
    unfinished = bool(messages) and messages[-1].get("unfinished", False)
    prompt = tokenizer.apply_chat_template(messages, session_meta=session_meta, add_generation_prompt=not unfinished)
    return prompt["input_ids"][:-1] if unfinished else prompt["input_ids"]  # without the newline that ends a message


def encode_prompt(tokenizer, session_meta, query: str, history) -> list[int]:
    return encode_turns(tokenizer, session_meta, build_turns(query, history))


def fit_turns(tokenizer, session_meta, turns: list[list[dict]], limit: int, dropped: int = 0) -> tuple[list[int], int]:
    """The prompt with as many turns as `limit` tokens allow. The persona and the last turn always stay.

    Args:
        dropped: how many of the oldest turns are left out already.

    Returns:
        `(input_ids, dropped)`; more ids than `limit` if the persona and the last turn alone are too long.
    """

    prompt = cache(lambda start: encode_turns(tokenizer, session_meta, turns[start:]))
    dropped = turns_to_drop(lambda start: len(prompt(start)), len(turns), limit, dropped)
    return prompt(dropped), dropped


def turns_to_drop(length: Callable[[int], int], turns: int, limit: int, dropped: int) -> int:
    """How many of the oldest turns must go for a prompt of at most `limit` tokens; it has `length(n)` without the first n.

    When turns must go, the oldest go until the prompt is down to three quarters of the limit: dropping one in every
    turn would change the beginning of every prompt, and no KV cache could be reused.
    """
    if length(0) <= limit:
        return 0
    dropped = min(dropped, turns - 1)
    if limit // 2 <= length(dropped) <= limit:  # shorter: more was dropped than this limit asks for
        return dropped
    # Fewer turns never make a longer prompt, so the smallest number to drop can be found by bisection.
    return bisect.bisect_left(range(turns - 1), True, key=lambda start: length(start) <= limit * 3 // 4)


def fit_prompt(
    tokenizer, session_meta, turns: list[list[dict]], parameters: GenerationParameters, context: int, dropped: int = 0
) -> tuple[list[int], int, int]:
    """`(input_ids, dropped, max_new_tokens)`: as `fit_turns`, with prompt and reply within `context` tokens.

    `ChatError` if the persona and the last turn alone leave no room for a reply.
    """
    reserve = min(parameters.max_new_tokens, max(1, context // 4))  # room for the reply
    input_ids, dropped = fit_turns(tokenizer, session_meta, turns, context - reserve, dropped)
    room = context - len(input_ids)
    if room < min(parameters.max_new_tokens, MIN_REPLY_TOKENS):
        persona = len(encode_turns(tokenizer, session_meta, [[{"role": "user", "content": ""}]]))
        longer = "人设" if persona * 2 > len(input_ids) else "这句话，或去掉示例"
        raise PromptTooLongError(
            f"人设和这句话太长 [prompt too long]：共 {len(input_ids)} 个 token（人设 {persona}，这句话和示例 "
            f"{len(input_ids) - persona}；更早的对话已经略去），加上回复最多 {context}。请缩短{longer}",
            *(len(input_ids), persona, context),
        )
    return input_ids, dropped, min(parameters.max_new_tokens, room)


def context_length(model) -> int:
    """How many tokens, prompt and reply together: 32,768 for the 6B; a compiled model's cache may be shorter."""
    decoding = compiled_decoding(model)
    return model.config.max_position_embeddings if decoding is None else decoding.length


def context_limit(model, parameters: GenerationParameters) -> int:
    """How many tokens, prompt and reply together, model and parameters allow."""
    return min(parameters.max_length or context_length(model), context_length(model))


def cut_persona(tokenizer, session_meta, tokens: int):
    """`session_meta` with the ends of its texts cut off, the longer one's first, until it takes at most `tokens` in the prompt."""

    def length(meta) -> int:
        return len(encode_turns(tokenizer, meta, [[{"role": "user", "content": ""}]]))

    for field in sorted(("bot_info", "user_info"), key=lambda name: -len(getattr(session_meta, name))):
        text = getattr(session_meta, field)
        cut = lambda kept: session_meta.model_copy(update={field: text[:kept]})  # noqa: B023, E731
        # More text never makes a shorter prompt, so the longest beginning that fits can be found by bisection.
        kept = bisect.bisect_right(range(len(text) + 1), tokens, key=lambda kept: length(cut(kept))) - 1
        session_meta = cut(max(kept, 0))
    return session_meta
