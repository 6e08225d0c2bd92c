"""The private names of other packages that the `compat` modules lean on are still there."""

import importlib
from pathlib import Path

import pytest

import helpers

MODULES = sorted(file.parent.name for file in Path(helpers.__file__).parent.glob("*/compat.py"))
NAMES = [(room, *name) for room in MODULES for name in importlib.import_module(f"helpers.{room}.compat").NAMES]


@pytest.mark.parametrize(("room", "owner", "name"), NAMES, ids=[f"{room}-{name}" for room, _, name in NAMES])
def test_private_name_is_still_there(room, owner, name):
    assert hasattr(owner, name), (
        f"{owner!r:.80} of the installed version has no {name} any more: "
        f"helpers/{room}/compat.py says what it was for and in which version it was read"
    )
