"""What transformers' continuous batching does not promise to keep, as read in 5.23.0 and 5.24.0.

`tests/unit/test_compat.py` says which of these is gone after an update, and what breaks then.
"""

from transformers import LogitsProcessorList
from transformers.generation.continuous_batching import RequestState as RequestState
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor as ContinuousBatchingLogitsProcessor,
)
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState as FutureRequestState

# "module:name", why it is used, and so what breaks without it.
NAMES = {
    "transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager.warmup": "no memory for the KV cache shows only at the first request",
    "transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager.logit_processor": "repetition_penalty and seed have no effect in the API",
    "transformers.generation.continuous_batching.continuous_api:BackgroundThreadStatus.fatal_error": "an engine that died is not noticed",
    "transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager.output_router": "cancelled requests stay in memory",
    "transformers.generation.continuous_batching.cb_logits_processors:ContinuousBatchingLogitsProcessorList.tensors_required": "the sampler is not called",
    "transformers.generation.continuous_batching.cb_logits_processors:ContinuousBatchingLogitsProcessor.prepare_tensor_args": "the sampler does not know whose tokens it chooses",
    "transformers.generation.continuous_batching.requests:FutureRequestState": "the sampler does not know whose tokens it chooses",
}


def install_sampler(manager, sampler: ContinuousBatchingLogitsProcessor) -> None:
    """Let `sampler` alone choose the tokens: the public way knows neither repetition_penalty nor a seed per request."""
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    manager.logit_processor.tensors_required = 1  # the list counts only processors that it converted itself


def fatal_error(manager) -> Exception | None:
    """What stopped the engine's thread; `is_running` alone stays true for a moment, in which requests would be lost."""
    return manager.background_thread_status.fatal_error


def forget_request(manager, request_id: str) -> None:
    """Drop the handler of a cancelled request: it gets no last event, and would stay in memory for ever."""
    manager.output_router.result_handlers.pop(request_id, None)


def drop_late_tokens(manager) -> None:
    """Empty the queue of tokens that came after their request was cancelled; nobody else does."""
    while manager.get_result(timeout=0) is not None:
        pass
