"""What every benchmark does with its figures: print them as a table, and write them as JSON if asked.

The options of the benchmarks are here too: every one has `Quick` and `JsonFile`, some `Threads`.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from support.rounds import Better, Ratio, load_note

from helpers.inspect.receipt import collect_versions, describe_device, utc_now
from helpers.paths import write_json

Quick = Annotated[bool, typer.Option("--quick", help="Small and short: what `make bench` runs.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")]


def set_threads(count: int) -> int:
    """Set them for torch in this process; 0 leaves its own choice. Returns how many there are."""
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


Threads = Annotated[int, typer.Option(min=0, callback=set_threads, help="torch threads; 0: torch's own choice.")]
CpuTime = Annotated[
    bool, typer.Option("--cpu-time", help="With one thread: count the CPU's time, which other load leaves alone.")
]
# Of the last minute, when the benchmark began; run_all.py hands over its own, as the script before is load as well.
LOAD_VARIABLE = "BENCHMARK_LOAD"
LOAD = float(os.environ.get(LOAD_VARIABLE, os.getloadavg()[0]))


def publish(
    question: str,
    columns: list[str],
    rows: list[list[str]],
    *,
    ratios: dict[str, Ratio],
    setting: str,
    json_file: Path | None = None,
    better: Better = "above 1",
    chart: dict | None = None,
) -> None:
    """Print the table with its ratios, and write all of it to `json_file`.

    Args:
        question: what was asked, in one line.
        columns, rows: the table, figures with their units.
        ratios: what was compared to the ratio, above 1 where this project's way is better unless `better` says else.
        setting: what is not in the table: the model, how many repetitions.
        better: where ratios are good. "neither": they say what something costs and judge nothing.
        chart: curves for benchmarks/README.md, as {"x": label, "y": label, "lines": {name: [numbers]}}.
    """
    console = Console(markup=False)
    load = {"average": LOAD, "cores": os.cpu_count() or 1}
    about = [setting, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", load_note(*load.values())]
    console.print(f"{question}\n{'; '.join(filter(None, about))}")
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio.verdict(better)} ({ratio.spread})")
    if json_file is not None:
        content = {"question": question, "setting": setting, "columns": columns, "rows": rows, "load": load}
        content |= {"ratios": {name: asdict(ratio) for name, ratio in ratios.items()}, "better": better, "chart": chart}
        about = {"time_utc": utc_now(), "threads": torch.get_num_threads()}
        about |= {"device": describe_device(), "versions": collect_versions()}
        write_json(json_file, content | about)
