"""Names of other libraries beyond their documented interface: after an update this says which is gone, and what breaks."""

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import helpers

FOLDER = Path(helpers.__file__).parent


def declared() -> list:
    """(compat.py, name, what breaks) of every `NAMES`, read without importing: an import may be what fails."""
    found = []
    for file in sorted(FOLDER.rglob("compat.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "NAMES":
                home = file.relative_to(FOLDER.parent).as_posix()
                found += [pytest.param(home, *entry, id=entry[0]) for entry in ast.literal_eval(node.value).items()]
    return found


def is_there(name: str) -> bool:
    """Whether "module:owner.attribute" exists, be it as an attribute that the owner's code gives to its objects."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    try:
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
    except (ImportError, AttributeError):
        return False
    fields = getattr(owner, "__dataclass_fields__", {})
    return (
        hasattr(owner, last)
        or last in fields
        or re.search(rf"self\.{last}\b[^=\n]*=", inspect.getsource(owner)) is not None
    )


@pytest.mark.parametrize(("home", "name", "breaks"), declared())
def test_a_private_name_is_still_there(home, name, breaks):
    package = name.split(".")[0].split(":")[0]
    assert is_there(name), (
        f"{package} {version(package)} has no {name.partition(':')[2]} any more, so {breaks}. Find what took its place, "
        f"and change {home} and the code that uses it"
    )


@pytest.mark.parametrize("name", ["transformers:no_such_name", "transformers:GlmForCausalLM._no_such_name", "no:such"])
def test_a_name_that_is_gone_is_noticed(name):
    assert not is_there(name)
