"""The command line on terminals without UTF-8: what they cannot show is a "?", never an error."""

import io
import json
import os
import subprocess
import sys

import nbformat
import pytest
from reference import REPOSITORY

from helpers.cli.app import main
from helpers.errors import HelpersError
from helpers.finetune import command
from helpers.finetune.command import DEFAULT_DATA
from helpers.tools import runner

# Arguments: what is printed, at least.
COMMANDS = {
    ("--help",): "[run, chat, serve",
    ("finetune", "--help"): "[training data]",
    ("doctor", "--model", "nano"): "transformers",
    ("doctor", "--explain", "trace.txt"): "[loss is not finite]",
    ("run", "01", "--model", "nano"): "failed",
    ("finetune", "--model", "nano", "--data", "emoji.jsonl", "--card", "林黛玉"): "[duplicate] 1",
}


@pytest.fixture
def folder(tmp_path, good_notebook, monkeypatch):
    """A working directory with what the commands read; fine-tuning ends where the model would be loaded."""
    (tmp_path / "trace.txt").write_text("[loss is not finite]\nCUDA out of memory", encoding="utf-8")
    twice = json.dumps({"instruction": "吃了吗", "output": "🤗 吃了"}, ensure_ascii=False) + "\n"
    (tmp_path / "emoji.jsonl").write_text(DEFAULT_DATA.read_text(encoding="utf-8") + 2 * twice, encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    good_notebook.cells[3].source = "print('🤗 完成'); 1 / 0"
    nbformat.write(good_notebook, tmp_path / "notebooks" / "01_first.ipynb")
    monkeypatch.setitem(runner.run_notebooks.__kwdefaults__, "notebooks_dir", tmp_path / "notebooks")
    monkeypatch.setattr(command, "load", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(*arguments, **options):
    raise HelpersError("not loaded")


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_terminal_without_utf8(folder, monkeypatch, arguments, encoding):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["helpers", *arguments])
    with pytest.raises(SystemExit):
        main()
    sys.stdout.flush()
    assert COMMANDS[arguments] in printed.getvalue().decode("utf-8" if "--help" in arguments else encoding, "replace")


# As `python -m helpers`, with the notebooks of the working directory.
PROGRAM = """
import pathlib
from helpers.cli.app import main
from helpers.tools import runner
runner.run_notebooks.__kwdefaults__["notebooks_dir"] = pathlib.Path("notebooks")
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", list(COMMANDS)[:-1], ids=" ".join)
def test_a_machine_without_utf8(folder, arguments):
    """The C locale without Python's own remedies: names and contents of files are ASCII, too, unless said otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, env=environment)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert COMMANDS[arguments] in said, said
    assert "UnicodeEncodeError" not in said and 'File "<string>"' not in said  # no traceback of the program's
