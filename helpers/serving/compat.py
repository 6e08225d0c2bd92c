"""What transformers' continuous batching does not promise to keep, read in 5.23.0 and 5.24.0; a test tells if it is gone.

Without these names the API cannot serve: each has its reason at the line where it is used.
"""

from transformers import LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus, OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState

__all__ = ["ContinuousBatchingLogitsProcessor", "FutureRequestState", "RequestState"]
# (whose, name): what the test looks for.
NAMES = (
    (ContinuousBatchingManager, "warmup"),  # makes the KV cache at once: no memory for it is an error one can see
    (ContinuousBatchingManager, "get_result"),
    (BackgroundThreadStatus(), "fatal_error"),
    (OutputRouter(), "result_handlers"),
    (ContinuousBatchingLogitsProcessorList(LogitsProcessorList()), "tensors_required"),
    (RequestState("", [0]), "initial_tokens"),
    (RequestState("", [0]), "generated_tokens"),
    (RequestState("", [0]), "logit_processor_kwargs"),
)


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
