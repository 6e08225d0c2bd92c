"""A stand-in for ModelScope on 127.0.0.1: serves files as the modelscope client asks for them, and can misbehave.

Three addresses, as read in modelscope_hub 0.5: the list of a repository's files with size and sha256, the bytes of one
file (with Range), and a question about clouds that gets an empty answer.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

LISTING = "(listing)"  # the name under which faults of the listing are filed
Fault = Callable[["Handler", bytes], None]


class Hub(ThreadingHTTPServer):
    """One repository. Change `files`, `listed` and `faults` to say what it serves, claims and breaks."""

    daemon_threads = True

    def __init__(self, model_id: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model_id, self.files = model_id, dict(files)
        self.listed: dict[str, dict] = {}  # claims about a file that differ from the truth
        self.faults: dict[
            str, Iterator[Fault]
        ] = {}  # by file name: what the next requests meet; afterwards all is well
        self.requests: list[tuple[str, str | None]] = []  # (file, Range header)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def listing(self) -> list[dict]:
        """Every file as ModelScope lists it."""
        return [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(body), "Sha256": hashlib.sha256(body).hexdigest()}
            | self.listed.get(name, {})
            for name, body in self.files.items()
        ]

    def requested(self) -> set[str]:
        """Names of the files that were asked for."""
        return {name for name, _ in self.requests} - {LISTING}


class Handler(BaseHTTPRequestHandler):
    """Answers one request of the client."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Route by path; a repository of another name is not found."""
        url = urlsplit(self.path)
        if url.path == f"/api/v1/models/{self.server.model_id}/repo/files":
            body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": self.server.listing()}}).encode()
            self._answer(LISTING, body)
        elif url.path == f"/api/v1/models/{self.server.model_id}/repo":
            name = parse_qs(url.query)["FilePath"][0]
            self._answer(name, self.server.files[name])
        elif url.path == "/api/v1/repos/internalAccelerationInfo":
            self.send_body(b'{"Data": {}}')
        else:
            self.refuse(404)

    def _answer(self, name: str, body: bytes) -> None:
        self.server.requests.append((name, self.headers["Range"]))
        fault = next(self.server.faults.get(name, iter(())), Handler.send_body)
        fault(self, body)

    def send_head(self, body: bytes) -> bytes:
        """Status and headers of the whole body, or of the part that Range asks for; returns what is to be sent."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        return body[start:]

    def send_body(self, body: bytes) -> None:
        """All of it, as it should be."""
        self.wfile.write(self.send_head(body))

    def refuse(self, status: int) -> None:
        """An error, with the reason as ModelScope words it."""
        body = json.dumps({"Code": status, "Message": f"status {status}", "Success": False}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent: a test that fails shows `Hub.requests`."""


def status(code: int) -> Fault:
    """Answer with an HTTP error."""
    return lambda handler, body: handler.refuse(code)


def drop(after: int) -> Fault:
    """Close the connection after so many bytes."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.wfile.write(handler.send_head(body)[:after])
        handler.wfile.flush()
        handler.close_connection = True

    return fault


def stall(after: int, released: threading.Event) -> Fault:
    """Send so many bytes, then nothing until the event is set; the connection stays open."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.wfile.write(handler.send_head(body)[:after])
        handler.wfile.flush()
        released.wait(timeout=60)
        handler.close_connection = True

    return fault
