"""Fixtures shared by all tests."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


@pytest.fixture
def good_notebook() -> NotebookNode:
    """A small executed notebook that keeps every rule; a test may break it."""
    parameters = 'MODEL = "auto"  # which model\nOUTPUT_DIR = "outputs"  # where files go\nSTEPS = 3  # how many'
    cells = [
        new_markdown_cell("# 01 标题 Title"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell("print(MODEL, OUTPUT_DIR)", outputs=[new_output("stream", text="auto outputs\n")]),
        new_code_cell("10 // STEPS", outputs=[new_output("execute_result", data={"text/plain": "3"})]),
        new_markdown_cell("## 小结 Summary\n\n## 常见问题 Troubleshooting"),
    ]
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
    cells[3].outputs[0].execution_count = 3
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ...` in an empty folder of its own, as a reader would from anywhere."""

    def run(*arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    return run
