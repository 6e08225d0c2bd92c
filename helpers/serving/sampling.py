"""Choosing the next token of every request in a batch, each by its own parameters.

transformers' continuous batching knows temperature, top_k and top_p per request, but drops `repetition_penalty`, which
CharacterGLM's own defaults use, and has no seed per request. This processor does all of it, for the whole batch at once,
and gives the same distribution as `generate`.
"""

import torch

from ..chat.generation import GenerationParameters
from .compat import ContinuousBatchingLogitsProcessor, FutureRequestState, RequestState

SMALLEST_DIVISOR = 1e-4  # a score divided by less could become infinite; a temperature this low is greedy already


class Sampling:
    """The parameters of one request, and what has to be remembered from token to token.

    Args:
        vocabulary: how many tokens the model scores; device: where it computes.
    """

    def __init__(self, parameters: GenerationParameters, vocabulary: int, device: torch.device):
        self.do_sample, self.top_p = parameters.do_sample, parameters.top_p
        # Values that no tensor can hold would stop the engine for everyone.
        self.top_k = min(parameters.top_k or vocabulary, vocabulary)
        self.temperature = max(parameters.temperature, SMALLEST_DIVISOR)
        self.repetition_penalty = max(parameters.repetition_penalty, SMALLEST_DIVISOR)
        seeded = parameters.seed is not None
        self.generator = torch.Generator(device).manual_seed(parameters.seed) if seeded else None
        self.seen: torch.Tensor | None = None  # [vocabulary] bool: tokens of the prompt and the reply

    def __deepcopy__(self, memo) -> "Sampling":
        # A request that has to give up its cache is started again from a copy of its arguments: it stays the same one.
        return self

    def see(self, state: RequestState, vocabulary: int, device: torch.device) -> torch.Tensor:
        """Which tokens have come before. The prompt is noted once, then one token a call."""
        if self.seen is None:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen[state.initial_tokens] = True
        # A request that was started again has its reply so far at the end of the prompt.
        self.seen[(state.generated_tokens or state.initial_tokens)[-1]] = True
        return self.seen


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Turns the scores of a batch into 1 for the token chosen in each row and 0 elsewhere; the engine takes the argmax.

    Unseeded rows are drawn with a generator of this sampler, so that torch's global one is not disturbed.
    """

    supported_kwargs = {"sampling": Sampling}
    ignored_kwargs = ()

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device)
        self.generator.seed()
        self.states: list[RequestState] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Nothing to prepare: the parameters stay in `Sampling`."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Remember whose rows come next. Called in the same thread as `__call__`, just before the forward pass."""
        self.states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self.states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """One-hot rows for `scores` [rows, vocabulary]; rows beyond the known requests are padding."""
        if not self.states:  # a long prompt is read in several passes, of which only the last gives a token
            return scores
        rows = scores[: len(self.states)]
        samplings = [state.logit_processor_kwargs["sampling"] for state in self.states]
        seen = torch.stack([s.see(state, rows.shape[1], rows.device) for s, state in zip(samplings, self.states)])
        rows = penalise_repetition(rows, seen, _column(samplings, "repetition_penalty", rows))
        chosen = torch.zeros_like(scores)
        chosen[: len(rows)].scatter_(1, self._choose(rows, samplings), 1.0)
        return chosen

    def _choose(self, rows: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
        """A token id for each row, [rows, 1]."""
        greedy = rows.argmax(dim=-1, keepdim=True)
        if not any(sampling.do_sample for sampling in samplings):
            return greedy
        temperature, top_p = (_column(samplings, name, rows) for name in ("temperature", "top_p"))
        top_k = _column(samplings, "top_k", rows).long()
        probabilities, ids = likely_tokens(rows / temperature, top_k, top_p)
        drawn = ids.gather(1, torch.multinomial(probabilities, 1, generator=self.generator))
        for i, sampling in enumerate(samplings):
            if sampling.generator is not None:
                # Over the whole vocabulary, as `generate` draws: the same seed then gives the same reply as `chat`.
                row = torch.zeros_like(rows[i]).scatter_(0, ids[i], probabilities[i])
                drawn[i] = torch.multinomial(row, 1, generator=sampling.generator)
        return torch.where(_column(samplings, "do_sample", rows) > 0, drawn, greedy)


def _column(samplings: list[Sampling], name: str, like: torch.Tensor) -> torch.Tensor:
    """One parameter of every request, [rows, 1]."""
    return like.new_tensor([[float(getattr(sampling, name))] for sampling in samplings])


def penalise_repetition(scores: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Make tokens that have come before less likely, as transformers' RepetitionPenaltyLogitsProcessor.

    Args:
        scores: [rows, vocabulary]; seen: the same shape, bool; penalty: [rows, 1], 1 changes nothing.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def likely_tokens(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k and top_p leave: probabilities (0 for those left out) and ids, likeliest first.

    Sorting only the largest top_k of a batch instead of the vocabulary is what makes this fast.

    Args:
        scores: [rows, vocabulary]; top_k: [rows, 1], from 1 to the size of the vocabulary; top_p: [rows, 1].

    Returns:
        Two tensors [rows, largest top_k]; the rows of the first need not add up to 1.
    """
    best, ids = scores.topk(int(top_k.max()))
    best = best.masked_fill(torch.arange(best.shape[1], device=scores.device) >= top_k, -torch.inf)
    probabilities = best.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens
    kept = probabilities.masked_fill((before >= top_p) & (top_p < 1), 0.0).nan_to_num(0.0)
    # The likeliest always stays, even if the scores are not numbers: drawing from nothing stops the engine for everyone.
    kept[:, 0] = probabilities[:, 0].nan_to_num(1.0)
    return kept, ids
