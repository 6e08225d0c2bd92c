"""What every client is asked to do. Each case has words of its own, so that its prompt is found among those of the server."""

from dataclasses import dataclass, field

META = {"bot_name": "阿青", "bot_info": "山里的剑客，话很少。", "user_name": "旅人", "user_info": ""}
PERSONA = {"chat_template_kwargs": {"session_meta": META}}
KEY = "a-key-of-the-tests"


@dataclass
class Case:
    """A request, as the body that curl would send, and what the server must make of it."""

    name: str
    body: dict
    prompt_end: str = ""  # of the prompt
    error: tuple[int, str] | None = None  # status and English key phrase
    key: str = KEY
    stops: bool = False  # before the last character of what the reply would be

    def to_json(self) -> dict:
        return {"name": self.name, "body": self.body, "key": self.key, "fails": self.error is not None}


def user(text: str, **fields) -> dict:
    return {"role": "user", "content": text, **fields}


def bot(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def request(*messages: dict, **fields) -> dict:
    """The body of a greedy request, unless `fields` say otherwise."""
    return {"model": "characterglm", "messages": list(messages), "temperature": 0, "max_tokens": 12, **fields}


NAMED = [system("剑客"), user("你好", name="旅人"), bot("嗯。", name="阿青"), user("你叫什么？", name="旅人")]
CASES = [
    Case("chat", request(user("你好呀"), **PERSONA), "信息：山里的剑客，话很少。\n[旅人]你好呀\n[阿青]"),
    Case("stream", request(user("吃饭了吗"), stream=True, **PERSONA), "[旅人]吃饭了吗\n[阿青]"),
    Case("character", request(user("你会唱歌吗"), model="苏梦远"), "[陆星辰]你会唱歌吗\n[苏梦远]"),
    Case("names", request(*NAMED), "信息：剑客\n[旅人]你好\n[阿青]嗯。\n[旅人]你叫什么？\n[阿青]"),
    Case("n=2", request(user("讲个故事"), n=2, seed=1, temperature=1.5, **PERSONA), "[旅人]讲个故事\n[阿青]"),
    Case("stop", request(user("今天好冷"), **PERSONA), "[旅人]今天好冷\n[阿青]", stops=True),
    Case("continue", request(user("去哪里"), bot("我们去"), **PERSONA), "[旅人]去哪里\n[阿青]我们去"),
    Case(
        "narrator",
        request(user("谁"), bot("我"), system("门开了"), user("坐"), **PERSONA),
        "[旅人]（门开了）坐\n[阿青]",
    ),
    Case("unknown model", request(user("在吗"), model="gpt-4"), error=(404, "model not found")),
    Case("too long", request(user("长" * 9000), **PERSONA), error=(400, "prompt too long")),
    Case("wrong key", request(user("在吗")), error=(401, "invalid api key"), key="another"),
]


@dataclass
class Answer:
    """What a client got: texts, or an error, or why it cannot do this at all."""

    texts: list[str] = field(default_factory=list)
    finish: list[str] | None = None  # why each reply ended
    tokens: list[int] | None = None  # prompt and completion
    status: int | None = None
    error: str = ""
    unsupported: str = ""
