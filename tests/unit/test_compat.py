"""The private names of other libraries that each folder leans on (its `compat.py`) are still there."""

import importlib
from pathlib import Path

import pytest

import helpers

FILES = sorted(Path(helpers.__file__).parent.glob("*/compat.py"))
MODULES = [importlib.import_module(f"helpers.{file.parent.name}.compat") for file in FILES]
NAMES = [(module.__name__, owner, name) for module in MODULES for owner, name in module.NAMES]


@pytest.mark.parametrize(("module", "owner", "name"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_private_name_is_still_there(module, owner, name):
    where = owner if isinstance(owner, type) else type(owner)
    assert hasattr(owner, name), (
        f"{where.__module__}.{where.__qualname__} no longer has {name}: read {module} for what breaks without it"
    )
