"""What transformers' continuous batching does not promise to keep, read in 5.23.0 and 5.24.0; a test tells if it is gone.

Without these names the API cannot serve: each has its reason at the line where it is used.
"""

from transformers import LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

__all__ = ["ContinuousBatchingLogitsProcessor", "FutureRequestState", "RequestState"]
# "module:name", and what breaks without it.
NAMES = {
    "transformers.generation.continuous_batching:ContinuousBatchingManager.warmup": "no memory for the KV cache is seen late",
    "transformers.generation.continuous_batching:ContinuousBatchingManager.get_result": "tokens of cancelled replies pile up",
    "transformers.generation.continuous_batching.continuous_api:BackgroundThreadStatus.fatal_error": "a dead engine is not noticed",
    "transformers.generation.continuous_batching.continuous_api:OutputRouter.result_handlers": "cancelled requests stay in memory",
    "transformers.generation.continuous_batching.cb_logits_processors:ContinuousBatchingLogitsProcessorList.tensors_required": (
        "the engine does not call the sampler"
    ),
    "transformers.generation.continuous_batching:RequestState.initial_tokens": "repetition_penalty does not see the prompt",
    "transformers.generation.continuous_batching:RequestState.generated_tokens": "repetition_penalty does not see the reply",
    "transformers.generation.continuous_batching:RequestState.logit_processor_kwargs": "a request has no sampling of its own",
}


def install_sampler(manager: ContinuousBatchingManager, sampler: ContinuousBatchingLogitsProcessor) -> None:
    """Let `sampler` alone choose the tokens: the public way knows neither repetition_penalty nor a seed per request."""
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    manager.logit_processor.tensors_required = 1  # the list counts only processors that it converted itself


def fatal_error(manager: ContinuousBatchingManager) -> Exception | None:
    """What stopped the engine's thread; `is_running` alone stays true for a moment, in which requests would be lost."""
    return manager.background_thread_status.fatal_error


def forget_request(manager: ContinuousBatchingManager, request_id: str) -> None:
    """Drop the handler of a cancelled request: it gets no last event, and would stay in memory for ever."""
    manager.output_router.result_handlers.pop(request_id, None)


def drop_late_tokens(manager: ContinuousBatchingManager) -> None:
    """Empty the queue of tokens that came after their request was cancelled; nobody else does."""
    while manager.get_result(timeout=0) is not None:
        pass
