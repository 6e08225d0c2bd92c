"""What every benchmark does with its figures: print them as a table, and write them as JSON if asked.

The two options that every benchmark has are here too: `Quick` and `JsonFile`.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from helpers.inspect.receipt import collect_versions, describe_device, utc_now
from helpers.paths import write_json

Quick = Annotated[bool, typer.Option("--quick", help="Small and short: what `make bench` runs.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")]
Better = Literal["above 1", "below 1", "at 1", "neither"]


def publish(
    question: str,
    columns: list[str],
    rows: list[list[str]],
    *,
    ratios: dict[str, float],
    setting: str,
    json_file: Path | None = None,
    better: Better = "above 1",
    chart: dict | None = None,
) -> None:
    """Print the table with its ratios, and write all of it to `json_file`.

    Args:
        question: what was asked, in one line.
        columns, rows: the table, figures with their units.
        ratios: what was compared to the ratio, above 1 where this project's way is better.
        setting: what is not in the table: the model, how many repetitions.
        better: where ratios are good. "neither": they say what something costs and judge nothing.
        chart: curves for benchmarks/README.md, as {"x": label, "y": label, "lines": {name: [numbers]}}.
    """
    console = Console(markup=False)
    console.print(f"{question}\n{setting}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.2f}x")
    if json_file is not None:
        content = {"question": question, "setting": setting, "columns": columns, "rows": rows}
        content |= {"ratios": ratios, "better": better, "chart": chart}
        about = {"time_utc": utc_now(), "threads": torch.get_num_threads()}
        about |= {"device": describe_device(), "versions": collect_versions()}
        write_json(json_file, content | about)
