"""Many replies at once: transformers' continuous batching, guarded so that no request can stop it for the others.

One bad request stops that engine for everyone (a token id out of range, an empty prompt, a prompt beyond the cache, a
duplicate id), so all of it is checked here first. If it stops all the same, everyone who waits gets an error at once and
it is started again.
"""

import asyncio
import contextlib
import copy
import logging
import uuid

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import drain_queue
from transformers.utils import is_flash_attn_2_available

from ..chat.generation import STOP_IDS, GenerationParameters
from ..errors import ChatError, EngineError, OverloadError
from ..serving import attention
from .sampling import Sampling, request_processors

logger = logging.getLogger(__name__)

PAGE_TOKENS = 32  # the unit in which the KV cache is given out, and in which prompts can share a prefix
BATCH_TOKENS = 512  # most tokens of one forward pass; longer prompts are read in pieces, between the tokens of others
SLOTS, QUEUE_SIZE = 16, 48
RESTART_SECONDS = 1.0
WATCH_SECONDS = 0.1


class Admission:
    """How many requests there may be: `slots` that are written and `queue_size` that wait."""

    slots: int
    alive: bool

    def __init__(self, queue_size: int):
        self.queue_size = queue_size
        self._running: set = set()
        self._preparing = 0

    @property
    def in_flight(self) -> int:
        """Requests being written, waiting, or prepared."""
        return len(self._running) + self._preparing

    @property
    def waiting(self) -> int:
        """Requests beyond the slots."""
        return max(0, self.in_flight - self.slots)

    @contextlib.contextmanager
    def admitted(self):
        """A place among the requests, held while a prompt is prepared; give it back, then `generate` at once.

        Raises:
            OverloadError, EngineError: as `generate`, before any work is done.
        """
        self._admit()
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def _admit(self) -> None:
        if not self.alive:
            raise EngineError("推理引擎没有在运行 [engine is down]：正在重启，请过几秒再试")
        if self.in_flight >= self.slots + self.queue_size:
            raise OverloadError(f"请求太多 [server busy]：已有 {self.in_flight} 个，请稍后再试")


class Engine(Admission):
    """One model that writes up to `slots` replies at the same time.

    Args:
        model: a causal language model. The engine works on a copy that shares its weights, with attention of its own.
        slots: replies written at the same time.
        queue_size: requests that may wait for a slot; one more gets an `OverloadError`.
        context: longest prompt and reply together, in tokens.
        cache_tokens: size of the KV cache, shared by all slots (28 KiB a token for the 6B in half precision).
    """

    def __init__(
        self, model, *, slots: int = SLOTS, queue_size: int = QUEUE_SIZE, context: int = 4096, cache_tokens: int = 32768
    ):
        super().__init__(queue_size)
        self.model, self.slots = shared_copy(model), slots
        self.context = min(context, model.config.max_position_embeddings, cache_tokens)
        self.cache_tokens = cache_tokens
        self.restarts = 0
        self._watcher: asyncio.Task | None = None
        self._manager = None

    @property
    def alive(self) -> bool:
        """Whether requests can be served now."""
        manager = self._manager
        return manager is not None and manager.is_running() and manager.background_thread_status.fatal_error is None

    async def start(self) -> None:
        """Start, and keep watch from now on. Call in the event loop that serves the requests.

        Raises:
            Exception: as torch raises it, if there is no memory for the KV cache.
        """
        await asyncio.to_thread(self._launch)
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop; replies still being written end with an error."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self._fail_all("服务正在关闭 [shutting down]")
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, block=True, timeout=10, hard_stop=True)

    def generate(
        self, input_ids: list[int], parameters: GenerationParameters, session: str | None = None
    ) -> "Generation":
        """Begin a reply; iterate over the result for its token ids.

        Args:
            input_ids: the prompt.
            parameters: do_sample, temperature, top_k, top_p, repetition_penalty, seed and max_new_tokens are used.
            session: of no importance where there is one engine.

        Raises:
            ChatError: an empty or too long prompt, or ids that are not in the vocabulary.
            OverloadError: all slots and the queue are full; EngineError: not running at the moment.
        """
        room = self._checked_room(input_ids)
        self._admit()
        generation = Generation(self._manager, self._running)
        sampling = Sampling(parameters, self.model.config.vocab_size, self.model.device)
        generation.start(input_ids, min(parameters.max_new_tokens, room), sampling)
        return generation

    def _checked_room(self, input_ids: list[int]) -> int:
        vocabulary = self.model.config.vocab_size
        if not input_ids or min(input_ids) < 0 or max(input_ids) >= vocabulary:
            raise ChatError("prompt 是空的，或含有词表之外的 token [invalid prompt]")
        room = self.context - len(input_ids)
        if room < 1:
            raise ChatError(f"prompt 太长 [prompt too long]：{len(input_ids)} 个 token，加上回复最多 {self.context}")
        return room

    def _launch(self) -> None:
        # do_sample=False: our processor draws the tokens and marks them, the engine only has to take the argmax.
        generation_config = GenerationConfig(do_sample=False, eos_token_id=STOP_IDS, pad_token_id=0)
        # Everything explicit: the defaults take most of the free memory and many seconds. The sampler keeps its state
        # in Python, which excludes CUDA graphs and batches prepared ahead.
        batching = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-self.cache_tokens // PAGE_TOKENS),
            max_batch_tokens=BATCH_TOKENS,
            max_requests_per_batch=self.slots,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        flash = is_flash_attn_2_available()  # only if it is installed: never fetched from a hub
        self.model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
        manager = self.model.init_continuous_batching(generation_config, batching)
        if not flash:  # the manager only accepts names that it knows
            self.model.set_attn_implementation(attention.NAME)
        manager.logit_processor = request_processors(self.model.device)
        manager.warmup()  # makes the KV cache here and now, where an error can be seen
        manager.start()
        self._manager = manager

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            drain_queue(self._manager.output_router.output_queue)  # tokens that came after a request was cancelled
            if self.alive:
                continue
            error = self._manager.background_thread_status.fatal_error
            logger.error("engine died", extra={"error": repr(error)})
            self._fail_all("推理引擎出错了 [engine died]：正在重启，请过几秒再试")
            await asyncio.sleep(RESTART_SECONDS)
            try:
                await asyncio.to_thread(self._manager.stop)  # gives the memory of its KV cache back
                await asyncio.to_thread(self._launch)
                self.restarts += 1
            except Exception:
                logger.exception("engine restart failed, trying again")

    def _fail_all(self, reason: str) -> None:
        for generation in list(self._running):
            generation.fail(reason)


class Generation:
    """A reply being written: an asynchronous iterator over lists of new token ids.

    It gives its slot back as soon as the engine has finished it, whether or not anybody has read it.
    """

    def __init__(self, manager, running: set["Generation"]):
        self._manager, self._running = manager, running
        self._id = uuid.uuid4().hex  # never a client's: a duplicate stops the engine
        self._outputs: asyncio.Queue = asyncio.Queue()
        self._received = 0
        self.token_ids: list[int] = []  # what has been read
        self.facts: dict[str, str] = {}  # for the log

    def start(self, input_ids: list[int], max_new_tokens: int, sampling: Sampling) -> None:
        """Hand the request to the engine."""
        self._manager.register_result_handler(self._id, self._receive)
        self._running.add(self)
        accepted = self._manager.add_request(
            input_ids, self._id, max_new_tokens=max_new_tokens, streaming=True, sampling=sampling
        )
        if accepted is None:
            self.fail("推理引擎没有在运行 [engine is down]：请过几秒再试")

    def cancel(self) -> None:
        """End the reply within one token and free its slot. Does nothing if it has ended."""
        if self in self._running:
            self._manager.cancel_request(self._id)
            self._leave()

    def fail(self, reason: str) -> None:
        """Let the reader see an error."""
        self._outputs.put_nowait(EngineError(reason))
        self._leave()

    async def __aiter__(self):
        while (output := await self._outputs.get()) is not None:
            if isinstance(output, EngineError):
                raise output
            self.token_ids += output
            yield output

    def _receive(self, output) -> None:
        """Called in the event loop for every token."""
        if output.error:
            self.fail("推理引擎出错了 [engine error]：请过几秒再试")
            return
        # Only what is new is kept for a reader who may be slow: every output holds the whole reply.
        self._outputs.put_nowait(output.generated_tokens[self._received :])
        self._received = len(output.generated_tokens)
        if output.is_finished():
            self._outputs.put_nowait(None)
            self._leave()

    def _leave(self) -> None:
        self._running.discard(self)
        # A cancelled request gets no last event, and its handler would stay for ever.
        self._manager.output_router.result_handlers.pop(self._id, None)


def shared_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A second model object with the same weights in memory, for an adapter or an attention of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
