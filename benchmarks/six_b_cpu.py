"""Is the 6B of any use on a machine without a GPU?

Random weights of the 6B's true shape in its original layout, 12.5 GB of bfloat16, loaded by `helpers.load` on the CPU: the
seconds and the memory of loading, the seconds to the first token of a reply, and tokens a second after it. Speed does not
depend on what the weights are. A token cannot cost less than reading all the weights once (all but the embedding, of which
it needs a row): that is measured in the same rounds, and the ratio says how near a reply comes to it.

    python benchmarks/six_b_cpu.py                       # 12.5 GB of disk, and of memory
    python benchmarks/six_b_cpu.py --folder /data        # where there is room
    python benchmarks/six_b_cpu.py --quick               # 2 of the 28 blocks: 1.9 GB
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.memory import PeakMemory
from support.report import JsonFile, Quick, Threads, publish
from support.rounds import ROUNDS, Ratio, in_turns
from support.talk import Clock, random_ids

import helpers
from helpers.model.modeling import CharacterGLMConfig
from helpers.paths import PROJECT_DIR

sys.path.append(str(PROJECT_DIR / "scripts"))
from write_6b_shape import write_random_checkpoint  # noqa: E402 - found on the path just extended


def main(
    layers: Annotated[int, typer.Option(min=1, help="Blocks; the 6B has 28.")] = 28,
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoint is written, and deleted again.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=8)] = 256,
    new_tokens: Annotated[int, typer.Option(min=4)] = 16,
    threads: Threads = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print what loading and a reply cost."""
    layers = 2 if quick else layers
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        directory = Path(temporary) / "6b-shape"
        write_random_checkpoint(directory, CharacterGLMConfig(num_hidden_layers=layers))
        start = time.perf_counter()
        with PeakMemory() as memory:
            model, _ = helpers.load(directory, device_map="cpu")
            loaded = time.perf_counter() - start
            figures = measure(model, prompt_tokens, new_tokens)
    rows = [["load", f"{loaded:.1f} s"]]
    rows += [["weights", f"{model.get_memory_footprint() / 1e9:.2f} GB of {model.dtype}"]]
    rows += [
        ["memory at the peak", f"{memory.resident / 1e9:.2f} GB, of which {memory.allocated / 1e9:.2f} not the files"]
    ]
    rows += [[name, f"{statistics.median(each):.3g} s"] for name, each in figures.items()]
    rows += [["tokens a second", f"{1 / statistics.median(figures['a token']):.2f}"]]
    publish(
        "没有 GPU 的机器运行 6B，行吗？Is the 6B of any use on a machine without a GPU?",
        ["what", "figure"],
        rows,
        ratios={
            f"{layers} blocks: reading the weights, against a token": Ratio.of(
                figures["the weights read once"], figures["a token"]
            )
        },
        setting=f"6B's shape, {layers} of 28 blocks, prompt of {prompt_tokens}, {new_tokens} new, medians of {ROUNDS}",
        json_file=json_file,
        better="at 1",
    )


def measure(model, prompt_tokens: int, new_tokens: int) -> dict[str, list[float]]:
    """Seconds to the first token, for each one after it, and for reading the weights, round by round."""
    ids = random_ids(1, prompt_tokens)
    weights = [weight for name, weight in model.named_parameters() if "embed_tokens" not in name]

    def write(_: int) -> tuple[float, float]:
        clock, options = Clock(), {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        return clock.ticks[1][0] - clock.ticks[0][0], 1 / clock.speed()

    def read(_: int) -> float:
        start = time.perf_counter()
        for weight in weights:
            weight.view(torch.int64).sum()  # the fastest single pass that torch has
        return time.perf_counter() - start

    found = in_turns({"write": write, "read": read}, range(ROUNDS + 1), warm_up=True)
    first, each = zip(*found["write"])
    return {"the first token": list(first), "a token": list(each), "the weights read once": found["read"]}


if __name__ == "__main__":
    typer.run(main)
