"""What clients send, as Pydantic models: the contract of the original lesson and OpenAI's chat completions.

Fields that are not known here are ignored: front-ends send many of their own. Both requests say who speaks and what has
been said (`conversation`), how the reply is written (`generation`) and where it ends (`stops`).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ..characters.personas import DEFAULT_CHARACTER, SessionMeta, Unicode, get_character
from ..chat.fitting import build_turns

DEFAULT_MAX_LENGTH, DEFAULT_TOP_P, DEFAULT_TEMPERATURE = 2048, 0.7, 0.95  # of the original lesson
EXAMPLE_META = {"bot_name": "苏梦远", "bot_info": "当红的女歌手", "user_name": "陆星辰", "user_info": "导演"}


def text_of_parts(content: Any) -> Any:
    """OpenAI's list of content parts as one text; anything but text parts is refused by the type of the field."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


Conversation = tuple[SessionMeta, list[list[dict]]]  # the persona, and the chat messages of every turn
# What clients send for a field that is not set.
UNSET_NUMBER = BeforeValidator(lambda value: None if type(value) in (int, float) and value in (0, -1) else value)
UNSET_TEXT = BeforeValidator(
    lambda value: [text for text in value if text != ""] if isinstance(value, list) else value or None
)
StopText = Annotated[Unicode, StringConstraints(min_length=1, max_length=200)]
NonEmpty = Annotated[Unicode, StringConstraints(pattern=r"\S")]
Content = Annotated[Unicode, BeforeValidator(text_of_parts)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class LessonRequest(_Request):
    """The body of `POST /`, as in the original lesson. For the numbers, 0 and null mean the default."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "你好", "history": []}]})
    model: ClassVar[None] = None
    n: ClassVar[int] = 1

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
    """One chat message. System messages describe the character; calls of tools and their results are left out."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = Field("", validate_default=False)
    name: Unicode | None = Field(None, description="Who speaks; example_user, example_assistant: an example dialogue.")

    @model_validator(mode="before")
    @classmethod
    def _may_be_empty(cls, message: Any) -> Any:
        """Assistants that call a tool say nothing; what tools answer is not read."""
        if isinstance(message, dict) and message.get("role") in ("assistant", "tool", "function"):
            unread = message["role"] != "assistant" or message.get("content") is None
            return {**message, "content": ""} if unread else message
        if isinstance(message, dict) and message.get("content") is None:
            return {**message, "content": None}  # an error that names the field
        return message

    @property
    def is_system(self) -> bool:
        return self.role in ("system", "developer")


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
    max_tokens: Annotated[int | None, UNSET_NUMBER] = Field(None, ge=1, description="0 or -1: the default.")
    max_completion_tokens: Annotated[int | None, UNSET_NUMBER] = Field(
        None, ge=1, description="Takes precedence over max_tokens."
    )
    temperature: float | None = Field(None, ge=0, le=10, description="0: always the most likely token.")
    top_p: Annotated[float | None, UNSET_NUMBER] = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1 means all.")
    repetition_penalty: Annotated[float | None, UNSET_NUMBER] = Field(None, gt=0, le=10)
    seed: int | None = Field(None, lt=2**63, description="A negative one counts as none.")
    stop: Annotated[Annotated[list[StopText], Field(max_length=16)] | StopText | None, UNSET_TEXT] = None
    n: int | None = Field(1, ge=1, le=128, description="Replies; at most as many as the server has slots.")
    continue_final_message: bool | None = Field(None, description="Default: if an assistant has the last word.")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    def conversation(self, character: SessionMeta | None) -> Conversation:
        """See `chat_prompt`."""
        from .prompts import chat_prompt

        return chat_prompt(self, character)

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
