"""``fedzo status`` and ``fedzo stop``: what a server, its clients and its run, or a site, are at; how to end a run."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from fedzo.commands.client import NO_LOCKS
from fedzo.commands.client import status as status_of_site
from fedzo.commands.server import certificate_problem
from fedzo.errors import ConfigError, ProtocolError, RunFolderError, printable, shell
from fedzo.records.decode import decode, parse_json, read_record
from fedzo.records.folder import (
    CONFIG,
    LOCK,
    METRICS,
    MULTIRUN,
    PRESENCE,
    PUBLIC,
    STOP,
    is_locked,
    raised_as,
    read_file,
    replace_file,
)
from fedzo.records.lines import from_end
from fedzo.records.log import decode_public
from fedzo.records.metrics import Round
from fedzo.records.presence import OUTCOME, Outcome, Presence
from fedzo.report.format import seconds_text
from fedzo.runtime.net.addresses import accepts
from fedzo.runtime.net.client_folder import SITE, ClientFolder
from fedzo.runtime.net.credentials import pem_of, read_certificate
from fedzo.runtime.net.daemons import NODE_LEASE_S
from fedzo.runtime.net.server_folder import ServerFolder

if TYPE_CHECKING:
    from fedzo.runtime.net.launch import Node

POLL_S = 0.3
MAX_SHOWN = 1000  # characters of what ended a run
Told = Generator[str, None, bool]
"""Lines for people; it returns whether all is well, as far as anybody can know."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run is at.

    Attributes:
        folder: Its folder.
        is_up: Whether its server is; None where nobody can know.
        presence: Who takes part, as its server told last; None where it tells nobody.
        rounds: How many are committed.
        total: How many there are to be.
        round_seconds: What the last round took, where that is known.
        last_rounds: By client, the last round that it took part in.
    """

    folder: Path
    is_up: bool | None
    presence: Presence | None
    rounds: int
    total: int
    round_seconds: float | None
    last_rounds: Mapping[int, int]

    @classmethod
    def look(cls, folder: Path, clients: Collection[int] = ()) -> _Run:
        """See what it is at: by what its server tells while that is up, otherwise by the end of its logs.

        Args:
            folder: The run's.
            clients: Whose last rounds are looked for, beside those of whom the server has told.

        Raises:
            RunFolderError: It has not begun, or its files are not those of a run.
        """
        total, is_up = _planned_rounds(folder), is_locked(folder / PUBLIC)
        presence = read_record(Presence, folder, PRESENCE, error=RunFolderError)
        rows = presence.clients if presence else ()
        if is_up and presence and presence.round_seconds is not None:  # before that the logs are short
            known = {row.client: row.last_round for row in rows if row.last_round is not None}
            return cls(folder, is_up, presence, presence.round, total, presence.round_seconds, known)
        rounds, missing, last_rounds = _rounds(folder), {*clients, *(row.client for row in rows)}, dict[int, int]()
        for line in from_end(folder, PUBLIC, decode_public):
            last_rounds |= dict.fromkeys(missing.intersection(line.attendance), line.round)
            missing.difference_update(line.attendance)
            if not missing:
                break
        return cls(folder, is_up, presence, rounds, total, _round_seconds(folder, rounds), last_rounds)

    def lines(self, what: str = "run") -> Told:
        """What it is at, and how it ended, if its server has left word of an error.

        It is well while somebody works on it, and after its last round. An earlier end is not told of meanwhile.
        """
        not_up = f"perhaps running ({NO_LOCKS})" if self.is_up is None else "not running"
        going = "running" if self.is_up else "finished" if self.rounds == self.total else not_up
        pace = "" if self.round_seconds is None else f", last round {seconds_text(self.round_seconds)}"
        yield f"{what} {self.folder}: {self.rounds} of {self.total} rounds{pace}, {going}"
        works = self.is_up or _is_worked_on(self.folder)
        outcome = None if works else read_record(Outcome, self.folder, OUTCOME, error=RunFolderError)
        if outcome:
            yield f"ended: {printable(outcome.text, most=MAX_SHOWN)}"
            return False
        return self.rounds == self.total or works is not False


def status(path: Path) -> Told:
    """What a server's folder, a site's, or a run's, is at.

    Raises:
        ConfigError: It is none of them.
    """
    if (path / CONFIG).is_file():
        return (yield from _status_of_run(path))
    if ServerFolder.is_one(path):
        return (yield from _status_of_server(ServerFolder(path)))
    if (path / SITE).exists():
        return (yield from status_of_site(ClientFolder(path)))
    raise ConfigError(f"{path}: it must be a server's folder, a site's or a run's, but is none. Check the path.")


def stop(run_dir: Path) -> Iterator[str]:
    """Ask whoever runs a run to end it between two rounds, and wait until it has.

    Raises:
        RunFolderError: Nobody runs it, or it is the folder of something else.
    """
    works = _is_worked_on(run_dir)
    if works is False:
        raise RunFolderError(f"run folder {run_dir}: no process of this machine runs it. There is nothing to stop.")
    if (run_dir / MULTIRUN).exists():
        jobs = sorted(path.parent for path in run_dir.glob(f"**/{PUBLIC}"))
        calls = [shell("fedzo stop", job) for job in jobs if _is_worked_on(job)]
        rule = "it must be a run's folder, but is that of a sweep, which ends when its job is stopped"
        raise RunFolderError(f"{run_dir}: {rule}. Call {' or '.join(calls) or 'fedzo stop JOB'}.")
    _planned_rounds(run_dir)  # refuses the folder of something else, which a process may have as well
    if works is None:
        replace_file(run_dir / STOP, "")
        yield f"asked to stop; whether a process runs it is not known ({NO_LOCKS})"
        return
    asked = False
    while _is_worked_on(run_dir):
        if not (run_dir / STOP).exists():  # a run that just begins removes what an earlier one left
            replace_file(run_dir / STOP, "")
        if not asked:
            yield "asked to stop; the current round is finished first"
        asked = True
        time.sleep(POLL_S)
    (run_dir / STOP).unlink(missing_ok=True)  # the run ended by itself
    rounds, total = _rounds(run_dir), _planned_rounds(run_dir)
    if rounds == total:
        yield f"the run has ended, after all its {rounds} rounds"
    else:
        yield f"stopped after {rounds} of {total} rounds. Continue with: {shell('fedzo resume', run_dir)}"


def _is_worked_on(run_dir: Path) -> bool | None:
    """Whether its server is up, or whoever starts that; None where nobody can know."""
    found = [is_locked(run_dir / name) for name in (PUBLIC, LOCK)]
    return True if True in found else None if None in found else False


def _status_of_run(run_dir: Path) -> Told:
    try:
        run = _Run.look(run_dir)
    except RunFolderError as error:
        yield f"run {run_dir}: not begun ({error})"
        return False
    is_well = yield from run.lines()
    if run.presence is None:
        return is_well
    clients = [(row, str(run.last_rounds.get(row.client, "-"))) for row in run.presence.clients]
    if run.is_up is not False:
        if run.is_up is None:
            yield "last server report:"
        rows = [[str(row.client), row.state, last, row.version or "-", row.why] for row, last in clients]
        yield from _table(["client", "state", "last round", "fedzo"], rows)
    else:  # nobody is there to see who is connected
        yield "as of its last round:"
        rows = [[str(row.client), last, row.version or "-"] for row, last in clients]
        yield from _table(["client", "last round", "fedzo"], rows)
    return is_well


def _status_of_server(folder: ServerFolder) -> Told:
    folder.check()
    listening = folder.listening
    is_up, certificate = accepts(listening.control), certificate_problem(folder)
    is_well = is_up and not certificate
    if not certificate:
        certificate = f"certificate valid for {read_certificate(folder.file('server.crt')).days_left:.0f} days"
    yield f"server {listening.address}: SuperLink {'up' if is_up else 'down'}, {certificate}"
    run: _Run | None = None
    if served := folder.served:
        try:
            run = _Run.look(Path(served.run), [client.index for client in folder.registry.clients])
            is_well = (yield from run.lines()) and is_well
        except RunFolderError as error:
            yield f"run {served.run}: not begun ({error})"
            is_well = False
    else:
        yield f"run: not known ({NO_LOCKS})" if folder.is_serving is None else "run: none"
        is_well = (yield from _last_run(folder)) and is_well
    present = {row.client: row for row in run.presence.clients} if run and run.is_up and run.presence else {}
    nodes = _nodes(folder) if is_up else {}
    rows = []
    for client in folder.registry.clients:
        node, here = nodes.get(pem_of(client.key)), present.get(client.index)
        state = "unknown" if not is_up else "connected" if node and node.online else "away"
        if state == "connected" and here and here.state != "away":
            state = "ready (model loaded)" if here.state == "ready" else here.state
        last = str(run.last_rounds.get(client.index, "-")) if run else "-"
        version, why = (here.version or "-", here.why) if here else ("-", "")
        rows.append([str(client.index), client.name, state, _seen(node), last, version, why])
    yield from _table(["client", "name", "state", "last seen", "last round", "fedzo"], rows)
    return is_well


def _last_run(folder: ServerFolder) -> Told:
    """How the run ended that was served last, if its folder is still there."""
    last = folder.last_served
    if last is None or not (Path(last.run) / CONFIG).is_file():
        return True
    try:
        return (yield from _Run.look(Path(last.run)).lines("last run"))
    except RunFolderError as error:
        yield f"last run {last.run}: not begun ({error})"
        return False


def _planned_rounds(run_dir: Path) -> int:
    """How many rounds a run is to have. The rest of its settings is left alone: to read it costs seconds of imports."""
    where, remedy = str(run_dir / CONFIG), "Give the folder of one."
    rule = f"{where}: it must hold the settings of a run"
    with raised_as(RunFolderError, rule, remedy):
        text = read_file(run_dir, CONFIG)
    try:
        return int(parse_json(text, where=where, error=RunFolderError)["fl"]["rounds"])
    except (RunFolderError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{rule}. {remedy}") from error


def _rounds(run_dir: Path) -> int:
    """How many rounds are committed."""
    last = next(from_end(run_dir, PUBLIC, decode_public), None)
    return 0 if last is None else last.round + 1


def _round_seconds(run_dir: Path, rounds: int) -> float | None:
    """What the last of the committed rounds took; the lines after its own are few."""
    for record in from_end(run_dir, METRICS, _of_round):
        if record is not None and record.round < rounds:
            return record.round_seconds
    return None


def _of_round(value: object, **where: Any) -> Round | None:
    """The metrics of a round; None for a line of another kind, of which a later version may have more."""
    is_one = isinstance(value, dict) and value.get("kind") == Round.kind
    return decode(Round, value, **where) if is_one else None


def _nodes(folder: ServerFolder) -> Mapping[bytes, Node]:
    from fedzo.runtime.net.launch import control  # here, since Flower takes seconds to import

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
    shown = [head, *([printable(cell) for cell in row] for row in rows)]  # some of it are words of other machines
    wide = [max(len(row[column]) for row in shown) for column in range(len(head))]
    for row in shown:
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, wide, strict=False))
        yield "  ".join([cells, *row[len(head) :]]).rstrip()
