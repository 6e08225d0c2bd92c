"""Is bfloat16 faster than float32 on this CPU, and from which size on?

Measured: milliseconds a token of reading a prompt, of writing after it (greedy), and of writing 16 replies at once, as a
server does, on CharacterGLM-Nano and on random models of its architecture, the same weights in both precisions, in alternation. It depends on the CPU: those
with AVX512-BF16 or AMX multiply in bfloat16, others convert every number first. `helpers.load(..., dtype=...)` chooses.

    python benchmarks/precision.py             # Nano, 50 and 340 million weights
    python benchmarks/precision.py --quick     # without the largest, shorter
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from support.random_model import SHAPES, random_model
from support.report import CpuTime, JsonFile, Quick, Threads, publish
from support.rounds import ROUNDS, Ratio, in_turns

import helpers

VOCABULARY = 4096
DTYPES = (torch.float32, torch.bfloat16)
USERS = 16
PHASES = ("prompt", "reply", f"{USERS} replies")


@torch.no_grad()
def main(
    rounds: Annotated[int, typer.Option(min=ROUNDS)] = 7,
    prompt_tokens: Annotated[int, typer.Option(min=8)] = 256,
    new_tokens: Annotated[int, typer.Option(min=8)] = 24,
    threads: Threads = 0,
    cpu_time: CpuTime = False,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print milliseconds a token in both precisions and their ratio."""
    if quick:
        rounds, prompt_tokens, new_tokens = 5, 128, 16
    rows, ratios = [], {}
    for name in ("Nano", "50M") if quick else ("Nano", *SHAPES):
        model = helpers.load("nano", dtype="float32")[0] if name == "Nano" else random_model(VOCABULARY, **SHAPES[name])
        times = measure(model, rounds, prompt_tokens, new_tokens, time.process_time if cpu_time else time.perf_counter)
        for phase in PHASES:
            each = [[seconds[phase] for seconds in times[str(dtype)]] for dtype in DTYPES]
            count = f"{model.num_parameters() / 1e6:.1f}M"
            rows.append([name, count, phase, *(f"{1000 * statistics.median(side):.2f}" for side in each)])
            ratios[f"{name}: {phase}, bfloat16 against float32"] = Ratio.of(*each)
    publish(
        "bfloat16 在这个 CPU 上比 float32 快吗？Is bfloat16 faster than float32 on this CPU?",
        ["model", "parameters", "phase", "float32 ms/token", "bfloat16 ms/token"],
        rows,
        ratios=ratios,
        setting=f"prompt of {prompt_tokens}, {new_tokens} new; medians of {rounds}; "
        f"{'CPU time; ' if cpu_time else ''}the CPU computes in bfloat16: {'yes' if computes_in_bfloat16() else 'no'}",
        json_file=json_file,
    )


def computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def measure(
    model, rounds: int, prompt_tokens: int, new_tokens: int, clock: Callable
) -> dict[str, list[dict[str, float]]]:
    """Seconds a token of both phases, in both precisions, round by round."""
    ids = torch.randint(300, 4000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    models = {str(dtype): copy.deepcopy(model).to(dtype) for dtype in DTYPES}
    sides = {dtype: lambda _, own=own: write(own, ids, new_tokens, clock) for dtype, own in models.items()}
    return in_turns(sides, range(rounds + 1), warm_up=True)


def write(model, ids: torch.Tensor, new_tokens: int, clock: Callable) -> dict[str, float]:
    """Seconds a token: of the prompt, of those written after the first, and of those of many replies at once."""
    start = clock()
    output = model(ids, use_cache=True, logits_to_keep=1)
    seconds = {"prompt": (clock() - start) / ids.shape[1]}
    for phase, users in zip(PHASES[1:], (1, USERS)):
        cache, latest = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True).expand(users, 1)
        if users > 1:
            cache.batch_repeat_interleave(users)
        start = clock()
        for _ in range(new_tokens):
            latest = model(latest, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        seconds[phase] = (clock() - start) / new_tokens / users
    return seconds


if __name__ == "__main__":
    typer.run(main)
