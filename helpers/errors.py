"""Errors of this project. Every message says what happened and what to do next, in Chinese with an English key phrase."""

import difflib
from collections.abc import Iterable


class HelpersError(Exception):
    """Base class: a problem the reader can fix. The command line prints it as one line, without a traceback."""


class UnsupportedConfigError(HelpersError, ValueError):
    """A config.json asks for something this implementation would silently compute wrongly."""


class CheckpointError(HelpersError, OSError):
    """A model directory is missing, incomplete, damaged or not CharacterGLM."""


class CharacterError(HelpersError, ValueError):
    """A persona or a character card is not valid."""


class ChatError(HelpersError, ValueError):
    """A chat request cannot be answered: bad text, senseless parameters, or a prompt that does not fit."""


class PromptTooLongError(ChatError):
    """The persona and the last message alone leave no room for a reply.

    `total`, `persona` and `context` are tokens: of the prompt, of the persona in it, and of what prompt and reply may have.
    """

    def __init__(self, message: str, total: int, persona: int, context: int):
        super().__init__(message)
        self.total, self.persona, self.context = total, persona, context


class BusyError(HelpersError, RuntimeError):
    """The session is still writing a reply."""


class OverloadError(HelpersError, RuntimeError):
    """The server has as many requests as it takes; try again in a moment."""


class EngineError(HelpersError, RuntimeError):
    """The engine stopped before the reply was complete."""


class DataError(HelpersError, ValueError):
    """Training data cannot be used."""


class FinetuneError(HelpersError, RuntimeError):
    """A training run cannot start or go on; what it had saved is kept."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the entry of `known` closest to `name`; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"是不是 {close[0]} [did you mean]？" if close else ""
