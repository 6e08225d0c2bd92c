"""What every benchmark does with its figures: print them as a table, and write them as JSON if asked."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from helpers.receipt import collect_versions, describe_device, utc_now, write_json


def publish(
    question: str,
    columns: list[str],
    rows: list[list[str]],
    *,
    ratios: dict[str, float],
    setting: str,
    json_file: Path | None = None,
) -> None:
    """Print the table with its ratios, and write all of it to `json_file`.

    Args:
        question: what was asked, in one line.
        columns, rows: the table, figures with their units.
        ratios: what was compared to the ratio, above 1 where this project's way is better.
        setting: what is not in the table: the model, how many repetitions.
    """
    console = Console()
    console.print(f"{question}\n{setting}; {torch.get_num_threads()} threads, torch {torch.__version__}", markup=False)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.2f}x", markup=False)
    if json_file is not None:
        content = {"question": question, "setting": setting, "columns": columns, "rows": rows, "ratios": ratios}
        about = {"time_utc": utc_now(), "device": describe_device(), "versions": collect_versions()}
        write_json(json_file, content | about)
