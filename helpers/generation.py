"""From prompt ids to a growing reply: checked parameters, a reusable KV cache, a stream that can be stopped."""

import difflib
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import DynamicCache, GenerationConfig
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from .errors import ChatError
from .tokenization import NEWLINE_ID

EOS_ID = 2
STOP_IDS = [EOS_ID, NEWLINE_ID]

# torch's default random generator is one per process: two replies at once would draw from each other's seed.
_one_reply_at_a_time = threading.Lock()


class GenerationParameters(BaseModel):
    """Generation parameters. The defaults are the vendor's; any other `GenerationConfig` field may be added.

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
    seed: int | None = Field(None, ge=0, lt=2**63, description="Makes sampling repeatable.")

    @classmethod
    def check(cls, parameters: dict) -> "GenerationParameters":
        """Validated parameters.

        Raises:
            ChatError: an unknown name (with the closest known one) or a senseless value.
        """
        known = {*cls.model_fields, *GenerationConfig().to_dict()} - {"num_return_sequences", "eos_token_id"}
        for name in parameters.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"你是不是想写 {close[0]}？" if close else f"常用的有 {'、'.join(cls.model_fields)}"
            raise ChatError(f"不认识的生成参数 [unknown generation parameter]：{name}。{hint}")
        try:
            return cls.model_validate(parameters)
        except ValidationError as error:
            problems = "；".join(f"{e['loc'][0]}={e['input']!r}：{e['msg']}" for e in error.errors())
            raise ChatError(f"生成参数没有意义 [invalid generation parameter]：{problems}。要确定性输出请用 do_sample=False") from None

    def to_config(self, max_new_tokens: int) -> GenerationConfig:
        """A `GenerationConfig` that ends a reply at newline or eos."""
        fields = self.model_dump(exclude={"seed", "max_length", "max_new_tokens"})
        if not self.do_sample:  # transformers warns about sampling parameters that have no effect
            for name in ("temperature", "top_k", "top_p"):
                fields.pop(name)
        return GenerationConfig(**fields, max_new_tokens=max_new_tokens, eos_token_id=STOP_IDS, pad_token_id=0)


class PromptCache:
    """The KV cache of the last prompt and reply, kept for the next prompt that begins with the same tokens."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.token_ids: list[int] = []
        self.key_values = DynamicCache()

    def reuse(self, input_ids: list[int]) -> int:
        """Cut the cache to the longest common prefix with `input_ids` and return its length.

        At least one token is left to compute: the model needs it to predict the next one.
        """
        keep = common_prefix_length(self.token_ids, input_ids[:-1])
        cached = self.key_values.get_seq_length()
        if keep == 0:
            self.clear()
        elif keep < cached:
            self.key_values.crop(-(cached - keep))  # a negative number of tokens to drop: the form 5.23 accepts
        self.token_ids = self.token_ids[:keep]
        return keep

    def record(self, token_ids: list[int]) -> None:
        """Remember which tokens the cache now stands for: the last generated one was never fed back."""
        self.token_ids = token_ids[: self.key_values.get_seq_length()]


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """How many leading tokens two sequences share."""
    for position, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return position
    return min(len(first), len(second))


class _StopEvent(StoppingCriteria):
    """Ends generation after the current token once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Puts every generated token into a queue. The first call carries the prompt and is skipped."""

    def __init__(self, tokens: queue.Queue):
        self.tokens, self.prompt_seen = tokens, False

    def put(self, value):
        """Called by `generate` with a tensor of token ids."""
        if self.prompt_seen:
            self.tokens.put(value.tolist())
        self.prompt_seen = True

    def end(self):
        """Called by `generate` at the end; the worker thread reports that itself."""


def stream_tokens(
    model, input_ids: list[int], config: GenerationConfig, *, cache: PromptCache, stop: threading.Event, seed=None
) -> Iterator[list[int]]:
    """Yield the reply's token ids as they are generated, in lists of one (or all at once with beam search).

    Generation runs in a thread of its own. Closing this iterator, or setting `stop`, ends it within one token. An
    exception in the thread is raised here.
    """
    results: queue.Queue = queue.Queue()

    def work():
        try:
            with _one_reply_at_a_time, _seeded(model.device, seed):
                _generate(model, input_ids, config, cache, stop, results)
            results.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            cache.clear()
            results.put(error)

    worker = threading.Thread(target=work, name="generate", daemon=True)
    worker.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        worker.join()


def _generate(model, input_ids, config, cache, stop, results) -> None:
    prompt = torch.tensor([input_ids], device=model.device)
    options = {"attention_mask": torch.ones_like(prompt), "generation_config": config}
    options["stopping_criteria"] = StoppingCriteriaList([_StopEvent(stop)])
    if config.num_beams > 1:  # beams reorder the cache and cannot stream
        output = model.generate(prompt, **options)[0].tolist()
        results.put(output[len(input_ids) :])
        return
    cache.reuse(input_ids)
    output = model.generate(prompt, past_key_values=cache.key_values, streamer=_TokenQueue(results), **options)
    cache.record(output[0].tolist())


@contextmanager
def _seeded(device: torch.device, seed: int | None):
    """Seed torch's random numbers for the block and put the old state back afterwards."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def decode_growing(tokenizer, pieces: Iterator[list[int]]) -> Iterator[str]:
    """Yield the text so far after each piece, without the end token and never with half a character."""
    token_ids, shown = [], None
    for piece in pieces:
        token_ids += piece
        text = decode_reply(tokenizer, token_ids)
        if text != shown:
            shown = text
            yield text
    if shown is None:
        yield ""


def decode_reply(tokenizer, token_ids: list[int]) -> str:
    """The text of a reply: up to newline or eos, stripped, without bytes of an unfinished character at its end."""
    end = next((i for i, token in enumerate(token_ids) if token in STOP_IDS), len(token_ids))
    return tokenizer.decode(token_ids[:end], skip_special_tokens=True).rstrip("\ufffd").strip()
