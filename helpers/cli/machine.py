"""The machine: is it ready, what does an error mean, fetching the model."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import HelpersError
from .options import ModelName


def doctor(
    model: ModelName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="给程序读的输出 [for programs]")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="FILE", help="解释一段报错，- 表示标准输入 [explain a traceback]")
    ] = None,
) -> None:
    """检查这台机器能不能运行 [preflight]，或解释一段报错；有问题、或不认识这段报错时退出码为 1"""
    if explain is not None:
        raise typer.Exit(_explain(explain, as_json))
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..tools.doctor import examine

    checks = examine(model)
    if as_json:
        _print_json([{"name": c.name, "found": c.found, "ok": c.ok, "advice": c.advice} for c in checks])
    else:
        table = Table("项目", "现状", "结论")
        for check in checks:
            table.add_row(check.name, escape(check.found), escape(check.advice or "OK"))
        Console().print(table)
    raise typer.Exit(int(not all(check.ok for check in checks)))


def _explain(file: str, as_json: bool) -> int:
    from dataclasses import asdict

    from ..tools.faults import explain

    try:
        found = explain(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise HelpersError(f"读不了 {file} [cannot read]：{error.strerror}") from None
    if as_json:
        _print_json([asdict(error) for error in found])
    elif found:
        print("\n\n".join(map(str, found)))
    else:
        print("不认识这段报错 [unknown error]：请运行 python -m helpers doctor，看看环境哪里不对")
    return int(not found)


def _print_json(content) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))


def download(
    local_dir: Annotated[str | None, typer.Option(help="放到哪里，默认数据盘或 ./models [target folder]")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="逐字节校验已有的文件，坏的重新下载 [check every byte]")
    ] = False,
) -> None:
    """从 ModelScope 下载 CharacterGLM-6B，约 12.5 GB [download the 6B model]"""
    from ..model.download import download_model

    download_model(local_dir=local_dir, verify=verify)
