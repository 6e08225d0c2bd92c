"""How long do the four notebooks take from end to end on CharacterGLM-Nano?

Measured: seconds of each notebook, run headless by `helpers.tools.runner` as `make run` does, start of the kernel included.
Nothing is compared but two bounds: 60 s for notebook 01, 300 s for all four. The exit code is 1 if a notebook fails; a bound
that is missed shows as a ratio below 1. One run gives no ratio.

    python benchmarks/series.py
    python benchmarks/series.py --repetitions 1
    python benchmarks/series.py --quick     # one run of 01
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from support.report import JsonFile, Quick, publish
from support.rounds import ROUNDS, Ratio

from helpers.tools.runner import find_notebooks, format_failure, run_notebooks

FIRST_BOUND, ALL_BOUND = 60, 300  # seconds
QUICK_NOTEBOOKS = ["01"]


def main(
    repetitions: Annotated[int, typer.Option(min=1, max=ROUNDS, help="Runs of the whole series.")] = ROUNDS,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print the seconds of each notebook and of all of them."""
    repetitions, notebooks = (1, QUICK_NOTEBOOKS) if quick else (repetitions, [])
    runs = [run_series(notebooks) for _ in range(repetitions)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    total = statistics.median(sum(run.values()) for run in runs)
    first = next(iter(median))
    rows = [[name, f"{seconds:.1f} s", f"{FIRST_BOUND} s" if name == first else ""] for name, seconds in median.items()]
    if not quick:
        rows.append(["all", f"{total:.1f} s", f"{ALL_BOUND} s"])
    ratios = {}
    if repetitions >= ROUNDS:
        ratios["notebook 01, against its bound"] = Ratio.of([FIRST_BOUND] * repetitions, [run[first] for run in runs])
        ratios["all, against their bound"] = Ratio.of([ALL_BOUND] * repetitions, [sum(run.values()) for run in runs])
    publish(
        "四个 notebook 在 Nano 上要跑多久？How long do the four notebooks take on Nano?",
        ["notebook", "seconds", "bound"],
        rows,
        ratios=ratios,
        setting=f"{repetitions} run(s), headless, model nano",
        json_file=json_file,
    )


def run_series(notebooks: list[str]) -> dict[str, float]:
    """Seconds of each of these notebooks, all if none is named; ends the program if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_notebooks(notebooks, model="nano", output_dir=Path(folder) / "outputs")
    for result in results:
        if result.failure:
            sys.exit(format_failure(result))
    assert len(results) == len(find_notebooks(notebooks))
    return {result.notebook: result.seconds for result in results}


if __name__ == "__main__":
    typer.run(main)
