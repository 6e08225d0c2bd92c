"""Is the native model as fast as the original modelling code?

Measured: tokens a second of reading a prompt (prefill) and of writing after it (decode, greedy), on random models of
CharacterGLM's architecture, in float32 and bfloat16. Two sides in alternation, in the same greedy loop, with the same
weights and prompt: the native model (transformers' GLM, loaded as this project does), and the original's computation
written out in plain PyTorch (`support/original_steps.py`; the original file itself does not run with today's transformers
and is not here). In float32 the logits of both must agree and the tokens be the same. Medians, and the median of the
ratios of each repetition.

    python benchmarks/speed.py                    # 50, 100 and 300 million weights
    python benchmarks/speed.py --quick            # 50 million, shorter
    python benchmarks/speed.py --threads 1
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from support.original_steps import OriginalSteps
from support.random_model import random_model
from support.report import JsonFile, Quick, Threads, publish
from support.rounds import Ratio, in_turns
from transformers import DynamicCache

VOCABULARY = 4096
SHAPES = {
    "50M": {},
    "100M": {"num_hidden_layers": 13, "hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12},
    "300M": {"num_hidden_layers": 22, "hidden_size": 1024, "intermediate_size": 3424, "num_attention_heads": 16},
}
LOGIT_TOLERANCE = 1e-3  # float32: other kernels add up in another order
PHASES = ("prefill", "decode")


@torch.no_grad()
def main(
    repetitions: Annotated[int, typer.Option(min=3)] = 7,
    prompt_tokens: Annotated[int, typer.Option(min=8)] = 512,
    new_tokens: Annotated[int, typer.Option(min=8)] = 32,
    threads: Threads = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print tokens a second of both sides and their ratio."""
    if quick:
        repetitions, prompt_tokens, new_tokens = 5, 128, 16
    rows, ratios = [], {}
    for name in ("50M",) if quick else SHAPES:
        model = randomised(random_model(VOCABULARY, **SHAPES[name]))
        for dtype in (torch.float32, torch.bfloat16):
            compare(name, model.to(dtype), repetitions, prompt_tokens, new_tokens, rows, ratios)
    publish(
        "原生模型和原来的代码一样快吗？Is the native model as fast as the original's computation?",
        ["model", "dtype", "phase", "original's steps", "native"],
        rows,
        ratios=ratios,
        setting=f"tokens/s; prompt of {prompt_tokens}, {new_tokens} new; CPU, medians of {repetitions}; the other side is "
        "the original's steps in plain PyTorch, not the original file",
        json_file=json_file,
    )


def randomised(model):
    """The model with biases and norms that are not all 0 or 1: otherwise a wrong use of them would change nothing."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def compare(name: str, model, repetitions: int, prompt_tokens: int, new_tokens: int, rows: list, ratios: dict) -> None:
    """Measure both sides in turns; add a row and a ratio for each phase."""
    ids = torch.randint(3, VOCABULARY, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    sides = {"original": OriginalSteps(model), "native": native(model)}
    if model.dtype == torch.float32:
        assert_same(sides, ids, new_tokens)
    timed = {side: lambda _, step=step: write(step, ids, new_tokens)[:2] for side, step in sides.items()}
    seconds = in_turns(timed, range(repetitions + 1), warm_up=True)
    dtype = str(model.dtype).removeprefix("torch.")
    for number, (phase, tokens) in enumerate(zip(PHASES, (prompt_tokens, new_tokens - 1))):
        original, ours = ([times[number] for times in seconds[side]] for side in ("original", "native"))
        rates = (f"{tokens / statistics.median(times):,.1f}" for times in (original, ours))
        rows.append([name, dtype, phase, *rates])
        ratios[f"{name} {dtype}: {phase}"] = Ratio.of(original, ours)


def native(model) -> Callable:
    """The native model with the same face as `OriginalSteps`."""

    def step(ids: torch.Tensor, cache: DynamicCache | None = None) -> tuple[torch.Tensor, DynamicCache]:
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1], output.past_key_values

    return step


def write(step: Callable, ids: torch.Tensor, new_tokens: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, seconds for the others, and the tokens."""
    start = time.perf_counter()
    logits, cache = step(ids)
    tokens = [int(logits.argmax())]
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        logits, cache = step(torch.tensor([tokens[-1:]]), cache)
        tokens.append(int(logits.argmax()))
    return first - start, time.perf_counter() - first, tokens


def assert_same(sides: dict[str, Callable], ids: torch.Tensor, new_tokens: int) -> None:
    """Both sides compute the same: otherwise their speeds say nothing about each other."""
    first, second = (side(ids)[0] for side in sides.values())
    assert (first - second).abs().max() < LOGIT_TOLERANCE, (first - second).abs().max()
    written = [write(side, ids, new_tokens)[2] for side in sides.values()]
    assert written[0] == written[1], "the two sides wrote different tokens"


if __name__ == "__main__":
    typer.run(main)
