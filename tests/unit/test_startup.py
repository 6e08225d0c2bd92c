"""What is imported when: nobody waits for a library that he does not use. Seconds are in benchmarks/startup.py."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "pandas", "fastapi", "gradio"}
OPTIONAL = {"peft", "datasets", "modelscope", "gradio", "fastapi", "matplotlib", "pandas", "IPython", "papermill"}


def imported(*words: str) -> set[str]:
    """Top-level modules that a fresh Python has imported at the end of `python WORDS`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


@pytest.mark.parametrize("command", [(), ("chat",), ("serve",), ("finetune",)])
def test_help_does_not_wait_for_torch(command):
    modules = imported("-m", "helpers", *command, "--help")
    assert "typer" in modules
    assert not modules & HEAVY


def test_import_takes_only_what_loading_a_model_takes():
    modules = imported("-c", "import helpers")
    assert {"torch", "transformers"} <= modules
    assert not modules & OPTIONAL


def test_every_public_name_is_there():
    listed = "import helpers; print([name for name in helpers.__all__ if not hasattr(helpers, name)])"
    assert subprocess.check_output([sys.executable, "-c", listed], cwd=PROJECT, text=True).strip() == "[]"


@pytest.mark.parametrize("words", [("-c", "import {module}"), ("-m", "{module}")])
def test_a_package_of_the_reader_gets_all_of_helpers(tmp_path, words):
    """Also one that is itself run with `python -m`."""
    (tmp_path / "reader").mkdir()
    code = "import helpers\nfrom transformers import AutoConfig\n"
    code += f"print(helpers.load.__name__, AutoConfig.from_pretrained({str(PROJECT / 'data' / 'nano')!r}).model_type)"
    (tmp_path / "reader" / "__init__.py").write_text(code)
    (tmp_path / "reader" / "__main__.py").touch()
    command = [sys.executable, *(word.format(module="reader") for word in words)]
    environment = {"PYTHONPATH": f"{tmp_path}:{PROJECT}"}
    assert subprocess.check_output(command, env=environment, text=True).strip() == "load chatglm"
