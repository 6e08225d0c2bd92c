"""Many replies at once: transformers' continuous batching, guarded so that no request can stop it for the others.

One bad request stops that engine for everyone (a token id out of range, an empty prompt, a prompt beyond the cache, a
duplicate id), so all of it is checked here first. If it stops all the same, everyone who waits gets an error at once and
it is started again.
"""

import asyncio
import copy
import logging
import uuid

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.utils import is_flash_attn_2_available

from ..chat.generation import STOP_IDS, GenerationParameters
from ..errors import ChatError, EngineError, OverloadError
from . import attention, compat
from .sampling import RequestSampler, Sampling

logger = logging.getLogger(__name__)

PAGE_TOKENS = 32  # the unit in which the KV cache is given out, and in which prompts can share a prefix
BATCH_TOKENS = 512  # most tokens of one forward pass; longer prompts are read in pieces, between the tokens of others
SLOTS, QUEUE_SIZE = 16, 48
RESTART_SECONDS = 1.0
WATCH_SECONDS = 0.1


class Engine:
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
        self.model, self.slots, self.queue_size = shared_copy(model), slots, queue_size
        self.context = min(context, model.config.max_position_embeddings, cache_tokens)
        self.cache_tokens = cache_tokens
        self.restarts = 0
        self.running: set[Generation] = set()
        self._watcher: asyncio.Task | None = None
        self._manager = None

    @property
    def alive(self) -> bool:
        """Whether requests can be served now."""
        manager = self._manager
        return manager is not None and manager.is_running() and compat.fatal_error(manager) is None

    @property
    def in_flight(self) -> int:
        """Requests being written, waiting, or prepared."""
        return len(self.running)

    @property
    def waiting(self) -> int:
        """Requests beyond the slots."""
        return max(0, self.in_flight - self.slots)

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
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._fail_all("服务正在关闭 [shutting down]")
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, block=True, timeout=10, hard_stop=True)

    def reserve(self) -> "Generation":
        """A place among the requests, held while the prompt is prepared; `start` it or `cancel` it.

        Raises:
            OverloadError: all slots and the queue are full; EngineError: not running at the moment.
        """
        if not self.alive:
            raise EngineError("推理引擎没有在运行 [engine is down]：正在重启，请过几秒再试")
        if self.in_flight >= self.slots + self.queue_size:
            raise OverloadError(f"请求太多 [server busy]：已有 {self.in_flight} 个，请稍后再试")
        return Generation(self, self._manager)

    def generate(self, input_ids: list[int], parameters: GenerationParameters) -> "Generation":
        """Begin a reply; iterate over the result for its token ids. Raises as `reserve` and `Generation.start`."""
        return self.reserve().start(input_ids, parameters)

    def check_prompt(self, input_ids: list[int]) -> None:
        """Raise a ChatError for an empty or too long prompt, or ids that are not in the vocabulary."""
        if not input_ids or min(input_ids) < 0 or max(input_ids) >= self.model.config.vocab_size:
            raise ChatError("prompt 是空的，或含有词表之外的 token [invalid prompt]")
        if len(input_ids) >= self.context:
            raise ChatError(f"prompt 太长 [prompt too long]：{len(input_ids)} 个 token，加上回复最多 {self.context}")

    def _launch(self) -> None:
        # do_sample=False: our sampler draws the tokens and marks them, the engine only has to take the argmax.
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
        compat.install_sampler(manager, RequestSampler(self.model.device))
        manager.warmup()
        manager.start()
        self._manager = manager

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            compat.drop_late_tokens(self._manager)
            if self.alive:
                continue
            logger.error("engine died", extra={"error": repr(compat.fatal_error(self._manager))})
            self._fail_all("推理引擎出错了 [engine died]：正在重启，请过几秒再试")
            await asyncio.sleep(RESTART_SECONDS)
            try:
                await asyncio.to_thread(self._manager.stop)  # gives the memory of its KV cache back
                await asyncio.to_thread(self._launch)
                self.restarts += 1
            except Exception:
                logger.exception("engine restart failed, trying again")

    def _fail_all(self, reason: str) -> None:
        for generation in list(self.running):
            generation.fail(EngineError(reason))


class Generation:
    """A reply being written: an asynchronous iterator over lists of new token ids.

    It gives its slot back as soon as the engine has finished it, whether or not anybody has read it.
    """

    def __init__(self, engine: Engine, manager):
        self.prompt_tokens = 0
        self.token_ids: list[int] = []  # what has been read
        self._engine, self._manager = engine, manager
        self._id = uuid.uuid4().hex  # never a client's: a duplicate stops the engine
        self._outputs: asyncio.Queue = asyncio.Queue()  # lists of ids, then None or an error
        self._received = 0
        engine.running.add(self)

    def start(self, input_ids: list[int], parameters: GenerationParameters) -> "Generation":
        """Hand the prompt to the engine.

        Args:
            parameters: do_sample, temperature, top_k, top_p, repetition_penalty, seed and max_new_tokens are used.

        Raises:
            ChatError: see `Engine.check_prompt`. The place is then free again.
        """
        engine, self.prompt_tokens = self._engine, len(input_ids)
        try:
            engine.check_prompt(input_ids)
        except ChatError:
            self.cancel()
            raise
        if self not in engine.running:  # the engine has stopped meanwhile: whoever reads gets the error
            return self
        sampling = Sampling(parameters, engine.model.config.vocab_size, engine.model.device)
        most = min(parameters.max_new_tokens, engine.context - len(input_ids))
        self._manager.register_result_handler(self._id, self._receive)
        if not self._manager.add_request(input_ids, self._id, max_new_tokens=most, streaming=True, sampling=sampling):
            self.fail(EngineError("推理引擎没有在运行 [engine is down]：请过几秒再试"))
        return self

    def cancel(self) -> None:
        """End the reply within one token and free its slot. Does nothing if it has ended."""
        if self in self._engine.running:
            self._manager.cancel_request(self._id)
            self._leave()

    def fail(self, error: Exception) -> None:
        """Cancel, and let the reader see an error."""
        self._outputs.put_nowait(error)
        self.cancel()

    async def __aiter__(self):
        while (output := await self._outputs.get()) is not None:
            if isinstance(output, Exception):
                raise output
            self.token_ids += output
            yield output

    def _receive(self, output) -> None:
        """Called in the event loop for every token."""
        if output.error:
            self.fail(EngineError("推理引擎出错了 [engine error]：请过几秒再试"))
            return
        # Only what is new is kept for a reader who may be slow: every output holds the whole reply.
        self._outputs.put_nowait(output.generated_tokens[self._received :])
        self._received = len(output.generated_tokens)
        if output.is_finished():
            self._outputs.put_nowait(None)
            self._leave()

    def _leave(self) -> None:
        self._engine.running.discard(self)
        compat.forget_request(self._manager, self._id)


def shared_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A second model object with the same weights in memory, for an adapter or an attention of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
