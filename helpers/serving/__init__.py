"""The API server: one model on port 6006, many users at once."""

from .app import create_app
from .server import Server, serve

__all__ = ["Server", "create_app", "serve"]
