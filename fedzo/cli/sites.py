"""Commands of a federation of sites: what they take, and what they call and print."""

from __future__ import annotations

import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fedzo.cli.arguments import AddCommand, add_run, run_folder, whole_number
from fedzo.cli.output import print_lines

CERTIFICATE_DAYS = 365
_PORT, _INDEX, _DAYS = whole_number(1, 65535), whole_number(0, 0xFFFFFFFD), whole_number(1, 3650)


def add_site_commands(add: AddCommand) -> None:
    """From ``fedzo server`` to ``fedzo stop``."""
    _add_server(add("server", server, "set up or run the server of a federation of sites"))
    _add_client(add("client", client, "set up or run a site (client) of a federation"))

    own = add("status", status, "show the state of a server, a site or a run")
    own.add_argument("dir", metavar="DIR", nargs="?", default=".", help="folder of one of them (default: this folder)")
    own.epilog = (
        "Exit code 1: the SuperLink or the site is down, the certificate must be renewed, the site is not connected, "
        "or nobody works on a run that is not finished."
    )

    own = add("stop", stop, "stop a run after its current round")
    add_run(own)


def _add_server(parser: ArgumentParser) -> None:
    add = _adder(parser)

    own = add("init", "make a server's folder: certificate authority, certificate, secret, client registry")
    own.add_argument("dir", metavar="DIR", help="folder to make; an existing one gets only the files that it lacks")
    name = socket.gethostname()
    text = f"a name or address at which sites reach this machine; may be repeated (default: {name})"
    own.add_argument("--host", metavar="HOST", action="append", help=text.replace("%", "%%"))
    own.add_argument("--port", type=_PORT, default=8443, help="port for sites (default: 8443)")
    own.add_argument("--control-port", type=_PORT, default=8444, help="port for this machine (default: 8444)")
    _add_days(own)

    own = add("add-client", "register a client by its key and its index in a run, or move it to another index")
    own.add_argument("name", metavar="NAME", help="client name: letters, digits and . _ -")
    own.add_argument("--index", type=_INDEX, help="client index in a run, from 0 (default: the lowest free one)")
    own.add_argument("--key", metavar="KEY", help="the site's public key, or a file with it (default: make a key here)")
    _add_dir(own)

    own = add("remove-client", "revoke a client's key")
    own.add_argument("name", metavar="NAME", help="client name")
    _add_dir(own)

    own = add("renew", "write a new certificate; sites need no change")
    own.add_argument("--host", metavar="HOST", action="append", help="as for init (default: unchanged)")
    _add_days(own)
    _add_dir(own)

    own = add("up", "run the SuperLink until this command is stopped")
    own.add_argument("dir", metavar="DIR", nargs="?", default=".", help="server folder (default: this folder)")


def server(arguments: Namespace) -> None:
    """``fedzo server``."""
    from fedzo.commands import server as commands
    from fedzo.runtime.net.server_folder import ServerFolder

    folder = ServerFolder(Path(arguments.dir))
    match arguments.what:
        case "init":
            hosts = arguments.host or [socket.gethostname()]
            ports = {"port": arguments.port, "control_port": arguments.control_port}
            lines = commands.init(Path(arguments.dir), hosts=hosts, days=arguments.days, **ports)
        case "add-client":
            lines = commands.add_client(folder, arguments.name, index=arguments.index, key=arguments.key)
        case "remove-client":
            lines = commands.remove_client(folder, arguments.name)
        case "renew":
            lines = commands.renew(folder, hosts=arguments.host or [], days=arguments.days)
        case _:
            return _keep(commands.up(folder))
    print_lines(lines)


def _add_client(parser: ArgumentParser) -> None:
    add = _adder(parser)

    own = add("init", "make a site's folder: key, site file")
    own.add_argument("dir", metavar="DIR", help="folder to make; an existing one gets only the files that it lacks")
    own.add_argument("--server", metavar="HOST:PORT", help="the server; not needed with --invitation")
    own.add_argument("--invitation", metavar="FILE", help="file from `fedzo server add-client` for this site")
    own.add_argument("--ca", metavar="FILE", help="the server's ca.crt, where there is no invitation")

    own = add("up", "run the site's SuperNode and executor until this command is stopped")
    own.add_argument("dir", metavar="DIR", nargs="?", default=".", help="client folder (default: this folder)")


def client(arguments: Namespace) -> None:
    """``fedzo client``."""
    from fedzo.commands import client as commands
    from fedzo.runtime.net.client_folder import ClientFolder

    path = Path(arguments.dir)
    if arguments.what == "up":
        return _keep(commands.up(ClientFolder(path)))
    files = [Path(name) if name else None for name in (arguments.invitation, arguments.ca)]
    print_lines(commands.init(path, server=arguments.server, invitation=files[0], authority=files[1]))


def status(arguments: Namespace) -> int:
    """``fedzo status``; 1 where something is wrong."""
    from fedzo.commands.status import status as lines_of

    is_well = False

    def lines() -> Iterator[str]:
        nonlocal is_well
        is_well = yield from lines_of(Path(arguments.dir))

    print_lines(lines())
    return 0 if is_well else 1


def stop(arguments: Namespace) -> None:
    """``fedzo stop``."""
    from fedzo.commands.status import stop as stop_run

    print_lines(stop_run(run_folder(arguments.run)))


def _keep(lines: Iterable[str]) -> None:
    """Show what a service says until it is told to end, which is no failure."""
    try:
        print_lines(lines)
    except KeyboardInterrupt:
        print("ended", flush=True)


def _adder(parser: ArgumentParser) -> Callable[[str, str], ArgumentParser]:
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    return lambda name, summary: subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)


def _add_dir(parser: ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="DIR", default=".", help="server folder (default: this folder)")


def _add_days(parser: ArgumentParser) -> None:
    text = f"how long the certificate is valid (default: {CERTIFICATE_DAYS})"
    parser.add_argument("--days", type=_DAYS, default=CERTIFICATE_DAYS, help=text)
