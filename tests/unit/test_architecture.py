"""The shape of the package: imports go down only, task folders stand apart, files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "helpers"
# A room may use itself and what stands above it here. Rooms in one row do not know each other.
ROWS = [
    ("errors", "paths", "network"),
    ("characters",),
    ("model",),
    ("chat",),
    ("inspect", "serving", "export", "demo", "finetune"),
    ("tools",),
    ("cli",),
]
HEIGHT = {room: height for height, row in enumerate(ROWS) for room in row}
GROUND = set(ROWS[0])
STARTS_THE_COMMAND_LINE = {"__main__.py", "finetune/__main__.py"}
FILES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imported_rooms(file: str) -> Iterator[str]:
    """The rooms of helpers that a file imports from, in functions too."""
    package = ["helpers", *file.split("/")[:-1]]
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*module, alias.name] for alias in node.names]
        else:
            names = [alias.name.split(".") for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name[1] for name in names if name[0] == "helpers" and len(name) > 1)


@pytest.mark.parametrize("file", sorted(FILES.keys() - STARTS_THE_COMMAND_LINE - {"__init__.py"}))
def test_imports_go_down_only(file: str) -> None:
    room = file.split("/")[0].removesuffix(".py")
    others = set(imported_rooms(file)) - {room}
    assert others <= HEIGHT.keys()
    wrong = {other for other in others if HEIGHT[other] >= HEIGHT[room]} - (GROUND if room in GROUND else set())
    assert not wrong, f"{file} imports from {sorted(wrong)}, which may import from it, or stands beside it"


@pytest.mark.parametrize("file", sorted(FILES))
def test_files_and_functions_are_small(file: str) -> None:
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= 300
    functions = (node for node in ast.walk(FILES[file]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [f"{node.name}: {size}" for node in functions if (size := node.end_lineno - node.lineno + 1) > 40] == []
