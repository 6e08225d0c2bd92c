"""From prompt ids to a growing reply: checked parameters, a stream that can be stopped."""

import atexit
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from ..errors import ChatError, did_you_mean
from ..model.kv_cache import PromptCache
from ..model.tokenization import NEWLINE_ID, piece_bytes

EOS_ID = 2
STOP_IDS = [EOS_ID, NEWLINE_ID]
# Where a reply ends, how many there are and where the KV cache is kept is decided here, not by the caller.
FIXED_PARAMETERS = {
    *("eos_token_id", "pad_token_id", "stop_strings", "num_return_sequences", "return_dict_in_generate"),
    *("use_cache", "cache_implementation", "compile_config", "transformers_version", "_from_model_config"),
}
NEUTRAL = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0}  # transformers' own defaults
# torch's default random generator is one per process: two replies at once would draw from each other's seed.
_one_reply_at_a_time = threading.Lock()
_started: "weakref.WeakSet[Reply]" = weakref.WeakSet()


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
        """Validated parameters.

        Raises:
            ChatError: an unknown name (with the closest known one) or a senseless value.
        """
        _refuse_unknown(parameters, {*cls.model_fields, *GenerationConfig().to_dict()} - FIXED_PARAMETERS)
        try:
            checked = cls.model_validate(parameters)
        except ValidationError as error:
            raise _invalid(f"{e['loc'][0]}={e['input']!r}：{e['msg']}" for e in error.errors()) from None
        for name, value in parameters.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise _invalid([f"{name}={value!r}：不是有限的数"])
        if (checked.min_new_tokens or 0) > checked.max_new_tokens:
            raise _invalid([f"min_new_tokens={checked.min_new_tokens} 大于 max_new_tokens={checked.max_new_tokens}"])
        return checked

    def to_config(self, max_new_tokens: int) -> GenerationConfig:
        """A `GenerationConfig` that ends a reply at newline or eos.

        Raises:
            ChatError: transformers refuses a value.
        """
        fields = self.model_dump(exclude={"seed", "max_length", "max_new_tokens"})
        if not self.do_sample:  # transformers warns about sampling parameters that have no effect, the model's own too
            fields |= NEUTRAL
        try:
            return GenerationConfig(**fields, max_new_tokens=max_new_tokens, eos_token_id=STOP_IDS, pad_token_id=0)
        except (ValueError, TypeError) as error:
            raise _invalid([str(error)]) from None


def model_defaults(model) -> dict:
    """What the model's own `generation_config.json` sets; nothing for CharacterGLM-6B, which has no such file."""
    config = getattr(model, "generation_config", None)
    if config is None or config._from_model_config:
        return {}
    chosen = config.to_diff_dict()
    return {name: chosen[name] for name in GenerationParameters.model_fields if name in chosen}


def _refuse_unknown(names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name in FIXED_PARAMETERS:
            raise ChatError(f"{name} 由本项目设定，不能更改 [fixed parameter]：回复以换行或 eos 结束，一次一条")
        if name not in known:
            hint = did_you_mean(name, known) or f"常用的有 {'、'.join(GenerationParameters.model_fields)}"
            raise ChatError(f"不认识的生成参数 [unknown generation parameter]：{name}。{hint}")


def _invalid(problems: Iterable[str]) -> ChatError:
    text = "；".join(problems)
    hint = "。要确定性输出请用 do_sample=False" if "temperature" in text else ""
    return ChatError(f"生成参数没有意义 [invalid generation parameter]：{text}{hint}")


class _StopEvent(StoppingCriteria):
    """Ends generation after the current token once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _NewTokens(BaseStreamer):
    """Passes on every generated token. The first call carries the prompt and is skipped."""

    def __init__(self, receive: Callable[[list[int]], None]):
        self.receive, self.prompt_seen = receive, False

    def put(self, value):
        """Called by `generate` with a tensor of token ids."""
        if self.prompt_seen:
            self.receive(value.flatten().tolist())
        self.prompt_seen = True

    def end(self):
        """Called by `generate` at the end."""


class Reply:
    """One reply, generated in a thread of its own: iterate for its token ids as they come.

    They come in lists of one (all at once with beam search). `stop`, or leaving the iteration, ends the generation
    within one token. An error in the thread is raised by the iteration. Nobody has to iterate: the thread then runs to
    the end of the reply.

    Args:
        on_end: called in the thread when the reply has ended or was stopped, but not after an error.
    """

    def __init__(
        self, model, input_ids: list[int], config: GenerationConfig, cache: PromptCache, seed=None, on_end=None
    ):
        self.model, self.input_ids, self.config, self.cache = model, input_ids, config, cache
        self.seed, self.on_end = seed, on_end or (lambda reply: None)
        self.token_ids: list[int] = []
        self._pieces: queue.Queue = queue.Queue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reply", daemon=True)

    def start(self) -> "Reply":
        """Begin to generate."""
        self._start_time = time.perf_counter()
        _started.add(self)
        self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """Whether the thread is still at work."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the generation within one token. From any thread."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and wait until the thread has ended."""
        self.stop()
        # An abandoned iterator is closed by the garbage collector, which runs in any thread, even in this one.
        if self.running and threading.current_thread() is not self._thread:
            self._thread.join()

    def __iter__(self) -> Iterator[list[int]]:
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.close()

    def statistics(self) -> dict:
        """Lengths in tokens, seconds to the first token, tokens per second after it, and whether the reply was complete."""
        if not self.token_ids:
            return {}
        decoding, later = self._last_time - self._first_time, len(self.token_ids) - 1
        return {
            "prompt_tokens": len(self.input_ids),
            "new_tokens": len(self.token_ids),
            "time_to_first_token": self._first_time - self._start_time,
            "tokens_per_second": later / decoding if decoding > 0 else None,
            "ended_by_itself": self.token_ids[-1] in STOP_IDS,
        }

    def _work(self) -> None:
        outcome = None
        try:
            with _turn(self._stopped) as mine, _seeded(self.model.device, self.seed):
                if mine:
                    self._generate()
            self.on_end(self)
        except BaseException as error:  # handed to the reader, who raises it
            self.cache.clear()
            outcome = error
        self._pieces.put(outcome)

    def _generate(self) -> None:
        prompt = torch.tensor([self.input_ids], device=self.model.device)
        options = {"attention_mask": torch.ones_like(prompt), "generation_config": self.config}
        options["stopping_criteria"] = StoppingCriteriaList([_StopEvent(self._stopped)])
        if self.config.num_beams > 1:  # beams reorder the cache and cannot stream
            output = self.model.generate(prompt, **options)[0].tolist()
            self._receive(output[len(self.input_ids) :])
            return
        self.cache.reuse(self.input_ids)
        self.config.compile_config = self.cache.compile_config
        options["streamer"] = _NewTokens(self._receive)
        output = self.model.generate(prompt, past_key_values=self.cache.key_values, **options)
        self.cache.record(output[0].tolist())

    def _receive(self, token_ids: list[int]) -> None:
        self._last_time = time.perf_counter()
        if not self.token_ids:
            self._first_time = self._last_time
        self.token_ids += token_ids
        self._pieces.put(token_ids)


@atexit.register
def _close_all() -> None:
    """A thread that is still inside torch when the interpreter ends would abort the process."""
    for reply in list(_started):
        reply.close()


@contextmanager
def _turn(stopped: threading.Event):
    """Wait for the replies before this one. Yields False if this one was stopped while it waited."""
    while not (mine := _one_reply_at_a_time.acquire(timeout=0.05)):
        if stopped.is_set():
            break
    try:
        yield mine and not stopped.is_set()
    finally:
        if mine:
            _one_reply_at_a_time.release()


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


class GrowingText:
    """The text of token ids that arrive piece by piece: stripped, without the end token, never with half a character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.text, self._spelled = tokenizer, "", b""

    def add(self, token_ids: list[int]) -> str:
        """Take in the next ids and return the whole text so far, which always begins with the text before."""
        end = next((i for i, token in enumerate(token_ids) if token in STOP_IDS), len(token_ids))
        self._spelled += b"".join(_spell(self.tokenizer, token) for token in token_ids[:end])
        # "ignore" leaves out bytes that are no character yet; the decoder of the tokenizer would then give up all
        # characters of that run of byte tokens.
        self.text = self._spelled.decode("utf-8", errors="ignore").strip()
        return self.text


def decode_growing(tokenizer, pieces: Iterable[list[int]]) -> Iterator[str]:
    """Yield the text of `GrowingText` whenever it grows; at least once, be it empty."""
    growing, shown = GrowingText(tokenizer), None
    for piece in pieces:
        if growing.add(piece) != shown:
            shown = growing.text
            yield shown
    if shown is None:
        yield ""


def decode_reply(tokenizer, token_ids: list[int]) -> str:
    """The text of a whole reply, as the last text of `decode_growing`."""
    return list(decode_growing(tokenizer, [token_ids]))[-1]


def _spell(tokenizer, token_id: int) -> bytes:
    """The UTF-8 bytes a token stands for; none for control tokens and for ids that pad the vocabulary."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None or token_id in tokenizer.all_special_ids:
        return b""
    return piece_bytes(piece)
