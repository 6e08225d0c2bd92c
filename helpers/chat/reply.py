"""How a reply is computed (`generate`), and the one thread in which that happens while another one reads it (`Reply`)."""

import atexit
import queue
import threading
import time
from collections.abc import Iterator

import torch
from transformers import GenerationConfig
from transformers.generation import StoppingCriteriaList

from ..model.kv_cache import PromptCache
from .compat import compile_config
from .generation import STOP_IDS


def generate(reply: "Reply") -> None:
    """Compute a reply in the calling thread; `reply.receive` gets the tokens as they come, with beams all at the end."""
    model, config, cache = reply.model, reply.config, reply.cache
    prompt = torch.tensor([reply.input_ids], device=model.device)  # (1, prompt tokens)
    streams = config.num_beams == 1  # beams reorder the cache and change their minds

    def after_token(ids, scores, **_):
        if streams:  # ids: (1, prompt and new tokens); `prompt_lookup_num_tokens` can bring several at once
            reply.receive(ids[0, len(reply.input_ids) + len(reply.token_ids) :].tolist())
        return torch.full((len(ids),), reply.stopped, device=ids.device)

    options = {"attention_mask": torch.ones_like(prompt), "generation_config": config}
    options["stopping_criteria"] = StoppingCriteriaList([after_token])
    if not streams:
        reply.receive(model.generate(prompt, **options)[0, len(reply.input_ids) :].tolist())
        return
    # A cache with the first 90 of 120 tokens leaves (1, 30) for the first forward pass; every later one has (1, 1).
    cache.reuse(reply.input_ids)
    config.compile_config = compile_config(model.device) if cache.compiled else None
    output = model.generate(prompt, past_key_values=cache.key_values, **options)
    cache.record(output[0].tolist())


class Reply:
    """One reply, computed in the worker thread when its turn comes: iterate for its token ids as they come.

    They come in lists. `stop`, or leaving the iteration, ends it within one token. `error` is what went
    wrong; the iteration raises it. Nobody has to iterate: the reply then goes on to its end.

    Args:
        on_end: called with the reply when it has ended or was stopped, but not after an error.
    """

    stopped = False  # set on one reply by `stop`, on the class for all of them when the interpreter ends

    def __init__(
        self, model, input_ids: list[int], config: GenerationConfig, cache: PromptCache, seed=None, on_end=None
    ):
        self.model, self.input_ids, self.config, self.cache = model, input_ids, config, cache
        self.seed, self.on_end = seed, on_end
        self.token_ids: list[int] = []
        self.error: BaseException | None = None
        self._times: list[float] = []  # of the start and of every piece
        self._pieces = queue.SimpleQueue()  # simple: the garbage collector may call `stop` in the middle of a `put`
        self._taken = threading.Lock()  # by the one who ends the reply: the worker, or `stop` while it waits its turn
        self._ended = threading.Event()

    def start(self) -> "Reply":
        """Join the queue of replies to compute."""
        global _worker
        with _starting:
            if _worker is None or not _worker.is_alive():  # a forked process has lost it
                _worker = threading.Thread(target=_work, name="replies", daemon=True)
                _worker.start()
        self._times.append(time.perf_counter())
        _waiting.put(self)
        return self

    @property
    def running(self) -> bool:
        return bool(self._times) and not self._ended.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end, by default for as long as it takes; whether it has come."""
        return self._ended.wait(seconds)

    def stop(self) -> None:
        """End it within one token; at once if its turn has not come. From any thread."""
        self.stopped = True
        self._run()

    def __iter__(self) -> Iterator[list[int]]:
        try:
            yield from iter(self._pieces.get, None)
        finally:
            self.stop()
            # The garbage collector closes an abandoned iterator in any thread, even in the worker.
            if threading.current_thread() is not _worker:
                self.wait()
        if self.error is not None:
            raise self.error

    def statistics(self) -> dict:
        """Lengths in tokens, seconds to the first one, tokens per second after it, and whether it ended by itself."""
        if not self.token_ids:
            return {}
        start, first, *_, last = [*self._times, self._times[-1]]
        return {
            "prompt_tokens": len(self.input_ids),
            "new_tokens": len(self.token_ids),
            "time_to_first_token": first - start,
            "tokens_per_second": (len(self.token_ids) - 1) / (last - first) if last > first else None,
            "ended_by_itself": self.token_ids[-1] in STOP_IDS,
        }

    def _run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            if not self.stopped:
                with torch.random.fork_rng(devices, enabled=self.seed is not None):
                    if self.seed is not None:
                        torch.manual_seed(self.seed)
                    generate(self)
            if self.on_end is not None:
                self.on_end(self)
        except BaseException as error:  # its reader raises it
            self.cache.clear()
            self.error = error
        self._ended.set()
        self._pieces.put(None)

    def receive(self, token_ids: list[int]) -> None:
        self._times.append(time.perf_counter())
        self.token_ids += token_ids
        self._pieces.put(token_ids)


# One thread computes all replies, one after the other: torch keeps CUDA graphs by thread, and its default random
# generator is one per process, so that two replies at once would draw from each other's seed.
_waiting: queue.SimpleQueue = queue.SimpleQueue()
_worker: threading.Thread | None = None
_starting = threading.Lock()


def _work() -> None:
    for reply in iter(_waiting.get, None):
        reply._run()
        del reply  # or its model would stay in memory until the next one


@atexit.register
def _end_worker() -> None:
    """A thread that is still inside torch when the interpreter ends would abort the process."""
    Reply.stopped = True
    if _worker is not None and _worker.is_alive():
        _waiting.put(None)
        _worker.join()
