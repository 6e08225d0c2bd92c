"""Every notebook runs headless on Nano, from any folder; what cannot run says why."""

import ast
import functools
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from rules import exercises

from helpers.characters.dialogues import load_dialogues
from helpers.cli.app import main
from helpers.network import port_is_free
from helpers.tools import runner
from helpers.tools.runner import NOTEBOOKS_DIR, find_notebooks

SMALL = {
    "02": {"MAX_USERS": 4},
    "04": {"EPOCHS": 0.3, "COMPARE": 4},
}  # parameters that shorten a run of every cell twice
NUMBERS = sorted(path.name[:2] for path in NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All notebooks, run once, in order, as `make run` does, but from a folder of their own: its outputs, what was printed."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "helpers", "run", "--model", "nano", "--output-dir", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return folder / "out", done.stdout + done.stderr


def test_the_run_as_a_whole_is_reported(run: tuple[Path, str]) -> None:
    outputs, printed = run
    report = json.loads((outputs / "run.json").read_text(encoding="utf-8"))
    assert report["status"] == "ok", printed
    assert [entry["notebook"][:2] for entry in report["notebooks"]] == NUMBERS
    assert printed.count("成功 ok") == len(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_notebook_runs_on_nano(run: tuple[Path, str], number: str) -> None:
    outputs, printed = run
    report = json.loads((outputs / "run.json").read_text(encoding="utf-8"))
    (result,) = (entry for entry in report["notebooks"] if entry["notebook"].startswith(number))
    assert (result["status"], result["receipt"]) == ("ok", f"receipt_{number}.json"), printed

    receipt = json.loads((outputs / result["receipt"]).read_text(encoding="utf-8"))
    assert receipt["notebook"] == number
    assert receipt["parameters"]["MODEL"] == "nano"
    assert receipt["versions"]["torch"]
    assert receipt["metrics"]

    executed = nbformat.read(outputs / result["executed"], as_version=4)
    assert "widgets" not in executed.metadata
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_plain_papermill_runs_a_notebook_from_any_folder(run_command, tmp_path: Path) -> None:
    (path,) = find_notebooks(["01"])
    done = run_command("-m", "papermill", str(path), "out.ipynb", "-p", "MODEL", "nano", "--no-progress-bar")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / "receipt_01.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", ["01", "02", "03"])  # 04 passes too, in nine minutes
def test_every_cell_runs_twice_and_every_solution_is_right(number: str, tmp_path: Path) -> None:
    """Readers run a cell again; an exercise is solved where it stands."""
    (path,) = find_notebooks([number])
    notebook = nbformat.read(path, as_version=4)
    solutions = {check: solution for solution, check in exercises(notebook)}
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            cells.append(nbformat.v4.new_code_cell(cell.source))
        if cell.source in solutions:
            solved = f"{solutions[cell.source]}\n{cell.source.partition(chr(10))[2]}"
            cells.append(nbformat.v4.new_code_cell(solved, metadata={"tags": ["solved"]}))
    notebook.cells = cells
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(notebook, folder / path.name)
    (result,) = runner.run_notebooks(
        [number], model="nano", parameters=SMALL.get(number), output_dir=tmp_path / "out", notebooks_dir=folder
    )
    assert result.status == "ok", result.failure
    executed = nbformat.read(tmp_path / "out" / result.executed, as_version=4).cells
    solved = [cell for cell in executed if "solved" in cell.metadata.get("tags", [])]
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in solved]
    assert len(said) == 4 and all(text.startswith("对") for text in said), said


INTERRUPT = """{imports}
import os, signal, threading
interrupt = threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGINT))
interrupt.start()
{source}
interrupt.cancel()"""


def imports(source: str) -> str:
    """The import lines of a cell: torch, interrupted while it is imported, needs a new kernel."""
    if source.startswith(("!", "%")):
        return ""
    lines = [line for line in source.splitlines() if not line.startswith("!")]
    found = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, found))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seconds"), [("01", 0.3), ("02", 1.0), ("03", 0.3), ("04", 3.0)])
def test_every_cell_can_be_interrupted_and_run_again(number: str, seconds: float, tmp_path: Path) -> None:
    """A reader who stops a cell that takes long, and runs it once more, gets to the end."""
    (path,) = find_notebooks([number])
    notebook = nbformat.read(path, as_version=4)
    values = {"MODEL": "nano", "OUTPUT_DIR": str(tmp_path / "out"), **SMALL.get(number, {})}
    cells = []
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
        elif cell.cell_type == "code" and not cell.source.startswith("%%"):
            stopped = INTERRUPT.format(seconds=seconds, source=cell.source, imports=imports(cell.source))
            cells.append(nbformat.v4.new_code_cell(stopped, metadata={"tags": ["raises-exception"]}))
        cells.append(cell)
    notebook.cells = cells
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    raised = [output.ename for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    # An `await` that is interrupted ends in CancelledError.
    assert raised and set(raised) <= {"KeyboardInterrupt", "CancelledError", "AssertionError"}, raised
    assert raised.count("AssertionError") <= 1, "only what checks a script that was stopped may say so"


@pytest.mark.slow
def test_fine_tuning_takes_the_data_of_other_people(tmp_path: Path) -> None:
    """A persona in every row, half of the rows too long, one conversation longer than MAX_LENGTH: said, not stopped by."""
    dialogues = [dialogue for dialogue in load_dialogues() if dialogue.card.bot_name in ("孙悟空", "林黛玉")]
    dialogues = dialogues[:: len(dialogues) // 80][:80]
    rows = [{"id": one.id, "session_meta": one.card.model_dump(), "history": one.history} for one in dialogues]
    rows += [row | {"id": f"{row['id']}-long", "history": [["说" * 2000, row["history"][0][1]]]} for row in rows]
    rows += [rows[0] | {"id": "many turns", "history": [["还有呢？", f"第{n}件事，听我慢慢说。"] for n in range(60)]}]
    data = tmp_path / "theirs.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    parameters = {"DATA": str(data), "CARD": "", "MAX_LENGTH": 256, "COMPARE": 2, "REPLAY": 0}
    (result,) = runner.run_notebooks(["04"], model="nano", parameters=parameters, output_dir=tmp_path / "out")
    assert result.status == "ok", result.failure
    cells = nbformat.read(tmp_path / "out" / result.executed, as_version=4).cells
    said = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert "太长 [too long] 80 行" in said
    assert "2 份人设" in said


@pytest.mark.slow
def test_a_failing_cell_leaves_no_server_behind(run_command, tmp_path: Path) -> None:
    """Notebook 02 with its port taken and a cell that fails right after the server has started."""
    notebook = nbformat.read(find_notebooks(["02"])[0], as_version=4)
    start = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("server = Server("))
    notebook.cells = [*notebook.cells[: start + 1], nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        parameters = ["-p", "MODEL", "nano", "-p", "MAX_USERS", "2", "-p", "PORT", str(taken), "--no-progress-bar"]
        done = run_command("-m", "papermill", "broken.ipynb", "out.ipynb", *parameters)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    outputs = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    said = "".join(output.get("text", "") for cell in outputs for output in cell.get("outputs", []))
    assert f"端口 {taken} 已被占用 [port in use]" in said
    port = int(re.search(r"http://127\.0\.0\.1:(\d+) ready", said)[1])
    assert port != taken
    deadline = time.monotonic() + 20
    while not port_is_free("127.0.0.1", port):
        assert time.monotonic() < deadline, "the server outlived its notebook"
        time.sleep(0.2)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `python -m helpers ...` in this process, in an empty folder: exit status and standard error."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["helpers", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return call


def test_unknown_parameter_is_refused_before_anything_runs(command, tmp_path: Path) -> None:
    code, said = command("run", "01", "--model", "nano", "-p", "OUTPUT_DIRR", "x")
    assert code == 1
    assert said.startswith("错误 [error]：") and said.count("\n") == 1
    assert "OUTPUT_DIRR" in said and "unknown parameter" in said
    assert list(tmp_path.iterdir()) == []


def test_failing_cell_is_shown_with_number_source_and_traceback(
    command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good_notebook: nbformat.NotebookNode
) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(good_notebook, folder / "01_small.ipynb")
    there = functools.partial(runner.run_notebooks, notebooks_dir=folder)
    monkeypatch.setattr(runner, "run_notebooks", there)
    code, said = command("run", "01", "--model", "nano", "-p", "STEPS", "0")
    assert code == 1
    assert "cell 4 failed" in said and "10 // STEPS" in said and "ZeroDivisionError" in said
    assert "\x1b[" not in said
    executed = nbformat.read(tmp_path / "outputs" / "01_small.ipynb", as_version=4)
    assert "ZeroDivisionError" in str(executed.cells)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "99"], 1, "notebook not found"),
        (["run", "-p", "STEPS"], 2, "'-p' requires 2 arguments"),
        (["run", "--no-such-option"], 2, "no-such-option"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_bad_usage_is_one_clear_message(command, arguments: list[str], code: int, message: str) -> None:
    found, said = command(*arguments)
    assert found == code
    assert message in said
