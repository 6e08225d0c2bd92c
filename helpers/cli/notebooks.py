"""The notebooks: run them, renew their stored outputs, compare two receipts."""

import sys
from typing import Annotated

import typer

from .options import PAIR, ModelName, Pairs, typed

Numbers = Annotated[list[str] | None, typer.Argument(metavar="[01 02 ...]", help="notebook 编号，默认全部 [all]")]
OutputDir = Annotated[str, typer.Option(help="已执行的 notebook、收据和 run.json 的目录 [where outputs go]")]
Receipt = Annotated[str, typer.Argument(help="receipt_NN.json")]


def run(
    notebooks: Numbers = None,
    model: ModelName = "auto",
    parameter: Annotated[
        Pairs, typer.Option("--parameter", "-p", **PAIR, help="notebook 参数，可重复 [repeatable]")
    ] = None,
    output_dir: OutputDir = "outputs",
) -> None:
    """无界面运行 notebook [run the notebooks headless]"""
    from ..tools.runner import run_notebooks

    results = run_notebooks(notebooks or [], model=model, parameters=typed(parameter), output_dir=output_dir)
    _finish(results, output_dir)


def refresh(notebooks: Numbers = None, output_dir: OutputDir = "outputs") -> None:
    """在 Nano 上重跑并更新 git 里的输出 [renew the outputs kept in git]"""
    from ..tools.refresh import refresh_notebooks

    _finish(refresh_notebooks(notebooks or [], output_dir=output_dir), output_dir)


def _finish(results: list, output_dir: str) -> None:
    from ..tools.runner import print_summary

    print_summary(results, output_dir)
    raise typer.Exit(int(any(result.status != "ok" for result in results)))


def receipt(first: Receipt, second: Receipt) -> None:
    """比较两份收据，说出哪里不同 [compare two receipts]；相同时退出码为 0，不同为 1，读不了为 2。秒数和内存只显示，不算不同"""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..inspect.receipt import SECTIONS, ReceiptError, compare_receipts, is_measurement

    try:
        differences = compare_receipts(first, second)
    except ReceiptError as error:
        print(f"错误 [error]：{error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if differences:
        table = Table("部分", "名称", escape(first), escape(second))
        for section, *texts in differences:
            table.add_row(SECTIONS[section], *map(escape, texts))
        Console().print(table)
    count = sum(not is_measurement(section, name) for section, name, *_ in differences)
    print(f"{count} 处不同 [{count} differences]，另有 {len(differences) - count} 个测量值不同")
    raise typer.Exit(int(count > 0))
