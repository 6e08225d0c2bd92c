"""Addresses to serve on: is a port free, which one is, can other machines reach it, and what a proxy makes of it."""

import errno
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from .errors import HelpersError

DEFAULT_PORT = 6006  # the port that AutoDL can open to the outside


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; port 0 means any free one.

    Raises:
        HelpersError: somebody else listens there, or this machine has no such address.
    """
    try:
        return socket.create_server((host, port), family=_family(host), backlog=2048)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise HelpersError(f"不能绑定 {host}:{port} [cannot bind]：{error.strerror or error}") from None
        raise HelpersError(
            f"端口 {port} 已被占用 [port in use]：换一个，例如 {free_port()}，或先停掉占用它的程序"
        ) from None


def address(listener: socket.socket) -> str:
    """What to open in a browser on this machine."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def free_port(preferred: int = DEFAULT_PORT) -> int:
    """`preferred`, or the next port after it that is free on 127.0.0.1."""
    return next(port for port in range(preferred, 65536) if port_is_free("127.0.0.1", port))


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could bind to the port."""
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError:
        return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def check_proxy(url: str) -> str:
    """The address at which a browser reaches the server behind a proxy, without a last /; `HelpersError` for any other text."""
    if not re.fullmatch(r"https?://[^/\s?#@]+(/[\w.~%/-]*)?", url):
        raise HelpersError(
            f"代理的地址 {url!r} 写法不对 [malformed proxy address]：浏览器地址栏里的那一个，如 https://my.site:8443 或 "
            "https://my.site/role"
        )
    return url.rstrip("/")


class BehindProxy:
    """ASGI middleware: `app` takes every request for one to `url`, whatever the proxy before it says of host and scheme.

    So redirects, links and the check of `Origin` are right behind a proxy that rewrites `Host`, ends TLS or takes a
    prefix off the path, and no header of a stranger is believed.
    """

    def __init__(self, app, url: str):
        self.app, parts = app, urlsplit(check_proxy(url))
        self.scheme, self.host, self.prefix = parts.scheme, parts.netloc.encode(), parts.path

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "lifespan":
            told = (b"host", b"x-forwarded-host", b"x-forwarded-proto", b"x-gradio-server")
            headers = [(b"host", self.host), *((name, value) for name, value in scope["headers"] if name not in told)]
            secure = self.scheme == "https"
            scheme = self.scheme if scope["type"] == "http" else "wss" if secure else "ws"
            # ASGI's `path` has the prefix in it; some proxies take it off, others leave it.
            path = scope["path"] if scope["path"].startswith(f"{self.prefix}/") else self.prefix + scope["path"]
            scope = {**scope, "scheme": scheme, "headers": headers, "root_path": self.prefix, "path": path}
        await self.app(scope, receive, send)
