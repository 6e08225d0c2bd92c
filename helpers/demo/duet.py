"""Two characters talk to each other: each is the user of the other's conversation."""

import difflib
import re
from dataclasses import dataclass

from ..characters.personas import CharacterCard, SessionMeta, as_session_meta
from ..chat.session import ChatSession
from ..errors import ChatError

GOODBYE = re.compile(r"再见|再会|拜拜|告辞|后会有期|晚安|goodbye|bye-bye", re.IGNORECASE)
SAME = 0.8  # share of equal characters from which two lines count as one: two models easily end in a circle


@dataclass(frozen=True)
class Duet:
    lines: list[tuple[str, str]]  # (name, text), in order
    ended: str  # "turns", "goodbye", "repeated" or "empty"
    session: (
        ChatSession  # as the last speaker sees it: exported and opened again, the reader takes the other one's part
    )

    def to_markdown(self) -> str:
        return self.session.to_markdown()


def converse(
    model, tokenizer, first, second, topic: str, turns: int = 8, on_line=lambda name, text: None, **generation
) -> Duet:
    """Let the persona `first` bring up `topic`, and two characters talk about it.

    They stop after `turns` replies, after a goodbye, or before a reply that is empty or nearly repeats an earlier line.

    Args:
        topic: completes 我们来聊聊…吧, the first line.
        turns: how many replies at most, 1 to 100.
        on_line: called with name and text of every line as soon as it is there.
        **generation: see `GenerationParameters`; `seed` grows by one from reply to reply.

    Raises:
        ChatError: an empty topic, a senseless number of turns, or two characters of one name; as `chat` besides.
    """
    first, second = as_session_meta(first), as_session_meta(second)
    _check(first, second, topic, turns)
    line = f"我们来聊聊{topic.strip()}吧。"
    speaker = ChatSession(model, tokenizer, facing(first, second, greeting=line), **generation)
    listener = ChatSession(model, tokenizer, facing(second, first), **generation)
    lines = [(first.bot_name, line)]
    on_line(*lines[-1])
    for turn in range(turns):
        seed = {"seed": generation["seed"] + turn} if "seed" in generation else {}
        reply = listener.send(line, **seed)
        ended = reason_to_stop(reply, lines)
        if ended in ("empty", "repeated"):  # nobody wants to read it
            return Duet(lines, ended, speaker)
        line, speaker, listener = reply, listener, speaker
        lines.append((speaker.session_meta.bot_name, line))
        on_line(*lines[-1])
        if ended:
            return Duet(lines, ended, speaker)
    return Duet(lines, "turns", speaker)


def mirrored(session: ChatSession) -> tuple[ChatSession, str]:
    """A session in which the model plays the user of `session`, and the line that it has to answer there."""
    said = session.history
    if not said or not said[-1][1]:
        raise ChatError("还没有可以接的话 [nothing to answer]：先说一句")
    before = [["", said[0][0]]] if said[0][0] else []
    history = [*before, *([earlier[1] or "……", later[0]] for earlier, later in zip(said, said[1:]))]
    meta = session.session_meta
    me = {
        "bot_name": meta.user_name,
        "bot_info": meta.user_info,
        "user_name": meta.bot_name,
        "user_info": meta.bot_info,
    }
    mirror = ChatSession(session.model, session.tokenizer, SessionMeta(**me), **session.generation)
    mirror.history = history
    return mirror, said[-1][1]


def _check(first: SessionMeta, second: SessionMeta, topic: str, turns: int) -> None:
    if not isinstance(topic, str) or not topic.strip():
        raise ChatError("缺少话题 [empty topic]：请写几个字，如“月亮”")
    if type(turns) is not int or not 1 <= turns <= 100:
        raise ChatError(f"turns={turns!r} 没有意义 [invalid turns]：应是 1 到 100 的整数")
    if first.bot_name == second.bot_name:
        raise ChatError(f"两个角色都叫{first.bot_name} [same name]：prompt 里分不清谁在说话，请改一个名字")


def facing(speaker: SessionMeta, other: SessionMeta, greeting: str = "") -> CharacterCard:
    """The persona of `speaker` when the other one is the user."""
    me = {"bot_name": speaker.bot_name, "bot_info": speaker.bot_info, "greeting": greeting}
    return CharacterCard(user_name=other.bot_name, user_info=other.bot_info, **me)


def reason_to_stop(reply: str, lines: list[tuple[str, str]]) -> str:
    """Why a talk ends with this reply to the `lines` (name, text) so far: "empty", "repeated", "goodbye"; "" if it goes on."""

    def words(text: str) -> str:
        return re.sub(r"[（(].*?[）)]|[\W_]+", "", text)  # without punctuation, spaces and (stage directions)

    said = words(reply)
    if not said:
        return "empty"
    if any(difflib.SequenceMatcher(None, said, words(text), autojunk=False).ratio() >= SAME for _, text in lines):
        return "repeated"
    return "goodbye" if GOODBYE.search(reply) else ""
