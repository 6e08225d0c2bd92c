"""Every rule passes a good notebook and catches a notebook that breaks it, and only it."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import rules
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

HOME_PATH = "/".join(("", "home", "alice", "x.txt"))
ROOT_PATH = "/".join(("", "root", "miniconda3", "bin"))
MAC_PATH = "/".join(("", "Users", "alice", "x.txt"))
WINDOWS_PATH = "C:" + "\\alice\\x.txt"
REMOTE_CODE = "trust_remote_code" + " = True"


def parameters(source: str) -> Callable[[NotebookNode], None]:
    """Replaces the source of the parameters cell."""
    return lambda notebook: notebook.cells[1].update(source=source)


def code(source: str) -> Callable[[NotebookNode], None]:
    """Replaces the source of the last code cell, which reads STEPS, and keeps reading it."""
    return lambda notebook: notebook.cells[3].update(source=f"{source}\nSTEPS")


def output(**content: object) -> Callable[[NotebookNode], None]:
    """Adds an output to the last code cell."""
    return lambda notebook: notebook.cells[3].outputs.append(new_output(**content))


def text(source: str) -> Callable[[NotebookNode], None]:
    """Adds a text cell."""
    return lambda notebook: notebook.cells.append(new_markdown_cell(source))


def metadata(index: int, **entries: object) -> Callable[[NotebookNode], None]:
    """Adds metadata to a cell."""
    return lambda notebook: notebook.cells[index].metadata.update(entries)


BROKEN = [
    (rules.one_parameters_cell, metadata(2, tags=["parameters"])),
    (rules.one_parameters_cell, lambda notebook: notebook.cells[1].metadata.clear()),
    (rules.parameters_are_flat_literals, parameters("STEPS = 1 + 2  # computed")),
    (rules.parameters_are_flat_literals, parameters("STEPS = [3]  # nested")),
    (rules.parameters_are_flat_literals, parameters("STEPS = 3")),
    (rules.parameters_are_flat_literals, parameters("STEPS = 3  #")),
    (rules.parameters_are_flat_literals, parameters('STEPS = (\n    "3"\n)  # three lines')),
    (rules.parameters_are_flat_literals, parameters("import os  # not a parameter")),
    (rules.parameters_are_visible_to_papermill, parameters("STEPS = 3  # as in n=3")),
    (rules.every_parameter_is_read, parameters("STEPS = 3  # read\nEXTRA = 1  # never read")),
    (rules.every_parameter_is_read, lambda notebook: notebook.cells[3].update(source="STEPS = 4")),
    (rules.code_cells_have_source, lambda notebook: notebook.cells[2].update(source=" \n")),
    (rules.code_cells_are_short, code("\n".join(["x = 1"] * 12))),
    (rules.code_is_plain, code("if (n := 3) > 2:\n    pass")),
    (rules.code_is_plain, code("add = lambda a: a + 1")),
    (rules.code_is_plain, code("[[a for a in b] for b in []]")),
    (rules.code_is_plain, code("[a for b in [] for a in b]")),
    (rules.notebook_is_short, lambda notebook: notebook.cells.extend(new_markdown_cell("x") for _ in range(41))),
    (rules.execution_counts_are_in_order, lambda notebook: notebook.cells[3].update(execution_count=7)),
    (rules.execution_counts_are_in_order, lambda notebook: notebook.cells[1].update(execution_count=None)),
    (rules.no_error_outputs, output(output_type="error", ename="KeyError", evalue="'x'", traceback=[])),
    (rules.no_widget_state, lambda notebook: notebook.metadata.update(widgets={"state": {}})),
    (rules.no_widget_state, output(output_type="display_data", data={rules.WIDGET_VIEW: {"model_id": "1"}})),
    (rules.no_run_metadata, lambda notebook: notebook.metadata.update(papermill={})),
    (rules.no_run_metadata, metadata(2, papermill={"status": "completed"})),
    (rules.no_run_metadata, metadata(2, execution={"iopub.status.busy": "10:00"})),
    (rules.no_run_metadata, metadata(2, tags=["injected-parameters"])),
    (rules.no_personal_paths, code(f'open("{HOME_PATH}")')),
    (rules.no_personal_paths, text(f"见 {MAC_PATH}")),
    (rules.no_personal_paths, output(output_type="stream", text=f"saved {ROOT_PATH}")),
    (rules.no_personal_paths, output(output_type="display_data", data={"text/html": f"<b>{WINDOWS_PATH}</b>"})),
    (rules.one_title, text("# Second title")),
    (rules.one_title, lambda notebook: notebook.cells[0].update(source="## Not a title\n```\n# a comment\n```")),
    (rules.has_closing_sections, lambda notebook: notebook.cells[4].update(source="## 小结")),
    (rules.has_closing_sections, lambda notebook: notebook.cells[4].update(source="## Troubleshooting")),
    (rules.no_remote_code, code(f"load(x, {REMOTE_CODE})")),
    (rules.no_remote_code, code('options = {"trust_remote_code": True}')),
    (rules.no_remote_code, code("options.trust_remote_code = 1")),
    (
        rules.no_remote_code,
        lambda notebook: notebook.cells.append(
            new_code_cell(f"%%writefile a.py\nload(x, {REMOTE_CODE})", execution_count=4)
        ),
    ),
    (rules.names_its_kernel, lambda notebook: notebook.metadata.kernelspec.update(name="conda-base")),
    (rules.names_its_kernel, lambda notebook: notebook.metadata.pop("language_info")),
]


def problems_by_rule(notebook: NotebookNode) -> dict[str, list[str]]:
    """Name of every content rule that finds something, and what it finds."""
    found = {rule.__name__: rule(notebook) for rule in rules.CONTENT_RULES}
    return {name: problems for name, problems in found.items() if problems}


def test_good_notebook_keeps_every_rule(good_notebook: NotebookNode) -> None:
    assert problems_by_rule(good_notebook) == {}


@pytest.mark.parametrize(("rule", "breakage"), BROKEN, ids=[rule.__name__ for rule, _ in BROKEN])
def test_rule_catches_breakage(good_notebook: NotebookNode, rule: Callable, breakage: Callable) -> None:
    breakage(good_notebook)
    assert rule(good_notebook)


def test_no_content_rule_is_untested() -> None:
    assert {rule for rule, _ in BROKEN} == set(rules.CONTENT_RULES)


@pytest.mark.parametrize(
    "allowed",
    [
        text("模型放在 /root/autodl-tmp/CharacterGLM-6B，请把它移到 GPU"),
        text(f"旧教程写 `{REMOTE_CODE}`，这里不用"),
        text("```bash\n# 不是标题\n```"),
        code("%matplotlib inline\n!ls ."),
        code("RATIO = f'{STEPS}:1'"),
        code("# why\n" + "\n".join(["x = 1"] * 11)),
        code("[a for a in [1]]"),
        parameters('MODEL = "auto"  # which\nOUTPUT_DIR = "o"  # where\nSTEPS = -1  # all'),
    ],
)
def test_rules_leave_honest_cells_alone(good_notebook: NotebookNode, allowed: Callable) -> None:
    allowed(good_notebook)
    assert problems_by_rule(good_notebook) == {}


EXERCISE = "### 1\n<details><summary>答案</summary>\n\n```python\nanswer_1 = 2\n```\n\n</details>"
CHECK = "answer_1 = None  # 你的答案\nif answer_1 is None:\n    print('还没有作答')"


def test_exercises_are_found_with_their_solutions(good_notebook: NotebookNode) -> None:
    good_notebook.cells += [new_markdown_cell(EXERCISE), new_code_cell(CHECK)] * 4
    assert rules.exercises(good_notebook) == [("answer_1 = 2\n", CHECK)] * 4
    assert rules.has_exercises(good_notebook) == []


def test_a_missing_exercise_or_solution_is_noticed(good_notebook: NotebookNode) -> None:
    assert rules.has_exercises(good_notebook) == ["0 exercises"]
    good_notebook.cells += [new_markdown_cell("no solution"), new_code_cell(CHECK)]
    assert rules.has_exercises(good_notebook)[1].startswith("no folded solution")


HEADINGS = "# 01-甲 部署调用\n## 1. 环境准备 Environment\n## 步骤 2：部署（Deploy）"


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        (HEADINGS, []),
        (HEADINGS.replace("部署（Deploy）", "部署调用"), ["部署"]),
        (HEADINGS.replace("## 1. 环境准备", "环境准备"), ["环境准备"]),
        ("# 01-甲 部署调用\n## 部署\n## 环境准备", ["部署"]),
        (f"```\n{HEADINGS}\n```", ["01-甲 部署调用", "环境准备", "部署"]),
    ],
)
def test_headings_are_wanted_whole_and_in_order(good_notebook: NotebookNode, source: str, missing: list[str]) -> None:
    good_notebook.cells = [new_markdown_cell(source)]
    found = rules.has_headings(good_notebook, ["01-甲 部署调用", "环境准备", "部署"])
    assert [problem.rpartition(": ")[2] for problem in found] == missing


def test_lost_link_is_noticed(good_notebook: NotebookNode) -> None:
    good_notebook.cells[0].source = "[Lora](https://example.org/1) 和 https://example.org/2"
    assert rules.has_links(good_notebook, ["https://example.org/1"]) == []
    assert rules.has_links(good_notebook, ["https://example.org/2"]) == ["lost link https://example.org/2"]


@pytest.mark.parametrize(
    ("link", "resolves"),
    [
        ("[x](there.md)", True),
        ("[x](there.md#part)", True),
        ('<img src="there.md">', True),
        ("[x](https://example.org/gone)", True),
        ("[x](#part)", True),
        ("[x](gone.md)", False),
        ("![x](../outside.md)", False),
        ("<a href='gone.md'>x</a>", False),
    ],
)
def test_relative_links(good_notebook: NotebookNode, tmp_path: Path, link: str, resolves: bool) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "there.md").touch()
    (tmp_path / "outside.md").touch()
    good_notebook.cells[0].source = link
    assert (rules.relative_links_resolve(good_notebook, repository, repository) == []) is resolves


def test_large_file_is_noticed(good_notebook: NotebookNode, tmp_path: Path) -> None:
    file = tmp_path / "large.ipynb"
    nbformat.write(good_notebook, file)
    assert rules.file_is_small(file) == []
    good_notebook.cells[0].source = "x" * rules.MAX_FILE_BYTES
    nbformat.write(good_notebook, file)
    assert rules.file_is_small(file)
