"""Network addresses, ``HOST:PORT``: what they say, and whether somebody listens there."""

from __future__ import annotations

import contextlib
import re
import socket
from typing import Annotated

from fedzo.errors import ConfigError
from fedzo.records.fields import Matching

Address = Annotated[str, Matching(re.compile(r"[^\s/]{1,253}:[0-9]{1,5}"), "host:port")]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ConfigError: It is none.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"an address must be HOST:PORT, got {address!r}.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(entry[4][0] == "::1" or str(entry[4][0]).startswith("127.") for entry in found)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on at the moment, no two alike."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def accepts(address: str) -> bool:
    """Whether somebody listens at ``host:port``."""
    try:
        socket.create_connection(split_address(address), timeout=1.0).close()
    except OSError:
        return False
    return True


def bound(address: str) -> socket.socket:
    """A socket that listens soon; IPv4 or IPv6 as the host is, and both at ``[::]``."""
    host, port = split_address(address)
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind(place)
    return made
