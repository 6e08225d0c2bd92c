"""Every notebook runs headless on Nano, from any folder; what cannot run says why."""

import json
import re
import socket
import sys
import time
from pathlib import Path

import nbformat
import pytest

from helpers.network import port_is_free
from helpers.tools.runner import NOTEBOOKS_DIR, find_notebooks

NUMBERS = sorted(path.name[:2] for path in NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_notebook_runs_on_nano(run_command, tmp_path: Path, number: str) -> None:
    done = run_command("-m", "helpers", "run", number, "--model", "nano", "--output-dir", "out")
    assert done.returncode == 0, done.stdout + done.stderr

    receipt = json.loads((tmp_path / "out" / f"receipt_{number}.json").read_text(encoding="utf-8"))
    assert receipt["notebook"] == number
    assert receipt["parameters"]["MODEL"] == "nano"
    assert receipt["versions"]["torch"]
    assert receipt["metrics"]

    report = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    (result,) = report["notebooks"]
    assert (report["status"], result["status"], result["receipt"]) == ("ok", "ok", f"receipt_{number}.json")

    executed = nbformat.read(tmp_path / "out" / result["executed"], as_version=4)
    assert "widgets" not in executed.metadata
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_plain_papermill_runs_a_notebook_from_any_folder(run_command, tmp_path: Path) -> None:
    (path,) = find_notebooks(["01"])
    done = run_command("-m", "papermill", str(path), "out.ipynb", "-p", "MODEL", "nano", "--no-progress-bar")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / "receipt_01.json").exists()


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


def test_unknown_parameter_is_refused_before_anything_runs(run_command, tmp_path: Path) -> None:
    done = run_command("-m", "helpers", "run", "01", "--model", "nano", "-p", "OUTPUT_DIRR", "x")
    assert done.returncode == 1
    assert "OUTPUT_DIRR" in done.stderr
    assert "unknown parameter" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_failing_cell_is_shown_with_number_source_and_traceback(
    run_command, tmp_path: Path, good_notebook: nbformat.NotebookNode
) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(good_notebook, folder / "01_small.ipynb")
    # The command line with another folder of notebooks than the project's.
    script = (
        "import functools, sys; from pathlib import Path; from helpers import runner; from helpers.cli.app import main;"
        "runner.run_notebooks = functools.partial(runner.run_notebooks, notebooks_dir=Path('notebooks')); main()"
    )
    done = run_command("-c", script, "run", "01", "--model", "nano", "-p", "STEPS", "0")
    assert done.returncode == 1
    assert "cell 4 failed" in done.stderr
    assert "10 // STEPS" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "\x1b[" not in done.stderr
    executed = nbformat.read(tmp_path / "outputs" / "01_small.ipynb", as_version=4)
    assert "ZeroDivisionError" in str(executed.cells)
    assert sys.executable not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "99"], 1, "notebook not found"),
        (["run", "-p", "STEPS"], 2, "-p NAME VALUE"),
        (["run", "--no-such-option"], 2, "no-such-option"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_bad_usage_is_one_clear_message(run_command, arguments: list[str], code: int, message: str) -> None:
    done = run_command("-m", "helpers", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
