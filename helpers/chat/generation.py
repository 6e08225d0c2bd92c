"""What a reply is generated with, checked, and how its tokens become text while they come."""

import codecs
import math
from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from ..characters.personas import said
from ..errors import ChatError, did_you_mean
from ..model.tokenization import NEWLINE_ID
from .compat import has_own_generation_config

EOS_ID = 2
STOP_IDS = [EOS_ID, NEWLINE_ID]
# Where a reply ends, how many there are and where the KV cache is kept is decided here, not by the caller.
FIXED_PARAMETERS = {
    *("eos_token_id", "pad_token_id", "stop_strings", "num_return_sequences", "return_dict_in_generate"),
    *("use_cache", "cache_implementation", "compile_config", "transformers_version", "_from_model_config"),
}
NEUTRAL = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0}  # transformers' own defaults


class GenerationParameters(BaseModel):
    """Generation parameters. The defaults are the vendor's; any other `GenerationConfig` field may be added.

    A model directory with a `generation_config.json` of its own overrides them (CharacterGLM-6B has none, Nano has).
    The vendor's repetition_penalty is 1.3 in most places of its code (1.6 in one, 1.0 in its web demo).
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    do_sample: bool = Field(True, description="False: always take the most likely token (greedy).")
    temperature: float = Field(0.9, gt=0, le=10, description="Above 1 flatter, below 1 sharper.")
    top_k: int = Field(100, ge=0, description="Sample among the k likeliest tokens; 0 means all.")
    top_p: float = Field(0.9, gt=0, le=1, description="Sample among the likeliest tokens of this total probability.")
    repetition_penalty: float = Field(1.3, gt=0, le=10, description="Above 1 makes tokens seen before less likely.")
    max_new_tokens: int = Field(512, ge=1, description="Longest reply, in tokens.")
    max_length: int | None = Field(None, ge=1, description="Limit of prompt and reply together; None: the model's.")
    num_beams: int = Field(1, ge=1, description="Beam search width; above 1 the reply comes in one piece.")
    min_new_tokens: int | None = Field(None, ge=0, description="Shortest reply, in tokens.")
    no_repeat_ngram_size: int | None = Field(None, ge=0, description="No n tokens in a row come twice; 0: off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Leave out tokens this much less likely than the best.")
    typical_p: float | None = Field(None, gt=0, le=1, description="Locally typical sampling.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Makes sampling repeatable.")

    @classmethod
    def check(cls, parameters: dict) -> "GenerationParameters":
        """Validated parameters; `ChatError` for an unknown name (with the closest known one) or a senseless value."""
        known = {*cls.model_fields, *GenerationConfig().to_dict()} - FIXED_PARAMETERS
        for name in parameters:
            if name in FIXED_PARAMETERS:
                raise ChatError(f"{name} 由本项目设定，不能更改 [fixed parameter]：回复以换行或 eos 结束，一次一条")
            if name not in known:
                hint = did_you_mean(name, known) or f"常用的有 {'、'.join(cls.model_fields)}"
                raise ChatError(f"不认识的生成参数 [unknown generation parameter]：{name}。{hint}")
        try:
            checked = cls.model_validate(parameters)
        except ValidationError as error:
            raise _invalid("；".join(f"{e['loc'][0]}={e['input']!r}：{said(e)}" for e in error.errors())) from None
        for name, value in parameters.items():  # pydantic checks only the fields it knows
            if isinstance(value, float) and not math.isfinite(value):
                raise _invalid(f"{name}={value!r}：不是有限的数")
        if (checked.min_new_tokens or 0) > checked.max_new_tokens:
            raise _invalid(f"min_new_tokens={checked.min_new_tokens} 大于 max_new_tokens={checked.max_new_tokens}")
        return checked

    def to_config(self, max_new_tokens: int) -> GenerationConfig:
        """A `GenerationConfig` that ends a reply at newline or eos; `ChatError` if transformers refuses a value."""
        fields = self.model_dump(exclude={"seed", "max_length", "max_new_tokens"})
        if not self.do_sample:  # transformers warns about sampling parameters that have no effect, the model's own too
            fields |= NEUTRAL
        try:
            return GenerationConfig(**fields, max_new_tokens=max_new_tokens, eos_token_id=STOP_IDS, pad_token_id=0)
        except (ValueError, TypeError) as error:
            raise _invalid(str(error)) from None


def parameters_for(model, generation: dict) -> GenerationParameters:
    """What is used: `generation` over the model's own defaults. Raises as `GenerationParameters.check`."""
    return GenerationParameters.check({**model_defaults(model), **generation})


def model_defaults(model) -> dict:
    """What the model's own `generation_config.json` sets; nothing for CharacterGLM-6B, which has no such file."""
    chosen = model.generation_config.to_diff_dict() if has_own_generation_config(model) else {}
    return {name: chosen[name] for name in GenerationParameters.model_fields if name in chosen}


def _invalid(problem: str) -> ChatError:
    hint = "。要确定性输出请用 do_sample=False" if "temperature" in problem else ""
    return ChatError(f"生成参数没有意义 [invalid generation parameter]：{problem}{hint}")


class StreamDecoder:
    """Token ids that arrive piece by piece, as text: stripped, without the end token, never with half a character.

    A character that is not in the vocabulary comes as its UTF-8 bytes, a token each: 😀 is <0xF0> <0x9F> <0x98> <0x80>,
    and nothing of it is shown before the fourth.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.text, self._whole = tokenizer, "", ""
        self._special = frozenset(tokenizer.all_special_ids)
        # It keeps the bytes of an unfinished character until the others come, and drops what can be none.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def add(self, token_ids: list[int]) -> str:
        """Take in the next ids and return the whole text so far, which always begins with the text before."""
        end = next((i for i, token in enumerate(token_ids) if token in STOP_IDS), len(token_ids))
        new = (self.tokenizer.token_bytes(token) for token in token_ids[:end] if token not in self._special)
        self._whole += self._utf8.decode(b"".join(new))
        self.text = self._whole.strip()
        return self.text


def decode_growing(tokenizer, pieces: Iterable[list[int]]) -> Iterator[str]:
    """The text so far, whenever it has grown; at least once, be it empty."""
    decoder, shown = StreamDecoder(tokenizer), None
    for token_ids in pieces:
        if decoder.add(token_ids) != shown:
            shown = decoder.text
            yield shown
    if shown is None:
        yield ""


def decode_reply(tokenizer, token_ids: list[int]) -> str:
    return StreamDecoder(tokenizer).add(token_ids)
