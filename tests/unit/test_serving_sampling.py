"""The batched sampler against transformers' own processors, and its independence of what else is in the batch."""

import copy

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from helpers.chat.generation import GenerationParameters
from helpers.serving.sampling import RequestSampler, Sampling, likely_tokens, penalise_repetition

VOCABULARY = 64
CPU = torch.device("cpu")
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def request(prompt=(1, 2, 3), **fields) -> FutureRequestState:
    """A request as the engine hands it to the sampler."""
    sampling = Sampling(GenerationParameters.check({**PLAIN, **fields}), VOCABULARY, CPU)
    state = RequestState("id", list(prompt), logit_processor_kwargs={"sampling": sampling})
    return FutureRequestState(state, True, {}, 1)


def choose(requests: list, scores: torch.Tensor, sampler: RequestSampler | None = None) -> list[int]:
    """The tokens that the sampler marks, one a request."""
    sampler = sampler or RequestSampler(CPU)
    arguments = sampler.prepare_tensor_args(requests)
    marked = sampler(scores, arguments)
    assert marked.shape == scores.shape
    assert marked[: len(requests)].sum(dim=1).tolist() == [1.0] * len(requests)
    return marked[: len(requests)].argmax(dim=1).tolist()


def random_scores(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_repetition_penalty_as_in_transformers():
    scores, prompts = (
        random_scores(3),
        torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1)),
    )
    penalties = [1.0, 1.3, 0.5]
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, prompts, True)
    ours = penalise_repetition(scores, seen, torch.tensor(penalties)[:, None])
    for row, penalty in enumerate(penalties):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(prompts[row : row + 1], scores[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], theirs)


def test_top_k_and_top_p_as_in_transformers():
    choices = [(k, p) for k in (1, 2, 7, 50, VOCABULARY) for p in (1e-9, 0.3, 0.7, 0.95, 1.0)]
    scores = random_scores(len(choices))
    top_k, top_p = torch.tensor([c[0] for c in choices])[:, None], torch.tensor([c[1] for c in choices])[:, None]
    probabilities, ids = likely_tokens(scores, top_k, top_p)
    ours = torch.zeros_like(scores).scatter_(1, ids, probabilities)
    for row, (k, p) in enumerate(choices):
        kept = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, scores[row : row + 1]))
        assert ((ours[row : row + 1] > 0) == kept.isfinite()).all(), (k, p)
        assert torch.allclose(ours[row] / ours[row].sum(), kept.softmax(dim=-1)[0], atol=1e-6), (k, p)


def test_draws_have_the_right_frequencies():
    rows = 8000
    sampler, scores = RequestSampler(CPU), random_scores(1).expand(rows, -1)
    sampler.generator.manual_seed(0)
    asked = request(temperature=2.0, top_k=10, top_p=0.9)
    drawn = torch.tensor(choose([asked] * rows, scores, sampler)).bincount(minlength=VOCABULARY) / rows
    kept = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(10)(None, scores[:1] / 2.0))
    assert (drawn - kept.softmax(dim=-1)[0]).abs().max() < 0.02


def test_each_row_by_its_own_parameters():
    scores = random_scores(1).expand(3, -1)
    best, second = scores[0].topk(2).indices.tolist()
    greedy, narrow, penalised = request(do_sample=False), request(top_k=1), request([best], do_sample=False)
    penalised.state.logit_processor_kwargs["sampling"].repetition_penalty = 10.0
    for _ in range(5):
        assert choose([greedy, narrow, penalised], scores) == [best, best, second]


def replies(requests: list, rows: torch.Tensor, steps: int = 20) -> list[list[int]]:
    """Several tokens of several requests; the scores change from step to step."""
    sampler, drawn = RequestSampler(CPU), []
    for step in range(steps):
        drawn.append(choose(requests, rows.roll(step, dims=1), sampler))
        for asked, token in zip(requests, drawn[-1]):
            asked.state.generated_tokens.append(token)
    return [list(tokens) for tokens in zip(*drawn)]


def test_a_seeded_reply_does_not_depend_on_its_neighbours():
    scores = random_scores(4)
    chosen = {"seed": 7, "temperature": 2.0, "top_k": 30, "repetition_penalty": 1.3}
    alone = replies([request(**chosen)], scores[:1])[0]
    crowded = replies(
        [request(**chosen), request(top_k=0), request(do_sample=False), request(seed=8, top_p=0.5)], scores
    )[0]
    other_seed = replies([request(**{**chosen, "seed": 8})], scores[:1])[0]
    assert alone == crowded != other_seed


def test_drawing_leaves_torchs_own_random_numbers_alone():
    before = torch.get_rng_state()
    replies([request(seed=1), request()], random_scores(2), steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_only_pad_the_batch():
    scores = random_scores(6)
    scores[2:] = torch.nan
    assert choose([request(do_sample=False), request(top_k=1)], scores) == scores[:2].argmax(dim=1).tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_do_not_stop_the_others(bad):
    scores = random_scores(3)
    scores[0] = bad
    scores[1, 5] = bad
    tokens = choose([request(seed=1), request(), request(top_k=1)], scores)
    assert tokens[2] == int(scores[2].argmax())


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"top_k": 10**400},
        {"top_k": VOCABULARY + 1},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 10.0, "temperature": 1e-300, "top_k": 0},
    ],
)
def test_values_no_tensor_can_hold(extreme):
    scores = random_scores(2)
    token, neighbour = choose([request(**extreme), request(top_k=1)], scores)
    assert neighbour == int(scores[1].argmax())
    if {"temperature", "top_p"} & extreme.keys():
        assert token == int(scores[0].argmax())


def test_a_request_started_again_remembers_its_tokens_and_its_seed():
    asked = request([1, 2], seed=3, repetition_penalty=2.0)
    replies([asked], random_scores(1), steps=5)
    again = asked.state.create_equivalent_initial_request()  # what the engine does when it needs the cache for others
    sampling = again.logit_processor_kwargs["sampling"]
    assert sampling is asked.state.logit_processor_kwargs["sampling"] is copy.deepcopy(sampling)
    choose([FutureRequestState(again, True, {}, 1)], random_scores(1))
    assert set(sampling.seen.nonzero().flatten().tolist()) == {1, 2, *asked.state.generated_tokens}
