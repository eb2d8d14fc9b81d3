"""``fedzo status`` and ``fedzo stop``: what a server, its clients and its run are at, and how to end the run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from fedzo.errors import ConfigError, ProtocolError, RunFolderError
from fedzo.fl.log_store import RunLog
from fedzo.records.decode import decode_json, parse_json
from fedzo.records.folder import CONFIG, PRESENCE, PUBLIC, STOP, is_locked, read_file, replace_file
from fedzo.records.metrics import Round
from fedzo.records.presence import Presence
from fedzo.report.format import seconds_text
from fedzo.runtime.net.addresses import accepts
from fedzo.runtime.net.credentials import pem_of, read_certificate
from fedzo.runtime.net.daemons import NODE_LEASE_S
from fedzo.runtime.net.parts import Node, control
from fedzo.runtime.net.server_folder import ServerFolder

POLL_S = 0.3


def status(path: Path) -> Iterator[str]:
    """What a server's folder, or a run's, is at; yields lines for people.

    Raises:
        ConfigError: It is neither.
    """
    if (path / CONFIG).is_file():
        yield from _run(path)
        if presence := _presence(path):
            last = _last_round(path)
            yield from _table(
                ["client", "state", "last round", "fedzo"],
                [
                    [str(row.client), row.state, last.get(row.client, "-"), row.version or "-", row.why]
                    for row in presence.clients
                ],
            )
    elif ServerFolder.is_one(path):
        yield from _server(ServerFolder(path))
    else:
        raise ConfigError(f"{path}: it must be a server's folder or a run's, but is neither. Check the path.")


def stop(run_dir: Path) -> Iterator[str]:
    """Ask whoever runs a run to end it between two rounds, and wait until it has.

    Raises:
        RunFolderError: Nobody runs it.
    """
    if not _is_worked_on(run_dir):
        raise RunFolderError(f"run folder {run_dir}: no process of this machine works on it. Nothing is to be stopped.")
    asked = False
    while _is_worked_on(run_dir):
        if not (run_dir / STOP).exists():  # a run that just begins removes what an earlier one left
            replace_file(run_dir / STOP, "")
        if not asked:
            yield "asked to stop; the round that is under way is finished first"
        asked = True
        time.sleep(POLL_S)
    (run_dir / STOP).unlink(missing_ok=True)  # the run ended by itself
    rounds, total = len(RunLog(run_dir).rounds), _planned_rounds(run_dir)
    if rounds == total:
        yield f"the run has ended, after all its {rounds} rounds"
    else:
        yield f"stopped after {rounds} of {total} rounds. Continue with: fedzo resume {run_dir}"


def _is_worked_on(run_dir: Path) -> bool:
    """Whether its server is up, or whoever starts that."""
    return is_locked(run_dir / PUBLIC) or is_locked(run_dir)


def _server(folder: ServerFolder) -> Iterator[str]:
    folder.check()
    listening = folder.listening
    is_up = accepts(listening.control)
    days = read_certificate(folder.file("server.crt")).days_left
    yield f"server {listening.address}: SuperLink {'up' if is_up else 'down'}, certificate valid for {days:.0f} days"
    served, presence, last = folder.served, None, dict[int, str]()
    if served is None:
        yield "run: none"
    else:
        yield from _run(Path(served.run))
        presence, last = _presence(Path(served.run)), _last_round(Path(served.run))
    nodes = _nodes(folder) if is_up else {}
    rows = []
    for client in folder.clients:
        node = nodes.get(pem_of(client.key))
        here = next((row for row in presence.clients if row.client == client.index), None) if presence else None
        state = "unknown" if not is_up else "connected" if node and node.online else "away"
        if state == "connected" and here and here.state in ("ready", "silent", "preparing", "refused"):
            state = {"ready": "ready (model loaded)"}.get(here.state, here.state)
        rows.append(
            [
                *(str(client.index), client.name, state, _seen(node), last.get(client.index, "-")),
                *((here.version or "-", here.why) if here else ("-", "")),
            ]
        )
    yield from _table(["client", "name", "state", "last seen", "last round", "fedzo"], rows)


def _run(run_dir: Path) -> Iterator[str]:
    try:
        total, log = _planned_rounds(run_dir), RunLog(run_dir)
    except RunFolderError as error:
        yield f"run {run_dir}: not begun ({error})"
        return
    done = len(log.rounds) == total
    going = "going on" if is_locked(run_dir / PUBLIC) else "finished" if done else "not running"
    told = [record for record in log.metrics if isinstance(record, Round)]
    pace = f", {seconds_text(told[-1].round_seconds)} for the last" if told else ""
    yield f"run {run_dir}: {len(log.rounds)} of {total} rounds{pace}, {going}"


def _planned_rounds(run_dir: Path) -> int:
    """How many rounds a run is to have. The rest of its settings is left alone: to read it costs seconds of imports."""
    where = str(run_dir / CONFIG)
    try:
        return int(parse_json(read_file(run_dir, CONFIG), where=where, error=RunFolderError)["fl"]["rounds"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{where}: it must hold the settings of a run. Give the folder of one.") from error


def _presence(run_dir: Path) -> Presence | None:
    try:
        text = read_file(run_dir, PRESENCE)
    except OSError:
        return None
    found: Presence = decode_json(Presence, text, where=str(run_dir / PRESENCE), error=RunFolderError)
    return found


def _last_round(run_dir: Path) -> dict[int, str]:
    """By client, the last round that it took part in."""
    try:
        rounds = RunLog(run_dir).rounds
    except RunFolderError:
        return {}
    return {client: str(line.round) for line in rounds for client in line.attendance}


def _nodes(folder: ServerFolder) -> Mapping[bytes, Node]:
    try:
        with control(folder.endpoint) as flower:
            return {node.public_key: node for node in flower.nodes()}
    except httpx.HTTPError as error:
        raise ProtocolError(f"SuperLink {folder.listening.control}: it must answer, but: {error}.") from error


def _seen(node: Node | None) -> str:
    if node is None or not node.online_until:
        return "never"
    return f"{seconds_text(max(0.0, time.time() - (node.online_until - NODE_LEASE_S)))} ago"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they must be; what a row has more than the head stands at its end."""
    wide = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, wide, strict=False))
        yield "  ".join([cells, *row[len(head) :]]).rstrip()
