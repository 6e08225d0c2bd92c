"""Whose words are whose: what a chat request becomes before the chat template renders it.

Role-play clients put more into `messages` than was said: who plays whom, example dialogues, orders to the model. It is
recognised here by the texts that SillyTavern sends unless a user changes them.
"""

import re

from ..characters.personas import DEFAULT_CHARACTER, SYSTEM_CHARACTER, SessionMeta, as_session_meta, get_character
from ..errors import ChatError
from .schemas import ChatRequest, Conversation, Message

SCENE = re.compile(
    r"Write (?P<bot>[^\n]{1,64}?)'s next reply in a fictional chat between (?:(?P=bot)|[^\n]{1,200}?)"
    r" and (?P<user>[^\n]{1,64}?)\.(?=\s|$)"
)
SCENE_REACH = 1000  # it stands at the very beginning
EXAMPLE_MARK = "[Example Chat]"
MARKS = re.compile(r"\[(?:Example Chat|Start a new (?:group )?chat[^\]]{0,300})\]", re.IGNORECASE)
ONLY_AS = re.compile(r"\[Write the next reply only as (?P<bot>[^\]]{1,64})\.\]")
CONTINUE = re.compile(r"\[Continue (?:your last message|the following message)[^\]]*\]")
AS_USER = re.compile(r"\[Write your next reply from the point of view of (?P<user>.{1,64}?), using [^\]]*\]")
EXAMPLE_ROLES = {"example_user": "user", "example_assistant": "assistant"}


def chat_prompt(body: ChatRequest, character: SessionMeta | None) -> Conversation:
    """The persona and the turns of a request. The last message is `unfinished` if the reply is to continue it.

    The persona is the `session_meta` of the request, else `character`, the one its `model` names, else what the system
    messages before the first turn say, with the names found in them, else 苏梦远. Beside a persona, such messages are
    added to it. A later system message stays in its turn, in brackets: it is dropped together with it.

    Raises:
        CharacterError: the persona is too long; ChatError: nothing to answer, or the reply asked for is impossible.
    """
    scene = SCENE.search(body.messages[0].content[:SCENE_REACH])
    messages = unfold(body.messages, scene)
    before, talk, examples = sort_messages(messages)
    orders = " ".join(m.content for m in messages if m.is_system)
    persona = find_persona(body, character, " ".join(before), names_in(messages, scene, orders))
    example_turns = split_turns(examples) or split_turns(card_examples(persona))
    turns = split_turns(talk)
    if not turns:
        raise ChatError("messages 里没有可以回答的话 [no user message]：至少要有一条非空的 user 消息")
    finish(body, turns, orders)
    return persona, [*example_turns, *turns]


def unfold(messages: list[Message], scene: re.Match | None) -> list[Message]:
    """Messages that a client has merged into the first one, each on its own again: "Anon: 你好" is a user message."""
    first, *rest = messages
    if scene is None or "\n\n" not in first.content or not (first.is_system or not rest):
        return messages
    roles = {f"{scene['user']}: ": "user", f"{scene['bot']}: ": "assistant"}
    found, example = [], False
    for part in first.content.split("\n\n"):
        if mark := MARKS.match(part.strip()):
            example = mark[0].lower() == EXAMPLE_MARK.lower()
        start = next((start for start in roles if part.startswith(start)), "")
        role = roles.get(start, "system")
        name = f"example_{role}" if example and start else None
        found.append(Message(role="system" if name else role, content=part.removeprefix(start), name=name))
    return [*found, *rest]


def sort_messages(messages: list[Message]) -> tuple[list[str], list[dict], list[dict]]:
    """(What system messages say before the first turn, what is said from then on, example turns)."""
    before: list[str] = []
    talk: list[dict] = []
    examples: list[dict] = []
    for message in messages:
        text = without_orders(message.content) if message.is_system else message.content.strip()
        if message.role in ("tool", "function") or not text:
            continue
        if message.is_system and message.name in EXAMPLE_ROLES:
            examples.append({"role": EXAMPLE_ROLES[message.name], "content": text})
        elif not message.is_system:
            said = {"role": message.role, "content": text, "query": text}
            if message.role == "user" and talk and talk[-1].get("query") == "":  # what a narrator said comes first
                said["content"] = talk.pop()["content"] + text
            talk.append(said)
        elif not talk:
            before.append(text)
        elif talk[-1]["role"] == "user":
            talk[-1]["content"] += f"（{text}）"
        else:
            talk.append({"role": "user", "content": f"（{text}）", "query": ""})
    return before, talk, examples


def without_orders(text: str) -> str:
    """A system text without the sentences that are meant for models which have to be told what role-play is."""
    head = SCENE.sub("", text[:SCENE_REACH], count=1) + text[SCENE_REACH:]
    for pattern in (MARKS, ONLY_AS, CONTINUE, AS_USER):
        head = pattern.sub("", head)
    return head.strip()


def names_in(messages: list[Message], scene: re.Match | None, orders: str) -> dict[str, str]:
    """The names that the request gives away, as far as it does: in `name` fields, or in its orders."""
    names = {"user": scene["user"], "bot": scene["bot"]} if scene else {}
    for message in messages:
        who = {"user": "user", "assistant": "bot"}.get(message.role)
        if who and message.name and message.name.strip():
            names[who] = message.name.strip()[:64]
    for pattern in (ONLY_AS, AS_USER):
        names |= found.groupdict() if (found := pattern.search(orders)) else {}
    return names


def find_persona(body: ChatRequest, character: SessionMeta | None, system: str, names: dict) -> SessionMeta:
    given = body.chat_template_kwargs and body.chat_template_kwargs.session_meta
    persona = given or character
    if persona is None and not system and "bot" not in names:
        return get_character(DEFAULT_CHARACTER)
    if persona is None:
        named = {"bot_name": names.get("bot", SYSTEM_CHARACTER), "bot_info": system}
        return as_session_meta(named | ({"user_name": names["user"]} if "user" in names else {}))
    if not system:
        return persona
    return as_session_meta({**persona.model_dump(), "bot_info": f"{persona.bot_info} {system}".strip()})


def card_examples(persona: SessionMeta) -> list[dict]:
    pairs = getattr(persona, "examples", [])
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair) if text.strip()]


def finish(body: ChatRequest, turns: list[list[dict]], orders: str) -> None:
    """Mark the last message as `unfinished` if the reply continues it; write as the user where that is asked for."""
    last = turns[-1][-1]
    if AS_USER.search(orders):
        turns.append([{"role": "user", "content": "", "query": "", "unfinished": True}])
        return
    wanted = body.continue_final_message
    if wanted and body.add_generation_prompt:
        raise ChatError(
            "continue_final_message 和 add_generation_prompt 不能同时为 true [cannot do both]：续写最后一条就去掉后者"
        )
    if body.add_generation_prompt is False and not wanted:
        raise ChatError(
            "add_generation_prompt=false 不支持 [not supported]：要续写最后一条消息，请用 continue_final_message=true"
        )
    if wanted is None:
        wanted = last["role"] == "assistant" and not body.add_generation_prompt
    last["unfinished"] = wanted


def split_turns(messages: list[dict]) -> list[list[dict]]:
    """Messages in turns, each beginning with a user message."""
    turns: list[list[dict]] = []
    for message in messages:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def last_query(turns: list[list[dict]]) -> str:
    """What the user said last."""
    said = [m.get("query", m["content"]) for turn in turns for m in turn if m["role"] == "user"]
    return next((text for text in reversed(said) if text), "")
