"""``fedzo server`` and ``fedzo client``: what they take."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable

from fedzo.cli.arguments import whole_number

Parser = argparse.ArgumentParser
CERTIFICATE_DAYS = 365
_PORT, _INDEX, _DAYS = whole_number(1, 65535), whole_number(0, 0xFFFFFFFD), whole_number(1, 3650)


def add_server(parser: Parser) -> None:
    """The commands of a server."""
    add = _adder(parser)

    own = add("init", "make a server's folder: certificate authority, certificate, secret, client registry")
    own.add_argument("dir", metavar="DIR", help="folder to make; in one that is there, only what is missing is made")
    name = socket.gethostname()
    text = f"a name or address at which sites reach this machine; may be repeated (default: {name})"
    own.add_argument("--host", metavar="HOST", action="append", help=text.replace("%", "%%"))
    own.add_argument("--port", type=_PORT, default=8443, help="port for sites (default: 8443)")
    own.add_argument("--control-port", type=_PORT, default=8444, help="port for this machine (default: 8444)")
    _add_days(own)

    own = add("add-client", "register a client: its key, and which client of a run it is")
    own.add_argument("name", metavar="NAME", help="of the client: letters, digits and . _ -")
    own.add_argument("--index", type=_INDEX, help="of the client in a run, from 0 (default: the lowest that is free)")
    own.add_argument("--key", metavar="KEY", help="the site's public key, or a file with it (default: make a key here)")
    _add_dir(own)

    own = add("remove-client", "revoke a client's key")
    own.add_argument("name", metavar="NAME", help="of the client")
    _add_dir(own)

    own = add("renew", "write a new certificate; sites need nothing new")
    own.add_argument("--host", metavar="HOST", action="append", help="as for init (default: those of the old one)")
    _add_days(own)
    _add_dir(own)

    own = add("up", "keep the SuperLink up until this command is ended")
    own.add_argument("dir", metavar="DIR", nargs="?", default=".", help="server folder (default: this folder)")


def add_client(parser: Parser) -> None:
    """The commands of a site."""
    add = _adder(parser)

    own = add("init", "make a site's folder: key, site file")
    own.add_argument("dir", metavar="DIR", help="folder to make; in one that is there, only what is missing is made")
    own.add_argument("--server", metavar="HOST:PORT", help="the server (an invitation holds it, too)")
    own.add_argument("--invitation", metavar="FILE", help="what `fedzo server add-client` wrote for this site")
    own.add_argument("--ca", metavar="FILE", help="the server's ca.crt, where there is no invitation")

    own = add("up", "keep the site's SuperNode and executor up until this command is ended")
    own.add_argument("dir", metavar="DIR", nargs="?", default=".", help="client folder (default: this folder)")


def _adder(parser: Parser) -> Callable[[str, str], Parser]:
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    return lambda name, summary: subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)


def _add_dir(parser: Parser) -> None:
    parser.add_argument("--dir", metavar="DIR", default=".", help="server folder (default: this folder)")


def _add_days(parser: Parser) -> None:
    text = f"how long the certificate is valid (default: {CERTIFICATE_DAYS})"
    parser.add_argument("--days", type=_DAYS, default=CERTIFICATE_DAYS, help=text)
