"""Runs the notebooks headless with papermill: checked parameters, progress, executed copies, one report."""

import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill import execute_notebook, inspect_notebook
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from ..errors import HelpersError, did_you_mean
from ..inspect.receipt import checked, collect_versions, receipt_path, utc_now
from ..paths import PROJECT_DIR, make_writable_folder, write_json

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"
START_TIMEOUT_SECONDS = 120
ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
STATUS_TEXT = {"ok": "成功 ok", "failed": "失败 failed", "not run": "未运行 not run"}


class RunError(HelpersError):
    """The notebooks cannot be run as asked; nothing has been started."""


@dataclass
class Failure:
    """Where and how a notebook failed; `cell` counts the cells of the notebook in git from 1, 0: the kernel never started."""

    cell: int
    source: str
    error: str
    traceback: str = ""
    execution_count: int | None = None


@dataclass
class Result:
    """What became of one notebook: "ok", "failed" or "not run"; files are named within the output folder."""

    notebook: str
    status: str = "not run"
    seconds: float = 0.0
    parameters: dict[str, Any] = field(default_factory=dict)
    executed: str | None = None
    receipt: str | None = None
    failure: Failure | None = None


class InterpreterKernelManager(AsyncKernelManager):
    """Starts the kernel in the running interpreter, whatever "python3" kernels Jupyter knows of."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The specification of this interpreter's own ipykernel, less its log: it reports every normal end."""
        spec = KernelSpec(**get_kernel_dict())
        spec.argv = [*spec.argv, "--log-level=CRITICAL"]
        return spec


def run_notebooks(
    numbers: list[str],
    *,
    model: str = "auto",
    parameters: dict[str, Any] | None = None,
    output_dir: str | Path = "outputs",
    notebooks_dir: Path = NOTEBOOKS_DIR,
) -> list[Result]:
    """Run the notebooks with these numbers (all if empty), in order, stopping after the first that fails.

    Executed copies and `run.json` go to `output_dir`, which the notebooks get as OUTPUT_DIR. The working directory is
    the caller's, as with papermill itself.

    Raises:
        HelpersError: an unknown notebook or parameter, or a folder that cannot be written. Nothing has been started.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir == Path(notebooks_dir).resolve():
        raise RunError("输出会覆盖原件 [output would overwrite the notebooks]：请换一个 --output-dir")
    plan = plan_parameters(find_notebooks(numbers, notebooks_dir), parameters or {}, model=model, output_dir=output_dir)
    make_writable_folder(output_dir)
    results = [Result(path.name, parameters=values) for path, values in plan.items()]
    report = {"started_utc": utc_now(), "finished_utc": None, "status": "running", "model": model}
    report["versions"] = collect_versions()
    for path, result in zip(plan, results):
        run_one(path, result, output_dir)
        if result.status == "failed" or result is results[-1]:
            report["status"] = result.status
        report |= {"finished_utc": utc_now(), "notebooks": [asdict(result) for result in results]}
        write_json(output_dir / "run.json", report)
        if result.status == "failed":
            break
    return results


def find_notebooks(numbers: list[str], notebooks_dir: Path = NOTEBOOKS_DIR) -> list[Path]:
    """Paths of the notebooks with these numbers ("01" or "1"), each once, in the order given; empty: all."""
    known = {path.name[:2]: path for path in sorted(Path(notebooks_dir).glob("[0-9][0-9]_*.ipynb"))}
    if not known:
        raise RunError(f"目录里没有 notebook [no notebooks found]：{notebooks_dir}")
    wanted = list(dict.fromkeys(number.zfill(2) for number in numbers)) or list(known)
    for number in wanted:
        if number not in known:
            raise RunError(f"找不到 notebook {number} [notebook not found]：可选 {' '.join(known)}")
    return [known[number] for number in wanted]


def declared_parameters(path: Path) -> list[str]:
    """Names that the notebook's `parameters` cell declares, as papermill's own inspector reads them."""
    try:
        return list(inspect_notebook(_papermill_path(path)))
    except ValueError as error:
        raise RunError(f"无法读取 notebook [cannot read notebook]：{path.name}：{error}") from error


def _papermill_path(path: Path) -> str:
    # papermill takes a path for a format string.
    return str(path).replace("{", "{{").replace("}", "}}")


def plan_parameters(
    notebooks: list[Path], given: dict[str, Any], *, model: str, output_dir: Path
) -> dict[Path, dict[str, Any]]:
    """The parameters each notebook gets: of MODEL, OUTPUT_DIR and `given` those that it declares.

    Raises RunError for a name that none of the notebooks declares, ReceiptError for NaN and infinity.
    """
    for name, option in (("MODEL", "--model"), ("OUTPUT_DIR", "--output-dir")):
        if name in given:
            raise RunError(f"{name} 请用 {option} 给出 [use {option}]")
    declared = {path: declared_parameters(path) for path in notebooks}
    check_known(given, sorted(set().union(*declared.values()) - {"MODEL", "OUTPUT_DIR"}))
    checked(given, "-p")
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    values = {"MODEL": model, "OUTPUT_DIR": str(output_dir)} | given
    return {path: {n: value for n, value in values.items() if n in declared[path]} for path in notebooks}


def check_known(given: dict[str, Any], known: list[str]) -> None:
    """Raise RunError for names that are not known, with the closest known name: papermill would only warn."""
    if unknown := [name for name in given if name not in known]:
        names, choice = "、".join(unknown), " ".join(known) or "无 none"
        hint = did_you_mean(unknown[0].upper(), known)
        raise RunError(f"未知参数 {names} [unknown parameter]：{hint}可用参数 [known]：{choice}")


class CurrentCell:
    """Which cell runs, by its number in the notebook in git; where no bar can be drawn, a line for each code cell."""

    def __init__(self, path: Path) -> None:
        self.name, self.cells = path.name, nbformat.read(path, as_version=4).cells
        # By id: papermill's injected cell, which is not in git, moves the others down.
        self.numbers = {cell.id: number for number, cell in enumerate(self.cells, start=1)}
        self.number, self.started = 0, time.monotonic()

    def on_cell_start(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """nbclient's hook: called before every cell, text cells included."""
        self.number = self.numbers.get(cell.id, self.number)
        if cell.id in self.numbers and cell.cell_type == "code" and not sys.stdout.isatty():
            seconds = time.monotonic() - self.started
            print(f"{self.name}  单元格 cell {self.number}/{len(self.cells)}  {seconds:.1f} s", flush=True)

    def died(self, error: RuntimeError) -> Failure:
        """A kernel that ended leaves no traceback; the cell it was in is the one to look at."""
        if not self.number:
            return Failure(0, "", f"内核没有启动 [kernel did not start]：{error}。请检查 127.0.0.1 能否连接，再重试")
        why = f"内核退出了 [kernel died]：{error}。常见原因是内存或显存不足 [out of memory]"
        return Failure(self.number, self.cells[self.number - 1].source, why)


def run_one(path: Path, result: Result, output_dir: Path) -> None:
    """Execute one notebook into `output_dir` and fill in its result; a failure is recorded, not raised."""
    receipt = receipt_path(output_dir, path.name)
    before = _fingerprint(receipt)
    current = CurrentCell(path)
    result.executed = path.name
    try:
        _execute(path, output_dir / path.name, result.parameters, current)
    except PapermillExecutionError as error:
        traceback = ANSI_ESCAPE.sub("", "\n".join(error.traceback))
        what = f"{error.ename}: {error.evalue}"
        result.failure = Failure(current.number, error.source, what, traceback, error.exec_count)
    except RuntimeError as error:  # nbclient: the kernel died or never started
        result.failure = current.died(error)
    result.status = "failed" if result.failure else "ok"
    result.seconds = round(time.monotonic() - current.started, 1)
    result.receipt = receipt.name if _fingerprint(receipt) != before else None


def _execute(path: Path, copy: Path, parameters: dict[str, Any], current: CurrentCell) -> None:
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # no debugger warning, as papermill's CLI
    execute_notebook(
        _papermill_path(path),
        _papermill_path(copy),
        parameters,
        kernel_name="python3",
        language="python",
        progress_bar={"desc": path.name} if sys.stdout.isatty() else False,
        log_output=False,
        start_timeout=START_TIMEOUT_SECONDS,
        # The rest goes to nbclient. Widget state would make a copy ten times as large and is of no use in it.
        store_widget_state=False,
        coalesce_streams=True,  # a streamed reply is one output, not one a token
        kernel_manager_class=InterpreterKernelManager,
        on_cell_start=current.on_cell_start,
    )


def _fingerprint(file: Path) -> tuple[int, int] | None:
    # Tells a receipt of this run from one that an earlier run left.
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None


def print_summary(results: list[Result], output_dir: str | Path) -> None:
    """A table of the notebooks, then, if one failed, its cell, source and traceback on standard error."""
    columns = ("notebook", "秒 seconds", "状态 status", "收据 receipt")
    table = Table(*columns, title=f"输出 outputs: {output_dir}")
    for result in results:
        seconds = f"{result.seconds:.1f}" if result.status != "not run" else "-"
        table.add_row(result.notebook, seconds, STATUS_TEXT[result.status], result.receipt or "-")
    Console().print(table)
    for result in results:
        if result.failure:
            print(format_failure(result), file=sys.stderr)


def format_failure(result: Result) -> str:
    """The failure as plain text: cell number, what went wrong, the cell's source, the traceback."""
    failure = result.failure
    if not failure.cell:
        return f"{result.notebook}：{failure.error}"
    count = f", In [{failure.execution_count}]" if failure.execution_count else ""
    text = f"{result.notebook} 的第 {failure.cell} 个单元格出错 [cell {failure.cell} failed{count}]\n{failure.error}\n"
    text += f"---- 单元格源码 [source] ----\n{failure.source}"
    return text + (f"\n---- 错误回溯 [traceback] ----\n{failure.traceback}" if failure.traceback else "")
