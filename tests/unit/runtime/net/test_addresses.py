"""Addresses are read, and looked at."""

from __future__ import annotations

import socket

import pytest

from fedzo.errors import ConfigError
from fedzo.runtime.net.addresses import accepts, bound, free_ports, is_loopback, split_address


@pytest.mark.parametrize(("address", "parts"), [("a:1", ("a", 1)), ("[::1]:8443", ("::1", 8443))])
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:99999", "host:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        split_address(address)


def test_loopback_is_told_from_the_rest() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "0.0.0.0", "10.1.2.3")] == [True, True, False, False]


def test_free_ports_are_different_and_nobody_listens_there() -> None:
    ports = free_ports(20)

    assert len(set(ports)) == 20
    assert not any(accepts(f"127.0.0.1:{port}") for port in ports)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("[::1]", socket.AF_INET6)])
def test_listening_port_accepts(host: str, family: socket.AddressFamily) -> None:
    with socket.create_server((host.strip("[]"), 0), family=family) as server:
        assert accepts(f"{host}:{server.getsockname()[1]}")


def test_who_listens_at_all_addresses_of_ipv6_is_reached_by_ipv4_too() -> None:
    with bound("[::]:0") as listening:
        listening.listen()
        port = listening.getsockname()[1]

        assert [accepts(f"{host}:{port}") for host in ("127.0.0.1", "[::1]")] == [True, True]
