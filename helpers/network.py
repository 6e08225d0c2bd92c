"""Addresses to serve on: is a port free, which one is, and can other machines reach it."""

import errno
import ipaddress
import socket

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
