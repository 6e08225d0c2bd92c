"""How long does loading take against reading the files, and how much memory against their size?

Against each other, in turns: reading the files in pieces of 8 MB, and `helpers.load` in a process of its own that has
loaded Nano once, so that libraries do not count. On a CPU the weights stay in the files, mapped into memory, until they
are used. So there are two times: "load" is until `load` returns, "used" is until every page of the weights was looked at,
as the first reply would. With the files in the page cache (warm) and dropped from it (cold; a virtual machine's host may
keep them all the same). Medians. What does not depend on the size (config, tokenizer, checks) is the time of Nano.

Peak memory, above that before the load, over the weights' size in memory: the peak in the table is all that is resident,
with the pages of mapped files, which the kernel may drop at any time; "allocated" is without those. In another dtype the
numbers are converted one tensor at a time, so what is allocated is one model, never the shards beside it.

    python benchmarks/loading.py             # models of up to 1.3 billion random weights: 6 GB of disk
    python benchmarks/loading.py --quick     # Nano and 100 million
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.memory import PeakMemory
from support.report import JsonFile, Quick, publish
from support.rounds import ROUNDS, Ratio, in_turns

import helpers
from helpers.export.safetensors_copy import convert_checkpoint, stored_dtype
from helpers.model.checkpoint import weight_files
from helpers.model.loading import NANO_DIR
from helpers.model.modeling import CharacterGLMConfig
from helpers.paths import PROJECT_DIR

sys.path.append(str(PROJECT_DIR / "scripts"))
from write_6b_shape import write_random_checkpoint  # noqa: E402 - found on the path just extended

TIME_BOUND, MEMORY_BOUND = 1.3, 1.15
PIECE_BYTES = 8_000_000
SHAPES = {
    "100M": {"num_layers": 10, "hidden_size": 768, "ffn_hidden_size": 2048, "num_attention_heads": 12},
    "300M": {"num_layers": 18, "hidden_size": 1024, "ffn_hidden_size": 3424, "num_attention_heads": 16},
    "1.3B": {"num_layers": 20, "hidden_size": 2048, "ffn_hidden_size": 6848, "num_attention_heads": 32},
}
COLUMNS = ["model", "files", "dtype", "cache", "read", "load", "used", "peak"]


def main(
    quick: Quick = False,
    repetitions: Annotated[
        int | None, typer.Option(min=ROUNDS, help="Loads per row; default 7, or 3 if quick.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print times, memory and their ratios to what the files need."""
    repetitions = repetitions or (ROUNDS if quick else 7)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("Nano", "100M") if quick else ("Nano", *SHAPES):
            for directory in make_models(name, Path(folder)):
                for cache in ("warm",) if quick else ("warm", "cold"):
                    compare(name, directory, cache, repetitions, rows, ratios)
                add_converted(name, directory, repetitions, rows, ratios)
    publish(
        f"Loading against reading the files: at most {TIME_BOUND}x the time and {MEMORY_BOUND}x the memory?",
        COLUMNS,
        rows,
        ratios=ratios,
        setting=f"CPU, milliseconds, median of {repetitions}; ratios here are better when smaller",
        json_file=json_file,
        better="below 1",
    )


def make_models(name: str, folder: Path) -> list[Path]:
    """The `.bin` checkpoint of that size, and a safetensors copy of it."""
    original = NANO_DIR
    if name != "Nano":
        original = folder / name
        config = CharacterGLMConfig(**SHAPES[name], padded_vocab_size=32768, kv_channels=64, multi_query_group_num=2)
        write_random_checkpoint(original, config)
    return [original, convert_checkpoint(original, folder / f"{name} safetensors")]


def compare(name: str, directory: Path, cache: str, repetitions: int, rows: list, ratios: dict) -> None:
    """Read and load in turns, in the dtype of the files; add a row and its ratios."""
    dtype = str(stored_dtype(directory)).removeprefix("torch.")
    files, reads, loads = measure(directory, dtype, cache, repetitions)
    rows.append(row(name, files, dtype, cache, reads, loads))
    case = f"{name} {files[0].suffix} {cache}"
    ratios |= {f"{case}: {step} / read": Ratio.of(figures(loads, step), reads) for step in ("load", "used")}
    ratios[f"{case}: peak / weights"] = Ratio.of(figures(loads, "resident"), figures(loads, "weights"))


def add_converted(name: str, directory: Path, repetitions: int, rows: list, ratios: dict) -> None:
    """Load as float32, for the memory: add a row and what was allocated."""
    files, reads, loads = measure(directory, "float32", "warm", repetitions)
    rows.append(row(name, files, "float32", "warm", reads, loads))
    case = f"{name} {files[0].suffix} as float32: allocated / weights"
    ratios[case] = Ratio.of(figures(loads, "allocated"), figures(loads, "weights"))


def measure(directory: Path, dtype: str, cache: str, repetitions: int) -> tuple[list[Path], list[float], list[dict]]:
    """The weight files, the seconds of reading them and what loading them took, in turns."""
    files = weight_files(directory)
    read_files(files)

    def after_prepare(do: Callable) -> Callable:
        return lambda _: (prepare(files, cache), do())[1]

    sides = {"read": after_prepare(lambda: read_files(files)), "load": after_prepare(lambda: load(directory, dtype))}
    return files, *in_turns(sides, range(repetitions)).values()


def row(name: str, files: list[Path], dtype: str, cache: str, reads: list[float], loads: list[dict]) -> list[str]:
    """A line of the table."""
    times = map(statistics.median, (reads, figures(loads, "load"), figures(loads, "used")))
    peak = max(run["resident"] / run["weights"] for run in loads)
    return [name, files[0].suffix[1:], dtype, cache, *(f"{time * 1000:,.0f}" for time in times), f"{peak:.2f}x"]


def figures(runs: list[dict], step: str) -> list[float]:
    """One figure of several loads."""
    return [run[step] for run in runs]


def read_files(files: list[Path]) -> float:
    """Seconds to read the files from beginning to end."""
    buffer = bytearray(PIECE_BYTES)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def prepare(files: list[Path], cache: str) -> None:
    """If `cache` is cold, make the kernel forget the content of the files; the next reading comes from the disk."""
    for file in files if cache == "cold" else []:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not written yet cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(directory: Path, dtype: str) -> dict:
    """`measure_here` in a process of its own, forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "support.memory"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure_here, directory, dtype).result()


def measure_here(directory: Path, dtype: str) -> dict:
    """Seconds until the model is there and until all of it was looked at; bytes of the weights and at the peaks."""
    helpers.load("nano", device_map="cpu")
    with PeakMemory() as peak:
        start = time.perf_counter()
        model, _ = helpers.load(directory, dtype=dtype, device_map="cpu")
        loaded = time.perf_counter() - start
        look_at_every_page(model)
        used = time.perf_counter() - start
    memory = {"weights": model.get_memory_footprint(), "resident": peak.resident, "allocated": peak.allocated}
    return {"load": loaded, "used": used} | memory


def look_at_every_page(model) -> None:
    """Read one byte of each page of 4 KB."""
    for parameter in model.parameters():
        parameter.detach().flatten().view(torch.uint8)[::4096].sum()


if __name__ == "__main__":
    typer.run(main)
