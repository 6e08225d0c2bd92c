"""What clients send, as Pydantic models: the contract of the original lesson and OpenAI's chat completions.

Fields that are not known here are ignored: front-ends send many of their own. Both requests say who speaks and what has
been said (`conversation`), how the reply is written (`generation`) and where it ends (`stops`).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ..characters.personas import (
    DEFAULT_CHARACTER,
    SYSTEM_CHARACTER,
    SessionMeta,
    Unicode,
    as_session_meta,
    get_character,
)
from ..chat.fitting import build_turns

DEFAULT_MAX_LENGTH, DEFAULT_TOP_P, DEFAULT_TEMPERATURE = 2048, 0.7, 0.95  # of the original lesson
EXAMPLE_META = {"bot_name": "苏梦远", "bot_info": "当红的女歌手", "user_name": "陆星辰", "user_info": "导演"}


def text_of_parts(content: Any) -> Any:
    """OpenAI's list of content parts as one text; anything but text parts is refused by the type of the field."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


Conversation = tuple[SessionMeta, list[list[dict]]]  # the persona, and the chat messages of every turn
StopText = Annotated[Unicode, StringConstraints(min_length=1, max_length=200)]
NonEmpty = Annotated[Unicode, StringConstraints(pattern=r"\S")]
Content = Annotated[Unicode, BeforeValidator(text_of_parts)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class LessonRequest(_Request):
    """The body of `POST /`, as in the original lesson. For the numbers, 0 and null mean the default."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "你好", "history": []}]})
    model: ClassVar[None] = None

    prompt: NonEmpty = Field(description="What the user says.")
    history: list[tuple[Unicode, Unicode]] | None = Field(None, description="[[query, response], ...]")
    max_length: int | None = Field(
        None, ge=0, description=f"Prompt and reply, in tokens; default {DEFAULT_MAX_LENGTH}."
    )
    top_p: float | None = Field(None, ge=0, le=1, description=f"Default {DEFAULT_TOP_P}.")
    temperature: float | None = Field(None, ge=0, le=10, description=f"Default {DEFAULT_TEMPERATURE}.")
    session_meta: SessionMeta | None = Field(None, description="The persona.", examples=[EXAMPLE_META])
    character: str | None = Field(None, description="Instead of session_meta: the name of a character that ships.")

    def conversation(self, character: None = None) -> Conversation:
        """Raises ChatError or CharacterError."""
        persona = self.session_meta or get_character(self.character or DEFAULT_CHARACTER)
        return persona, build_turns(self.prompt, self.history or [])

    def generation(self) -> dict:
        """Parameters for `GenerationParameters`."""
        length = self.max_length or DEFAULT_MAX_LENGTH
        sampling = {"top_p": self.top_p or DEFAULT_TOP_P, "temperature": self.temperature or DEFAULT_TEMPERATURE}
        return {"max_length": length, "max_new_tokens": length, **sampling}

    def stops(self) -> list[str]:
        """None: the lesson has no stop texts."""
        return []


class LessonResponse(BaseModel):
    """The answer of `POST /`."""

    response: str
    history: list[tuple[str, str]]
    status: int = 200
    time: str = Field(examples=["2025-01-31 12:00:00"])


class Message(_Request):
    """One chat message. System messages describe the character."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(_Request):
    include_usage: bool = False


class TemplateArguments(_Request):
    """As vLLM takes them: arguments of the chat template."""

    session_meta: SessionMeta | None = None


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`, as far as it has an effect here."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "苏梦远", "messages": [{"role": "user", "content": "你好"}]}]}
    )

    messages: list[Message] = Field(min_length=1)
    model: str | None = Field(None, description="The model, an adapter, or the name of a character that ships.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Takes precedence over max_tokens.")
    temperature: float | None = Field(None, ge=0, le=10, description="0: always the most likely token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1 means all.")
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, lt=2**63, description="A negative one counts as none.")
    stop: Annotated[list[StopText], Field(max_length=16)] | StopText | None = None
    n: Literal[1] | None = 1
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatRequest":
        if not any(message.role in ("user", "assistant") and message.content.strip() for message in self.messages):
            raise ValueError("messages 里没有可以回答的话 [no user message]：至少要有一条非空的 user 消息")
        return self

    def conversation(self, character: SessionMeta | None) -> Conversation:
        """The persona is the `session_meta` of the request, else `character`, the one its `model` names, else what the
        system messages say, else 苏梦远. System messages beside a persona are added to what it knows about the character.

        Raises:
            CharacterError: the persona with the system messages is too long.
        """
        given = self.chat_template_kwargs and self.chat_template_kwargs.session_meta
        system = " ".join(m.content for m in self.messages if m.role in ("system", "developer") and m.content.strip())
        persona = given or character or (None if system else get_character(DEFAULT_CHARACTER))
        if persona is None:
            persona = as_session_meta({"bot_name": SYSTEM_CHARACTER, "bot_info": system})
        elif system:
            persona = as_session_meta({**persona.model_dump(), "bot_info": f"{persona.bot_info} {system}".strip()})
        return persona, split_turns(self.messages)

    def generation(self) -> dict:
        """Parameters for `GenerationParameters`: only what the client has set."""
        chosen = {name: getattr(self, name) for name in ("top_p", "repetition_penalty") if getattr(self, name)}
        if self.temperature is not None:
            chosen |= {"temperature": self.temperature} if self.temperature >= 1e-4 else {"do_sample": False}
        if self.top_k is not None:
            chosen["top_k"] = max(0, self.top_k)
        if self.seed is not None and self.seed >= 0:
            chosen["seed"] = self.seed
        if limit := self.max_completion_tokens or self.max_tokens:
            chosen["max_new_tokens"] = limit
        return chosen

    def stops(self) -> list[str]:
        """Texts at which the reply ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def split_turns(messages: list[Message]) -> list[list[dict]]:
    """User and assistant messages in turns, each beginning with a user message; empty messages are left out."""
    turns: list[list[dict]] = []
    for message in messages:
        if message.role in ("user", "assistant") and message.content.strip():
            if message.role == "user" or not turns:
                turns.append([])
            turns[-1].append({"role": message.role, "content": message.content})
    return turns


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Reply(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: Reply
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Completion(BaseModel):
    """The answer of `POST /v1/chat/completions` without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every 4xx and 5xx, in OpenAI's shape."""

    error: ErrorDetail
