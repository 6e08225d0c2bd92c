"""The HTTP API: one model on port 6006, many users at once, the original lesson's `POST /` and OpenAI's chat completions.

Notebook 02 teaches it. Read `routes` first (what a request becomes), then `engine` (many replies at the same time).
"""

from .app import create_app
from .server import Server, serve

__all__ = ["Server", "create_app", "serve"]
