"""Brings the outputs kept in git up to date: runs the notebooks on Nano and cleans the executed copies."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from ..errors import HelpersError
from ..paths import PROJECT_DIR
from .runner import NOTEBOOKS_DIR, Result, run_notebooks

# Somebody's home, a kernel's scratch folder or a Windows drive. AutoDL's data disks are the same for all.
PERSONAL_PATH = re.compile(
    r"(?<![\w.~-])/(?:root/(?!autodl-(?:tmp|fs|pub)\b)|home/|Users/|tmp/ipykernel_)[^\s'\"]*"
    r"|\b[A-Z]:\\\w[^\s'\"]*"
)
KEPT_CELL_METADATA = {"tags", "jupyter", "editable", "deletable"}
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class PersonalPathError(HelpersError, ValueError):
    """An output still shows an absolute path of the machine it was made on."""


def refresh_notebooks(
    numbers: list[str], *, output_dir: str | Path = "outputs", notebooks_dir: Path = NOTEBOOKS_DIR
) -> list[Result]:
    """Run the notebooks on Nano; if all succeed, write their cleaned copies over those in `notebooks_dir`."""
    results = run_notebooks(numbers, model="nano", output_dir=output_dir, notebooks_dir=notebooks_dir)
    if all(result.status == "ok" for result in results):
        cleaned = {
            result.notebook: strip_for_git(nbformat.read(Path(output_dir) / result.executed, as_version=4))
            for result in results
        }
        for name, notebook in cleaned.items():
            nbformat.write(notebook, Path(notebooks_dir) / name)
    return results


def strip_for_git(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook that is the same whoever ran it, wherever and whenever.

    Removed: the injected parameters and error markers, all metadata of papermill, widgets and timing. Paths
    below the project become relative; PersonalPathError if another one is left. Execution counts run from 1
    without gaps, cell ids follow from the source.
    """
    cells = [_clean_cell(cell) for cell in notebook.cells if not _is_injected(cell)]
    _renumber(cells)
    _set_ids(cells)
    metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    cleaned = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    cleaned.nbformat_minor = 5
    nbformat.validate(cleaned)
    return cleaned


def _is_injected(cell: NotebookNode) -> bool:
    return bool({"injected-parameters", "papermill-error-cell-tag"} & set(cell.metadata.get("tags", [])))


def _clean_cell(cell: NotebookNode) -> NotebookNode:
    cell = NotebookNode(cell)
    # papermill puts an empty list of tags on every cell.
    cell.metadata = {k: value for k, value in cell.metadata.items() if k in KEPT_CELL_METADATA and value != []}
    if cell.cell_type == "code":
        cell.outputs = [_clean_output(output) for output in cell.outputs]
    return cell


def _clean_output(output: NotebookNode) -> NotebookNode:
    output = nbformat.from_dict(_map_text(output, _relative_paths))
    # Without its state a widget view shows as an error; the text or HTML beside it stays.
    output.get("data", {}).pop(WIDGET_VIEW, None)
    _map_text(output, _refuse_personal_path)
    return output


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed; pictures are left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {key: item if _is_picture(key) else _map_text(item, change) for key, item in value.items()}
    return value


def _is_picture(key: str) -> bool:
    return key.startswith("image/") and key != "image/svg+xml"


def _relative_paths(text: str) -> str:
    return text.replace(f"{PROJECT_DIR}/", "").replace(str(PROJECT_DIR), ".")


def _refuse_personal_path(text: str) -> str:
    found = PERSONAL_PATH.search(text) or re.search(rf"{re.escape(str(Path.home()))}/(?!autodl-)\S*", text)
    if found:
        raise PersonalPathError(
            f"输出里有这台机器的路径 [personal path in an output]：{found[0]}。请让 notebook 显示相对路径"
        )
    return text


def _renumber(cells: list[NotebookNode]) -> None:
    """Execution counts 1, 2, 3 ... : the removed cells left gaps."""
    code_cells = (cell for cell in cells if cell.cell_type == "code")
    for count, cell in enumerate(code_cells, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def _set_ids(cells: list[NotebookNode]) -> None:
    """Ids from kind and source, so that a run changes none and an edit changes one."""
    seen: Counter[str] = Counter()
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell.id = f"{digest}-{seen[digest]}" if seen[digest] else digest
        seen[digest] += 1
