"""The private names of other packages that the `compat` modules lean on are still there."""

import importlib
import operator
from pathlib import Path

import pytest

import helpers

MODULES = sorted(file.parent.name for file in Path(helpers.__file__).parent.glob("*/compat.py"))


def names(room):
    """(whose, name) of everything that a module declares, as such a pair or as "module:dotted name": reason."""
    for entry in importlib.import_module(f"helpers.{room}.compat").NAMES:
        if isinstance(entry, str):
            module, _, path = entry.partition(":")
            owner, dot, name = path.rpartition(".")
            entry = (operator.attrgetter(owner)(importlib.import_module(module)) if dot else module, name)
            entry = entry if dot else (importlib.import_module(module), path)
        yield room, *entry


NAMES = [case for room in MODULES for case in names(room)]


@pytest.mark.parametrize(("room", "owner", "name"), NAMES, ids=[f"{room}-{name}" for room, _, name in NAMES])
def test_private_name_is_still_there(room, owner, name):
    assert hasattr(owner, name), (
        f"{owner!r:.80} of the installed version has no {name} any more: "
        f"helpers/{room}/compat.py says what it was for and in which version it was read"
    )
