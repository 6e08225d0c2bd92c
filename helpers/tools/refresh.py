"""Brings the outputs kept in git up to date: runs the notebooks on Nano and cleans the executed copies."""

import hashlib
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path

import nbformat
from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode

from ..errors import HelpersError
from ..inspect.receipt import map_texts
from ..paths import PROJECT_DIR
from .runner import NOTEBOOKS_DIR, Result, run_notebooks

# Somebody's home, a kernel's scratch folder or a Windows drive. AutoDL's data disks are the same for all.
PERSONAL_PATH = re.compile(
    r"(?<![\w.~-])/(?:root/(?!autodl-(?:tmp|fs|pub)\b)|home/|Users/|tmp/ipykernel_)[^\s'\"]*"
    r"|\b[A-Z]:\\\w[^\s'\"]*"
)
KEPT_CELL_METADATA = {"tags", "jupyter", "editable", "deletable"}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
without_injected_cells = TagRemovePreprocessor(remove_cell_tags={"injected-parameters", "papermill-error-cell-tag"})


class PersonalPathError(HelpersError, ValueError):
    """An output still shows an absolute path of the machine it was made on."""


def refresh_notebooks(
    numbers: list[str], *, output_dir: str | Path = "outputs", notebooks_dir: Path = NOTEBOOKS_DIR
) -> list[Result]:
    """Run the notebooks on Nano; if all succeed, write their cleaned copies over those in `notebooks_dir`."""
    results = run_notebooks(numbers, model="nano", output_dir=output_dir, notebooks_dir=notebooks_dir)
    if all(result.status == "ok" for result in results):
        executed = {r.notebook: nbformat.read(Path(output_dir) / r.executed, as_version=4) for r in results}
        cleaned = {name: strip_for_git(notebook) for name, notebook in executed.items()}
        for name, notebook in cleaned.items():  # all are clean, so all are written
            nbformat.write(notebook, Path(notebooks_dir) / name)
    return results


def strip_for_git(notebook: NotebookNode) -> NotebookNode:
    """A copy of an executed notebook that is the same whoever ran it, wherever and whenever.

    Removed: the injected parameters and error markers, all metadata of papermill, widgets and timing. Paths below the
    project become relative. Execution counts run from 1 without gaps, cell ids follow from kind and source: a run
    changes none, an edit one.

    Raises:
        PersonalPathError: another absolute path is left in an output.
    """
    cells = without_injected_cells.preprocess(deepcopy(notebook), {})[0].cells
    count, seen = 0, Counter()
    for cell in cells:
        # nbconvert's ClearMetadata leaves text cells alone, and papermill puts its own, and an empty list of tags, there.
        cell.metadata = {k: value for k, value in cell.metadata.items() if k in KEPT_CELL_METADATA and value != []}
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell.id = f"{digest}-{seen[digest]}" if seen[digest] else digest
        seen[digest] += 1
        if cell.cell_type == "code":
            cell.execution_count = count = count + 1  # the removed cells left gaps
            cell.outputs = [_clean_output(output, count) for output in cell.outputs if not _is_progress_bar(output)]
    cleaned = nbformat.v4.new_notebook(cells=cells, metadata=METADATA, nbformat_minor=5)
    nbformat.validate(cleaned)
    return cleaned


def _is_progress_bar(output: NotebookNode) -> bool:
    # Displayed, with nothing but a text beside its widget: the text stays at 0 % for ever.
    kinds = set(output.get("data", {}))
    return output.output_type == "display_data" and kinds == {WIDGET_VIEW, "text/plain"}


def _clean_output(output: NotebookNode, count: int) -> NotebookNode:
    output = nbformat.from_dict(map_texts(output, _relative_paths))
    # Without its state a widget view shows as an error; the text or HTML beside it stays.
    output.get("data", {}).pop(WIDGET_VIEW, None)
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


def _relative_paths(text: str) -> str:
    text = text.replace(f"{PROJECT_DIR}/", "").replace(str(PROJECT_DIR), ".")
    found = PERSONAL_PATH.search(text) or re.search(rf"{re.escape(str(Path.home()))}/(?!autodl-)\S*", text)
    if found:
        raise PersonalPathError(
            f"输出里有这台机器的路径 [personal path in an output]：{found[0]}。请让 notebook 显示相对路径"
        )
    return text
