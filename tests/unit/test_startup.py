"""What is imported when: nobody waits for a library that he does not use. Seconds are in benchmarks/startup.py."""

import subprocess
import sys
from pathlib import Path

import pytest

import helpers

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
    assert [name for name in helpers.__all__ if not hasattr(helpers, name)] == []


def test_a_package_that_is_run_with_m_gets_the_registration_from_the_import_alone(tmp_path):
    """Python then locates the package with "-m" in sys.argv, as it does for `python -m helpers`."""
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "__init__.py").write_text("import helpers\n")
    (tmp_path / "reader" / "__main__.py").write_text(
        "from transformers import AutoConfig\n"
        f"print(AutoConfig.from_pretrained({str(PROJECT / 'data' / 'nano')!r}).model_type)\n"
        "import helpers; print(helpers.load.__name__)"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{PROJECT}"}
    printed = subprocess.check_output([sys.executable, "-m", "reader"], env=environment, text=True)
    assert printed.split() == ["chatglm", "load"]
