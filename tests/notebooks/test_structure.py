"""The notebooks kept in git keep every rule of rules.py and mirror the document they were made from."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import rules

NOTEBOOKS = sorted((rules.REPOSITORY / "notebooks").glob("*.ipynb"))

# Headings and links of the document that the notebooks mirror, by notebook number.
SEED_HEADINGS = {
    "01": ["01-CharacterGLM-6B Transformer部署调用", "环境准备", "模型下载", "代码准备", "部署"],
    "02": ["02-CharacterGLM-6B FastApi部署调用", "环境准备", "模型下载", "代码准备", "部署"],
    "03": ["03-CharacterGLM-6B-chat", "环境设置", "模型下载", "代码准备", "demo 运行"],
    "04": [
        "04-CharacterGLM-6B Lora微调",
        "环境配置",
        "指令集构建",
        "QA和Instruction的区别和联系",
        "数据格式化",
        "加载 tokenizer 和半精度模型",
        "定义 LoraConfig",
        "自定义 TraininArguments 参数",
        "使用 Trainer 训练",
        "模型推理",
        "重新加载",
    ],
}
SEED_LINKS = {"04": ["https://zhuanlan.zhihu.com/p/650197598"]}

for_every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook in `path`."""
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks_with_known_numbers() -> None:
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers
    assert set(numbers) <= set(SEED_HEADINGS)
    assert len(numbers) == len(set(numbers))


@for_every_notebook
def test_notebook_format_is_valid(path: Path) -> None:
    nbformat.validate(read(path))


@for_every_notebook
@pytest.mark.parametrize("rule", rules.CONTENT_RULES, ids=lambda rule: rule.__name__)
def test_notebook_keeps_rule(path: Path, rule: Callable[[nbformat.NotebookNode], list[str]]) -> None:
    assert rule(read(path)) == []


@for_every_notebook
def test_notebook_is_small(path: Path) -> None:
    assert rules.file_is_small(path) == []


@for_every_notebook
def test_exercises_have_solutions(path: Path) -> None:
    assert rules.has_exercises(read(path)) == []


@for_every_notebook
def test_relative_links_resolve(path: Path) -> None:
    assert rules.relative_links_resolve(read(path), path.parent) == []


@for_every_notebook
def test_every_seed_heading_and_link_has_its_place(path: Path) -> None:
    number = path.name[:2]
    assert rules.has_headings(read(path), SEED_HEADINGS[number]) == []
    assert rules.has_links(read(path), SEED_LINKS.get(number, [])) == []
