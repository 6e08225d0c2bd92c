"""What holds for every file of the repository."""

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.tools.refresh import PERSONAL_PATH

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_OURS = {".venv", ".git", "outputs", "models", "build", "__pycache__"}

# Put together from pieces, so that this file does not break its own rules.
FORBIDDEN = {
    "absolute path of somebody's machine": PERSONAL_PATH,
    "remote code": re.compile("trust_remote_code" + r"\s*=\s*True"),
    "package index": re.compile(
        "|".join(
            [
                "py" + r"pi\.(?:org|tuna)",
                "python" + r"hosted\.org",
                "registry" + r"\.npmjs",
                "deb" + r"\.debian\.org",
                r"https?://[^\s'\"]+/simp" + r"le\b",
            ]
        )
    ),
}


def repository_files() -> list[Path]:
    """Files that git tracks or would track; without git, everything that is not installed or produced."""
    if shutil.which("git") and (REPOSITORY / ".git").exists():
        command = ["git", "-C", str(REPOSITORY), "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return [REPOSITORY / name for name in names if name and (REPOSITORY / name).is_file()]
    files = (path for path in REPOSITORY.rglob("*") if path.is_file())
    return [path for path in files if not NOT_OURS & set(path.relative_to(REPOSITORY).parts)]


def texts() -> Iterator[tuple[Path, str]]:
    """Path and content of every text file."""
    for path in repository_files():
        try:
            yield path.relative_to(REPOSITORY), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_repository_files_are_found() -> None:
    assert REPOSITORY / "pyproject.toml" in repository_files()
    assert Path(__file__) in repository_files()


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_file_holds(kind: str) -> None:
    found = [f"{path}: {match[0]}" for path, text in texts() for match in FORBIDDEN[kind].finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("absolute path of somebody's machine", "/".join(("cd ", "home", "alice", "x"))),
        ("remote code", "f(trust_remote_code" + "=True)"),
        ("package index", "-i https://mirror.example/simp" + "le"),
        ("package index", "https://py" + "pi.org/project/x"),
    ],
)
def test_forbidden_words_are_recognised(kind: str, text: str) -> None:
    assert FORBIDDEN[kind].search(text)


@pytest.mark.parametrize("folder", sorted(path.parent for path in (REPOSITORY / "helpers").rglob("__init__.py")))
def test_every_room_says_what_is_in_it(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh", "scripts/get_browser.sh"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(REPOSITORY / script, os.X_OK)
    checked = subprocess.run(["bash", "-n", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
