"""The runner: which notebooks, which parameters, what is reported, what goes to git."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from typer.testing import CliRunner

from helpers.cli.app import app
from helpers.cli.options import typed
from helpers.errors import HelpersError
from helpers.inspect.receipt import ReceiptError
from helpers.paths import PROJECT_DIR
from helpers.tools import runner
from helpers.tools.refresh import WIDGET_VIEW, PersonalPathError, refresh_notebooks, strip_for_git
from helpers.tools.runner import (
    InterpreterKernelManager,
    RunError,
    declared_parameters,
    find_notebooks,
    format_failure,
    plan_parameters,
    run_notebooks,
)


@pytest.fixture
def folder(tmp_path: Path, good_notebook: NotebookNode) -> Path:
    """A folder with notebooks 01 and 02; only 02 declares EXTRA."""
    folder = tmp_path / "notebooks {braces}"  # papermill formats paths
    folder.mkdir()
    nbformat.write(good_notebook, folder / "01_first.ipynb")
    good_notebook.cells[1].source += "\nEXTRA = 1.5  # only here"
    nbformat.write(good_notebook, folder / "02_second.ipynb")
    return folder


def test_find_notebooks_by_number(folder: Path) -> None:
    names = [path.name for path in find_notebooks(["2", "01", "02"], folder)]
    assert names == ["02_second.ipynb", "01_first.ipynb"]
    assert len(find_notebooks([], folder)) == 2


def test_unknown_notebook_names_the_choice(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="07.*01 02"):
        find_notebooks(["07"], folder)
    with pytest.raises(RunError, match="no notebooks found"):
        find_notebooks([], tmp_path)


def test_declared_parameters(folder: Path, tmp_path: Path) -> None:
    assert declared_parameters(folder / "02_second.ipynb") == ["MODEL", "OUTPUT_DIR", "STEPS", "EXTRA"]
    broken = tmp_path / "03_broken.ipynb"
    broken.write_text("{")
    with pytest.raises(RunError, match="03_broken"):
        declared_parameters(broken)


def plan(folder: Path, given: dict[str, Any], model: str = "nano") -> list[dict[str, Any]]:
    """The planned parameters of notebooks 01 and 02."""
    planned = plan_parameters(find_notebooks([], folder), given, model=model, output_dir=Path("out"))
    return list(planned.values())


def test_each_notebook_gets_only_what_it_declares(folder: Path) -> None:
    first, second = plan(folder, {"EXTRA": 2, "STEPS": 5})
    assert first == {"MODEL": "nano", "OUTPUT_DIR": "out", "STEPS": 5}
    assert second == first | {"EXTRA": 2}


def test_model_folder_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert plan(folder, {}, model=folder.name)[0]["MODEL"] == str(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"STEP": 5}, "STEP .*是不是 STEPS.*EXTRA STEPS"),
        ({"steps": 5}, "是不是 STEPS"),
        ({"QQQQ": 5}, "QQQQ .*可用参数"),
        ({"MODEL": "6b"}, "--model"),
        ({"OUTPUT_DIR": "x"}, "--output-dir"),
    ],
)
def test_parameters_nobody_declares_are_refused(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        plan(folder, given)


def test_not_a_number_is_refused(folder: Path) -> None:
    with pytest.raises(ReceiptError, match="STEPS"):
        plan(folder, {"STEPS": float("nan")})


def test_values_are_typed_as_papermill_types_them() -> None:
    pairs = [("A", "3"), ("B", "0.5"), ("C", "True"), ("D", "None"), ("E", "1e-4"), ("F", "nano"), ("G", "-1")]
    assert list(typed(pairs).values()) == [3, 0.5, True, None, 1e-4, "nano", -1]


def test_pairs_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(runner, "run_notebooks", lambda numbers, **options: seen.update(options, numbers=numbers) or [])
    assert CliRunner().invoke(app, ["run", "-p", "A", "-1", "01", "--parameter", "B", "x=y", "02"]).exit_code == 0
    assert (seen["numbers"], seen["parameters"]) == (["01", "02"], {"A": -1, "B": "x=y"})


def test_run_keeps_copies_and_a_report(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    results = run_notebooks([], model="nano", parameters={"STEPS": 5}, output_dir=output, notebooks_dir=folder)
    assert [result.status for result in results] == ["ok", "ok"]
    executed = nbformat.read(output / "01_first.ipynb", as_version=4)
    assert executed.cells[3].outputs[0].text == f"nano {output}\n"
    assert executed.cells[4].outputs[0].data["text/plain"] == "2"
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert report["status"] == "ok"
    assert [entry["notebook"] for entry in report["notebooks"]] == ["01_first.ipynb", "02_second.ipynb"]
    assert report["notebooks"][0]["receipt"] is None


def test_failure_stops_the_run_and_names_the_cell(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    results = run_notebooks([], model="nano", parameters={"STEPS": 0}, output_dir=output, notebooks_dir=folder)
    assert [result.status for result in results] == ["failed", "not run"]
    failure = results[0].failure
    assert (failure.cell, failure.source) == (4, "10 // STEPS")
    assert failure.error.startswith("ZeroDivisionError")
    assert "\x1b" not in format_failure(results[0])
    assert (output / "01_first.ipynb").exists()
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_dead_kernel_is_a_failure_of_its_cell(folder: Path, tmp_path: Path, good_notebook: NotebookNode) -> None:
    good_notebook.cells[3].source = "import os; os._exit(9)"
    nbformat.write(good_notebook, folder / "01_first.ipynb")
    (result,) = run_notebooks(["01"], output_dir=tmp_path / "out", notebooks_dir=folder)
    assert (result.status, result.failure.cell) == ("failed", 4)
    assert "kernel died" in result.failure.error


def test_kernel_that_never_starts_is_no_failure_of_a_cell(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = KernelSpec(argv=["/bin/false", "{connection_file}"], display_name="x", language="python")
    monkeypatch.setattr(InterpreterKernelManager, "kernel_spec", broken)
    (result,) = run_notebooks(["01"], output_dir=tmp_path / "out", notebooks_dir=folder)
    assert (result.status, result.failure.cell) == ("failed", 0)
    assert "kernel did not start" in format_failure(result)
    assert "cell 0" not in format_failure(result)


def test_only_a_receipt_of_this_run_counts(folder: Path, tmp_path: Path, good_notebook: NotebookNode) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "receipt_01.json").write_text("{}")
    (old,) = run_notebooks(["01"], output_dir=output, notebooks_dir=folder)
    good_notebook.cells[3].source = "open(f'{OUTPUT_DIR}/receipt_01.json', 'w').write('{}')"
    nbformat.write(good_notebook, folder / "01_first.ipynb")
    (new,) = run_notebooks(["01"], output_dir=output, notebooks_dir=folder)
    assert (old.receipt, new.receipt) == (None, "receipt_01.json")


def test_notebooks_are_never_overwritten_by_a_run(folder: Path) -> None:
    with pytest.raises(RunError, match="overwrite"):
        run_notebooks([], output_dir=folder, notebooks_dir=folder)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    done = CliRunner().invoke(app, ["run", "01", "--model", "nano", "--output-dir", str(tmp_path / place)])
    assert isinstance(done.exception, HelpersError)  # main() prints it
    assert "[output directory not writable]" in str(done.exception) and "\n" not in str(done.exception)
    assert (tmp_path / "file").read_text() == "mine"


def run_like_papermill(notebook: NotebookNode) -> NotebookNode:
    """The notebook with everything that a run leaves behind."""
    notebook.metadata.papermill = {"input_path": "x"}
    notebook.metadata.widgets = {"state": {}}
    notebook.metadata.language_info.version = "3.11.7"
    notebook.cells.insert(2, new_code_cell("STEPS = 5", metadata={"tags": ["injected-parameters"]}))
    notebook.cells.insert(0, new_markdown_cell("An Exception", metadata={"tags": ["papermill-error-cell-tag"]}))
    for cell in notebook.cells:
        cell.metadata.update(papermill={"duration": 1}, execution={"iopub.status.busy": "10:00"})
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=3):
        cell.execution_count = count
    return notebook


def test_strip_for_git_leaves_no_trace_of_the_run(good_notebook: NotebookNode) -> None:
    executed = run_like_papermill(good_notebook)
    code = executed.cells[-2]
    code.outputs[0].data[WIDGET_VIEW] = {"model_id": "1"}
    code.outputs.append(new_output("stream", text=f"wrote {PROJECT_DIR}/outputs/x.png in {PROJECT_DIR}\n"))
    code.outputs.append(new_output("display_data", data={WIDGET_VIEW: {"model_id": "2"}, "text/plain": "0%|  | 0/31"}))
    code.outputs.append(new_output("display_data", data={"image/png": "aGk="}))
    cleaned = strip_for_git(executed)

    assert [cell.cell_type for cell in cleaned.cells] == ["markdown", "code", "code", "code", "markdown"]
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    assert [dict(cell.metadata) for cell in cleaned.cells] == [{}, {"tags": ["parameters"]}, {}, {}, {}]
    assert [cell.execution_count for cell in cleaned.cells[1:4]] == [1, 2, 3]
    result, stream, picture = cleaned.cells[3].outputs
    assert result.execution_count == 3
    assert dict(result.data) == {"text/plain": "3"}
    assert stream.text == "wrote outputs/x.png in .\n"
    assert picture.data["image/png"] == "aGk="


def test_strip_for_git_is_deterministic(good_notebook: NotebookNode) -> None:
    good_notebook.cells += [new_markdown_cell("twice"), new_markdown_cell("twice")]
    first = strip_for_git(good_notebook)
    for cell in good_notebook.cells:
        cell.id = "x" + cell.id
    assert nbformat.writes(strip_for_git(good_notebook)) == nbformat.writes(first)
    assert nbformat.writes(strip_for_git(first)) == nbformat.writes(first)
    assert len({cell.id for cell in first.cells}) == len(first.cells)


@pytest.mark.parametrize("path", [("", "home", "alice", "x"), ("", "tmp", "ipykernel_17", "1.py")])
def test_strip_for_git_refuses_a_personal_path(good_notebook: NotebookNode, path: tuple[str, ...]) -> None:
    good_notebook.cells[2].outputs[0].text = "see " + "/".join(path)
    with pytest.raises(PersonalPathError, match=path[1]):
        strip_for_git(good_notebook)


def test_autodl_paths_may_stay(good_notebook: NotebookNode) -> None:
    good_notebook.cells[2].outputs[0].text = "/root/autodl-tmp/CharacterGLM-6B"
    assert strip_for_git(good_notebook).cells[2].outputs[0].text == "/root/autodl-tmp/CharacterGLM-6B"


def test_refresh_writes_only_after_a_clean_run(folder: Path, tmp_path: Path, good_notebook: NotebookNode) -> None:
    good_notebook.cells[2].source = "print(MODEL, bool(OUTPUT_DIR))"
    nbformat.write(good_notebook, folder / "01_first.ipynb")
    refresh_notebooks(["01"], output_dir=tmp_path / "out", notebooks_dir=folder)
    refreshed = nbformat.read(folder / "01_first.ipynb", as_version=4)
    assert refreshed.cells[2].outputs[0].text == "nano True\n"

    refreshed.cells[3].source = "1 / 0"
    nbformat.write(refreshed, folder / "01_first.ipynb")
    before = (folder / "01_first.ipynb").read_bytes()
    (result,) = refresh_notebooks(["01"], output_dir=tmp_path / "out", notebooks_dir=folder)
    assert result.status == "failed"
    assert (folder / "01_first.ipynb").read_bytes() == before
