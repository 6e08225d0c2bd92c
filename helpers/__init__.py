"""Learn and run CharacterGLM-6B. Importing this package registers the family with transformers' Auto classes.

import helpers
model, tokenizer = helpers.load("auto")
reply, history = helpers.chat(model, tokenizer, helpers.load_characters()["苏梦远"], "你好呀，小苏")
"""

import sys


def _is_located_as_a_command() -> bool:
    # `python -m helpers` has runpy import this package before its __main__, and --help must not wait for torch. Everybody
    # else gets the names and the registration at once, also a reader's package that is run with `python -m` itself:
    # sys.argv is ["-m", ...] in both cases, the importer is not. The frames between are importlib's own.
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "runpy"


if not _is_located_as_a_command():
    from .characters.cards import export_card_png, export_card_v2, import_card, import_card_v2
    from .characters.personas import CharacterCard, SessionMeta, get_character, load_characters
    from .chat.chat import chat, stream_chat
    from .chat.fitting import ContextWarning
    from .chat.session import ChatSession
    from .errors import HelpersError
    from .export.plain import export_model
    from .inspect.estimate import Estimate, estimate
    from .inspect.parameters import check_parameters
    from .inspect.preflight import memory, preflight
    from .inspect.receipt import write_receipt
    from .inspect.xray import prompt_xray
    from .model.download import download_model
    from .model.loading import LoadChoice, choose, load, pick_model, resolve_model

__version__ = "0.1.0"

__all__ = [
    "CharacterCard",
    "ChatSession",
    "ContextWarning",
    "Estimate",
    "HelpersError",
    "LoadChoice",
    "SessionMeta",
    "chat",
    "check_parameters",
    "choose",
    "download_model",
    "estimate",
    "export_card_png",
    "export_card_v2",
    "export_model",
    "get_character",
    "import_card",
    "import_card_v2",
    "load",
    "load_characters",
    "memory",
    "pick_model",
    "preflight",
    "prompt_xray",
    "resolve_model",
    "stream_chat",
    "write_receipt",
]
