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
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import HelpersError, did_you_mean
from ..inspect.receipt import checked, collect_versions, receipt_path, utc_now
from ..paths import PROJECT_DIR, write_json

NOTEBOOKS_DIR = PROJECT_DIR / "notebooks"
START_TIMEOUT_SECONDS = 120
ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
STATUS_TEXT = {"ok": "成功 ok", "failed": "失败 failed", "not run": "未运行 not run"}


class RunError(HelpersError):
    """The notebooks cannot be run as asked; nothing has been started."""


@dataclass
class Failure:
    """Where and how a notebook failed; `cell` counts the cells of the notebook in git from 1."""

    cell: int
    execution_count: int | None
    source: str
    error: str
    traceback: str


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

    Executed copies and `run.json` go to `output_dir`, which the notebooks get as OUTPUT_DIR. The working
    directory is the caller's, as with papermill itself. Raises RunError, before anything starts, for an
    unknown notebook or parameter.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir == Path(notebooks_dir).resolve():
        raise RunError("输出会覆盖原件 [output would overwrite the notebooks]：请换一个 --output-dir")
    notebooks = find_notebooks(numbers, notebooks_dir)
    plan = plan_parameters(notebooks, parameters or {}, model=model, output_dir=output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = [Result(path.name, parameters=plan[path]) for path in notebooks]
    started = utc_now()
    for path, result in zip(notebooks, results, strict=True):
        run_one(path, result, output_dir)
        write_report(output_dir, started, model, results)
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
    refuse_unknown(given, sorted(set().union(*declared.values()) - {"MODEL", "OUTPUT_DIR"}))
    checked(given, "-p")
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    values = {"MODEL": model, "OUTPUT_DIR": str(output_dir)} | given
    return {path: {n: value for n, value in values.items() if n in declared[path]} for path in notebooks}


def refuse_unknown(given: dict[str, Any], known: list[str]) -> None:
    """Raise RunError for names that are not known, with the closest known name: papermill would only warn."""
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    hint, names, choice = did_you_mean(unknown[0].upper(), known), "、".join(unknown), " ".join(known) or "无 none"
    raise RunError(f"未知参数 {names} [unknown parameter]：{hint}可用参数 [known]：{choice}")


def parse_parameters(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Values typed as on papermill's command line: "True", "None", "3", "0.5" become what they look like."""
    from papermill.cli import _resolve_type

    return {name: _resolve_type(value) for name, value in pairs}


class CellProgress:
    """Shows the running cell as n/m: a live bar on a terminal, one line per code cell elsewhere."""

    def __init__(self, notebook: str, cells: int, injected_at: int | None, console: Console) -> None:
        self.notebook, self.cells, self.injected_at, self.console = notebook, cells, injected_at, console
        self.current = 0
        self.started = time.monotonic()
        name, cell = TextColumn("{task.description}"), TextColumn("{task.fields[cell]}")
        columns = (SpinnerColumn(), name, BarColumn(), cell, TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(notebook, total=cells, cell="")

    def position(self, cell_index: int) -> int:
        """The cell's number in the notebook in git, which lacks the cell that papermill injects."""
        return cell_index + (self.injected_at is None or cell_index < self.injected_at)

    def on_cell_start(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """nbclient's hook: called before every cell, text cells included."""
        if cell_index == self.injected_at:
            return
        self.current = self.position(cell_index)
        label = f"单元格 cell {self.current}/{self.cells}"
        self.bar.update(self.task, completed=self.current - 1, cell=label)
        if not self.console.is_terminal and cell.cell_type == "code":
            elapsed = time.monotonic() - self.started
            print(f"{self.notebook}  {label}  {elapsed:.1f} s", flush=True)

    def finish(self) -> None:
        """Fill the bar: the last cell has ended."""
        self.bar.update(self.task, completed=self.cells)


def run_one(path: Path, result: Result, output_dir: Path) -> None:
    """Execute one notebook into `output_dir` and fill in its result; a failure is recorded, not raised."""
    receipt = receipt_path(output_dir, path.name)
    before = _fingerprint(receipt)
    started = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    progress = CellProgress(path.name, len(notebook.cells), _injection_index(notebook, result), Console())
    result.executed = path.name
    try:
        with progress.bar:
            _execute(path, output_dir / path.name, result.parameters, progress)
            progress.finish()
        result.status = "ok"
    except PapermillExecutionError as error:
        result.failure = describe_failure(error, progress)
    except RuntimeError as error:  # nbclient: the kernel died or never started
        result.failure = describe_dead_kernel(error, notebook, progress)
    if result.failure:
        result.status = "failed"
    result.seconds = round(time.monotonic() - started, 1)
    result.receipt = receipt.name if _fingerprint(receipt) != before else None


def _execute(path: Path, copy: Path, parameters: dict[str, Any], progress: CellProgress) -> None:
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # no debugger warning, as papermill's CLI
    execute_notebook(
        _papermill_path(path),
        _papermill_path(copy),
        parameters,
        kernel_name="python3",
        language="python",
        progress_bar=False,
        log_output=False,
        start_timeout=START_TIMEOUT_SECONDS,
        # The rest goes to nbclient. Widget state would make a copy ten times as large and is of no use in it.
        store_widget_state=False,
        kernel_manager_class=InterpreterKernelManager,
        on_cell_start=progress.on_cell_start,
    )


def _injection_index(notebook: nbformat.NotebookNode, result: Result) -> int | None:
    tagged = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    return next(tagged, -1) + 1 if result.parameters else None


def _fingerprint(file: Path) -> tuple[int, int] | None:
    # Tells a receipt of this run from one that an earlier run left.
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None


def describe_failure(error: PapermillExecutionError, progress: CellProgress) -> Failure:
    """The failing cell of an executed notebook, its traceback without colour codes."""
    return Failure(
        cell=progress.position(error.cell_index),
        execution_count=error.exec_count,
        source=error.source,
        error=f"{error.ename}: {error.evalue}",
        traceback=ANSI_ESCAPE.sub("", "\n".join(error.traceback)),
    )


def describe_dead_kernel(error: RuntimeError, notebook: nbformat.NotebookNode, progress: CellProgress) -> Failure:
    """A kernel that ended leaves no traceback; the cell it was in is the one to look at (0: it never started)."""
    cell = progress.current
    if not cell:
        why = f"内核没有启动 [kernel did not start]：{error}。请检查 127.0.0.1 能否连接，再重试"
        return Failure(cell=0, execution_count=None, source="", error=why, traceback="")
    why = f"内核退出了 [kernel died]：{error}。常见原因是内存或显存不足 [out of memory]"
    return Failure(cell, execution_count=None, source=notebook.cells[cell - 1].source, error=why, traceback="")


def write_report(output_dir: Path, started: str, model: str, results: list[Result]) -> Path:
    """Write `run.json`: what ran, with which parameters, how long, and how it ended."""
    failed = any(result.status == "failed" for result in results)
    done = all(result.status == "ok" for result in results)
    report = {
        "started_utc": started,
        "finished_utc": utc_now(),
        "status": "failed" if failed else "ok" if done else "running",
        "model": model,
        "versions": collect_versions(),
        "notebooks": [asdict(result) for result in results],
    }
    return write_json(output_dir / "run.json", report)


def print_summary(results: list[Result], output_dir: str | Path) -> None:
    """A table of the notebooks, then, if one failed, its cell, source and traceback on standard error."""
    columns = ("notebook", "秒 seconds", "状态 status", "回执 receipt")
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
    lines = [
        f"{result.notebook} 的第 {failure.cell} 个单元格出错 [cell {failure.cell} failed{count}]",
        failure.error,
        "---- 单元格源码 [source] ----",
        failure.source,
    ]
    if failure.traceback:
        lines += ["---- 错误回溯 [traceback] ----", failure.traceback]
    return "\n".join(lines)
