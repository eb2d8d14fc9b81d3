"""The commands of a server and of a site that start nothing; the rest is walked through over the network."""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml

from fedzo.cli import BAD_INPUT, INTERRUPTED, RUN_FAILED, main
from fedzo.commands.client import up
from fedzo.commands.doctor import doctor, folder_checks
from fedzo.config.schema import LaunchConfig, filled
from fedzo.config.travel import load_site, to_json
from fedzo.data.config import TaskConfig
from fedzo.errors import ProtocolError
from fedzo.fl.config import FlConfig
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.records.decode import to_json as to_line
from fedzo.records.folder import LOCK, folder_of_one_process
from fedzo.records.log import Proof
from fedzo.records.metrics import Round
from fedzo.records.presence import ClientPresence, Presence
from fedzo.runtime.net._flower_control import _told
from fedzo.runtime.net.client_folder import ClientFolder, read_invitation
from fedzo.runtime.net.credentials import make_key, read_certificate
from fedzo.runtime.net.key_registry import KeyRegistry
from fedzo.runtime.net.processes import Processes
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.testing.tiny_models import save_tiny_model
from fedzo.zo import directions
from fedzo.zo.log import ScalarRecord

Capture = pytest.CaptureFixture[str]


def test_init_says_where_sites_connect_and_for_which_names(server: Path, capsys: Capture) -> None:
    assert main(["server", "init", str(server)]) == 0  # again: what is there stays
    said = capsys.readouterr().out

    assert "sites connect to fed.example.org:9443" in said
    assert "certificate for fed.example.org, localhost, 127.0.0.1, valid for 365 days" in said


def test_a_server_with_an_ipv6_address_listens_at_such_addresses_too(tmp_path: Path, capsys: Capture) -> None:
    hosts = ["--host", "fed.example.org", "--host", "2001:db8::5"]
    assert main(["server", "init", str(tmp_path), *hosts, "--port", "9443"]) == 0

    listening = ServerFolder(tmp_path).listening
    assert (listening.address, listening.listen) == ("fed.example.org:9443", "[::]:9443")
    assert "certificate for fed.example.org, localhost, 2001:db8::5, 127.0.0.1" in capsys.readouterr().out


def test_a_client_is_added_by_invitation_and_again_without_harm(server: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["server", "add-client", "hospital", "--index", "2", "--dir", str(server)]
    assert [main(command), main(command)] == [0, 0]

    invitation = server / "invitations" / "hospital.json"
    assert main(["client", "init", str(tmp_path / "site"), "--invitation", str(invitation)]) == 0
    (client,) = ServerFolder(server).registry.clients
    site = ClientFolder(tmp_path / "site")
    site.check()
    assert (client.index, client.key) == (2, site.public_key)
    assert site.address == "fed.example.org:9443"
    assert load_site(site.file("site.yaml")).limits.tasks == []
    assert capsys.readouterr().out.count("client 2: hospital, key SHA256:") == 2


def test_an_invitation_that_cannot_be_written_leaves_no_key_that_nobody_has(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["server", "add-client", "hospital", "--dir", str(server)]

    def full(file: Path, invitation: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedzo.commands.server.write_invitation", full)
        assert main(command) != 0
    assert ServerFolder(server).registry.clients == []
    with monkeypatch.context() as patch:
        patch.setattr(KeyRegistry, "_write", full)
        assert main(command) != 0
    assert not list((server / "invitations").iterdir())

    assert main(command) == 0
    (client,) = ServerFolder(server).registry.clients
    site = ClientFolder.make(
        tmp_path / "site", address="h:1", site="", invitation=read_invitation(server / "invitations" / "hospital.json")
    )
    assert site.public_key == client.key


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("none.pub", "none.pub: there is no such file or folder"),
        ("ssh-rsa " + "A" * 5000, "the public key must be one line"),
        ("-----BEGIN PUBLIC KEY----- AAAA", "the public key must be one line"),
    ],
)
def test_a_key_that_cannot_be_read_is_named(server: Path, key: str, says: str, capsys: Capture) -> None:
    assert main(["server", "add-client", "a", "--key", key, "--dir", str(server)]) == BAD_INPUT
    assert says in capsys.readouterr().err
    assert ServerFolder(server).registry.clients == []


def test_a_client_moves_to_the_index_of_one_that_has_left_while_no_run_is_served(
    server: Path, tmp_path: Path, capsys: Capture
) -> None:
    keys = [make_key(tmp_path / f"h{index}") for index in range(3)]

    def add(index: int, *, of: int) -> int:
        command = ["server", "add-client", f"h{of}", "--index", str(index), "--key", keys[of], "--dir", str(server)]
        return main(command)

    assert [add(index, of=index) for index in range(3)] == [0, 0, 0]
    assert main(["server", "remove-client", "h1", "--dir", str(server)]) == 0
    with ServerFolder(server).serving("/runs/one"):
        assert add(1, of=2) == BAD_INPUT
    assert "client h2: it must keep its index 2 while a run is served" in capsys.readouterr().err

    assert add(1, of=2) == 0

    assert "client 1: h2, key SHA256:" in capsys.readouterr().out
    clients = ServerFolder(server).registry.clients
    assert [(client.index, client.name, client.key) for client in clients] == [(0, "h0", keys[0]), (1, "h2", keys[2])]


def test_what_root_changes_in_a_servers_folder_stays_the_services(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``sudo``: a SuperLink that cannot read the registry any more would go on with the one before."""
    main(["server", "add-client", "a", "--dir", str(server)])
    is_root, give = os.geteuid() == 0, os.fchown
    if is_root:
        for path in (server, *server.rglob("*")):
            os.chown(path, 1001, 1002)
    owner = server.stat().st_uid, server.stat().st_gid
    given: list[tuple[int, ...]] = []

    def gives(opened: int, *to: int) -> None:
        given.append(to)
        if is_root:
            give(opened, *to)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", gives)
    for command, written in ((["remove-client", "a"], 1), (["renew"], 1), (["add-client", "b"], 3)):
        given.clear()
        assert main(["server", *command, "--dir", str(server)]) == 0
        assert given == [owner] * written  # registry; certificate; key, invitation and registry
    given.clear()
    with ServerFolder(server).serving("/runs/one"):
        assert given == [owner]


def test_a_file_with_a_key_may_have_a_blank_in_its_name(server: Path, tmp_path: Path, capsys: Capture) -> None:
    main(["client", "init", str(tmp_path / "my site"), "--server", "h:1"])
    assert f"and fedzo client up '{tmp_path / 'my site'}'\n" in capsys.readouterr().out
    key = tmp_path / "my site" / "key.pub"

    assert main(["server", "add-client", "a", "--key", str(key), "--dir", str(server)]) == 0
    (client,) = ServerFolder(server).registry.clients
    assert key.read_text().startswith(client.key)


def test_a_file_with_a_key_may_have_gone_through_another_system(server: Path, tmp_path: Path) -> None:
    """As a certificate may: with a byte order mark and other line ends."""
    key = make_key(tmp_path / "key")
    (tmp_path / "key.pub").write_bytes(f"\ufeff{key} clinic\r\n".encode())

    assert main(["server", "add-client", "a", "--key", str(tmp_path / "key.pub"), "--dir", str(server)]) == 0
    (client,) = ServerFolder(server).registry.clients
    assert client.key == key


def test_a_site_with_a_key_of_its_own_is_told_what_to_send_and_what_it_lacks(tmp_path: Path, capsys: Capture) -> None:
    assert main(["client", "init", str(tmp_path / "site"), "--server", "h:1"]) == 0

    said = capsys.readouterr().out
    assert (tmp_path / "site" / "key.pub").read_text().strip() in said
    assert "still needed: the server's ca.crt" in said
    assert main(["client", "up", str(tmp_path / "site")]) == BAD_INPUT
    assert "ca.crt must be the server's certificate authority, but is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["server", "up", "."], "it must hold what `fedzo server init` writes"),
        (["client", "up", "."], "it must hold what `fedzo client init` writes"),
        (["client", "init", "site"], "--server must be given, or --invitation FILE"),
        (["client", "init", "site", "--server", "nowhere"], "an address must be HOST:PORT"),
        (["server", "remove-client", "x"], "it must hold what `fedzo server init` writes"),
        (["status", "."], "it must be a server's folder, a site's or a run's, but is none"),
        (["doctor", "."], "it must be a server's folder or a site's, but is neither"),
        (["client", "init", "site", "--server", "h:1", "--ca", "none.crt"], "none.crt: there is no such file"),
        (["client", "init", "site", "--invitation", "none.json"], "invitation none.json: it must be a readable file"),
        (
            ["client", "init", "site", "--invitation", "file", "--ca", "file"],
            "--ca must not be given beside --invitation",
        ),
        (["server", "init", "file/server"], "it must be readable and writable, got 'Not a directory'"),
        (["server", "init", "s", "--host", "m\u00fcnchen.de"], "--host must be a host name or an IP address, got 'm"),
        (["server", "init", "s", "--host", ""], "--host must be a host name or an IP address, got ''"),
        (["server", "init", "s", "--host", "*.a b"], "--host must be a host name or an IP address, got '*.a b'"),
        (["server", "init", "s", "--host", "*.a.org"], "the first must be a name at which sites reach this machine"),
        (["client", "init", "s", "--server", "h:1", "--ca", "file"], "file: it must be a certificate"),
        (["server", "init", "s", "--port", "7", "--control-port", "7"], "--control-port must differ, got 7. Change"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    command: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    assert main(command) == BAD_INPUT
    assert says in capsys.readouterr().err
    assert not (tmp_path / "s" / "server.json").exists()


def test_a_site_trusts_one_authority(server: Path, tmp_path: Path, capsys: Capture) -> None:
    init = ["client", "init", str(tmp_path / "site"), "--server", "h:1", "--ca"]
    assert main(["server", "init", str(tmp_path / "other")]) == 0
    assert [main([*init, str(server / "ca.crt")]) for _ in range(2)] == [0, 0]

    assert main([*init, str(tmp_path / "other" / "ca.crt")]) == BAD_INPUT
    assert "must be of the same authority, but is another. Remove it first" in capsys.readouterr().err
    assert (tmp_path / "site" / "ca.crt").read_bytes() == (server / "ca.crt").read_bytes()


def test_a_site_that_goes_up_has_the_limits_of_its_file(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, started = tmp_path / "site", []
    main(["client", "init", str(site), "--server", "h:1", "--ca", str(server / "ca.crt")])
    (site / "site.yaml").write_text("limits: {step_limit_s: 7.5}\n")

    def start(processes: Processes, name: str, command: list[str], **rest: object) -> None:
        started.append((name, command))

    monkeypatch.setattr(Processes, "start", start)

    next(up(ClientFolder(site)))

    (executor,) = [command for name, command in started if name == "executor"]
    assert executor[executor.index("--step-limit-s") + 1] == "7.5"


def test_a_site_is_up_once(server: Path, tmp_path: Path, capsys: Capture) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "h:1", "--ca", str(server / "ca.crt")])
    (site / "logs" / "supernode.log").write_text("of the first")

    with folder_of_one_process(site):
        assert main(["client", "up", str(site)]) == RUN_FAILED

    assert f"client folder {site}: another process is using it" in capsys.readouterr().err
    assert (site / "logs" / "supernode.log").read_text() == "of the first"


@pytest.mark.parametrize("settings", ["{", "{}", '{"fl": 3}', '{"fl": {"rounds": "many"}}'])
def test_status_of_a_folder_without_settings_says_so(settings: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(settings)

    assert main(["status", str(tmp_path)]) == RUN_FAILED
    assert f"not begun ({tmp_path / 'config.json'}: it must hold the settings of a run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "presence.json"])
def test_status_tells_of_a_link_in_a_run_folder(name: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    """The folder may come from somebody else; what the link leads to is neither read nor called damaged."""
    outside = (run / name).rename(tmp_path / "outside")
    (run / name).symlink_to(outside)

    assert main(["status", str(run)]) == RUN_FAILED

    said = capsys.readouterr().out
    assert f"not begun ({run / name}: it must lie in its folder itself, got a link to {outside}" in said


def test_status_stop_and_init_need_no_library_that_takes_seconds_to_import() -> None:
    heavy = "{'transformers', 'peft', 'hydra', 'pandas', 'torch', 'numba', 'flwr'}"
    commands = ", ".join(f"fedzo.commands.{name}" for name in ("client", "server", "status"))
    code = f"import sys, {commands}; print(sorted({heavy} & set(sys.modules)))"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two clients with two of its three rounds, as its server left it, or is at work on it."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    task = TaskConfig(name="rotten_tomatoes", template="{text}", candidates=[" bad", " good"])
    (folder / "config.json").write_text(to_json(filled(LaunchConfig(task=task, fl=FlConfig(rounds=3)))))
    proof, public, metrics = Proof(chain="a" * 64, check=1, digest=None), "", ""
    for number, attendance in enumerate([[0, 1], [0]]):
        record = ScalarRecord(round=number, lr=0.5, owners=(0,), coefficients=np.ones((1, 1, 1), np.float32))
        public += to_line(record.to_line(attendance=attendance, proof=proof)) + "\n"
        told = Round(
            seconds=1.0,
            round=number,
            calibration=False,
            loss=None,
            mean_abs_g=None,
            payload_up_bytes=4,
            payload_down_bytes=4,
            message_up_bytes=90,
            message_down_bytes=90,
            round_seconds=0.5,
            dropped_probes=0,
            clip_bound=None,
            clipped=0,
            absent=(),
            reasons={},
            clients=(),
        )
        metrics += to_line(told) + "\n"
    (folder / "public.jsonl").write_text(public)
    (folder / "metrics.jsonl").write_text(metrics)
    here = [
        ClientPresence(client=0, state="ready", why="asked 320 s ago", version="0.1.0", last_round=0),
        ClientPresence(client=1, state="refused", why="it says \x1b]52;c;ZWNobw==\x07"),
    ]
    (folder / "presence.json").write_text(to_line(Presence(round=1, round_seconds=12.0, clients=tuple(here))))
    return folder


def test_status_of_a_run_that_goes_on_is_what_its_server_tells_however_long_the_logs_are(
    run: Path, capsys: Capture
) -> None:
    for name in ("public.jsonl", "metrics.jsonl"):
        (run / name).write_text("what nobody reads\n")

    with (run / "public.jsonl").open() as server:
        fcntl.flock(server, fcntl.LOCK_EX)
        assert main(["status", str(run)]) == 0

    said = capsys.readouterr().out
    first, *table = said.splitlines()
    assert first == f"run {run}: 1 of 3 rounds, last round 12 s, running"
    assert [line.split() for line in table] == [
        ["client", "state", "last", "round", "fedzo"],
        ["0", "ready", "0", "0.1.0", "asked", "320", "s", "ago"],
        ["1", "refused", "-", "-", "it", "says", "]52;c;ZWNobw=="],
    ]
    assert said.replace("\n", "").isprintable()


def test_status_of_a_run_that_has_died_says_why_and_calls_nobody_ready(run: Path, capsys: Capture) -> None:
    outcome = {"error": "FederationError", "text": "round 2: too few replies\n\x1b[2J(client 0: not connected)"}
    (run / "logs" / "outcome.json").write_text(json.dumps(outcome))

    assert main(["status", str(run)]) == RUN_FAILED

    assert capsys.readouterr().out.splitlines() == [
        f"run {run}: 2 of 3 rounds, last round 0.5 s, not running",
        "ended: round 2: too few replies  [2J(client 0: not connected)",
        "as of its last round:",
        "client  last round  fedzo",
        "0       1           0.1.0",
        "1       0           -",
    ]


def test_status_of_a_run_that_somebody_has_resumed_does_not_tell_how_it_ended_before(
    server: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Who resumes it has the folder first; its server removes the word of the earlier end only as it starts."""
    monkeypatch.setattr("fedzo.commands.status._nodes", lambda folder: {})
    monkeypatch.setattr("fedzo.commands.status.accepts", lambda address: True)
    (run / "logs" / "outcome.json").write_text(json.dumps({"error": "FederationError", "text": "too few replies"}))
    with ServerFolder(server).serving(str(run)):
        pass

    for path in (run, server):
        capsys.readouterr()
        with folder_of_one_process(run):
            assert main(["status", str(path)]) == 0
        assert "ended" not in capsys.readouterr().out
        assert main(["status", str(path)]) == RUN_FAILED
        assert "ended: too few replies" in capsys.readouterr().out


def test_status_of_a_run_that_is_down_reads_the_end_of_its_logs_alone(run: Path, capsys: Capture) -> None:
    for name in ("public.jsonl", "metrics.jsonl"):
        (run / name).write_text("what nobody reads\n" + (run / name).read_text())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "of a later version"}\n{"kind": "rou')

    assert main(["status", str(run)]) == RUN_FAILED

    assert capsys.readouterr().out.splitlines() == [
        f"run {run}: 2 of 3 rounds, last round 0.5 s, not running",
        "as of its last round:",
        "client  last round  fedzo",
        "0       1           0.1.0",
        "1       0           -",
    ]


NO_LOCKS = "(the file system has no locks)"


@pytest.mark.usefixtures("no_locks")
def test_status_of_a_run_that_may_go_on_says_so_and_shows_what_its_server_told(
    server: Path, run: Path, capsys: Capture
) -> None:
    with ServerFolder(server).serving(str(run)):
        capsys.readouterr()
        assert main(["status", str(run)]) == 0
        assert main(["status", str(server)]) == RUN_FAILED  # its SuperLink is down

    said = capsys.readouterr().out.splitlines()
    going = f"run {run}: 2 of 3 rounds, last round 0.5 s, perhaps running {NO_LOCKS}"
    assert said[:2] == [going, "last server report:"]
    assert [line.split()[:2] for line in said[2:5]] == [["client", "state"], ["0", "ready"], ["1", "refused"]]
    assert said[6:8] == [f"run: not known {NO_LOCKS}", f"last {going}"]
    settings = (run / "config.json").read_text()
    (run / "config.json").write_text(settings.replace('"rounds": 3', '"rounds": 2'))
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"run {run}: 2 of 2 rounds, last round 0.5 s, finished\n")


@pytest.mark.usefixtures("no_locks")
def test_a_run_that_may_go_on_is_asked_to_stop(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["stop", str(run)]) == 0

    assert capsys.readouterr().out == f"asked to stop; whether a process runs it is not known {NO_LOCKS}\n"
    assert (run / "stop").exists()
    assert main(["stop", str(tmp_path)]) != 0  # no run's folder
    assert not (tmp_path / "stop").exists()


@pytest.mark.usefixtures("no_locks")
def test_a_run_that_may_just_begin_is_asked_to_stop(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(to_json(filled(LaunchConfig(fl=FlConfig(rounds=2)))))

    with folder_of_one_process(tmp_path):
        assert main(["stop", str(tmp_path)]) == 0

    assert capsys.readouterr().out == f"asked to stop; whether a process runs it is not known {NO_LOCKS}\n"


def test_a_run_that_nobody_works_on_is_not_stopped(run: Path, capsys: Capture) -> None:
    assert main(["stop", str(run)]) != 0

    assert f"run folder {run}: no process of this machine runs it" in capsys.readouterr().err
    assert not (run / "stop").exists()


def test_a_sweep_is_not_stopped_and_its_job_at_work_named(tmp_path: Path, capsys: Capture) -> None:
    sweep = tmp_path / "my sweep"
    jobs = [sweep / "seed-0", sweep / "seed-1"]
    for job in jobs:
        job.mkdir(parents=True)
        (job / "public.jsonl").touch()
    (sweep / "multirun.yaml").touch()

    with folder_of_one_process(sweep), (jobs[1] / "public.jsonl").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert main(["stop", str(sweep)]) == RUN_FAILED

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(f"that of a sweep, which ends when its job is stopped. Call fedzo stop '{jobs[1]}'.\n")
    assert not list(sweep.rglob("stop"))
    assert main(["stop", str(sweep)]) == RUN_FAILED
    assert "There is nothing to stop" in capsys.readouterr().err


def test_what_a_process_has_and_is_no_run_is_not_stopped(tmp_path: Path, capsys: Capture) -> None:
    """Such as the folder of a site that is up."""
    with folder_of_one_process(tmp_path):
        assert main(["stop", str(tmp_path)]) == RUN_FAILED

    assert f"{tmp_path / 'config.json'}: it must hold the settings of a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / LOCK]


def test_status_of_a_server_that_serves_no_run_says_how_the_last_one_ended(
    server: Path, run: Path, capsys: Capture
) -> None:
    (run / "logs" / "outcome.json").write_text(json.dumps({"error": "FederationError", "text": "too few replies"}))
    with ServerFolder(server).serving(str(run)):
        pass
    capsys.readouterr()

    assert main(["status", str(server)]) == RUN_FAILED

    said = capsys.readouterr().out.splitlines()
    assert said[1:4] == [
        "run: none",
        f"last run {run}: 2 of 3 rounds, last round 0.5 s, not running",
        "ended: too few replies",
    ]
    shutil.rmtree(run)
    assert main(["status", str(server)]) == RUN_FAILED  # its SuperLink is down
    assert "last run" not in capsys.readouterr().out


def test_status_exits_with_1_where_a_server_or_its_run_needs_somebody(
    server: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def code() -> int:
        return main(["status", str(server)])

    monkeypatch.setattr("fedzo.commands.status._nodes", lambda folder: {})
    assert code() == RUN_FAILED  # its SuperLink is down
    monkeypatch.setattr("fedzo.commands.status.accepts", lambda address: True)
    assert code() == 0
    main(["server", "renew", "--dir", str(server), "--days", "5"])
    capsys.readouterr()
    assert code() == RUN_FAILED
    first = f"SuperLink up, certificate valid for 5 days. `fedzo server renew --dir {server}`\n"
    assert capsys.readouterr().out.partition(": ")[2].startswith(first)
    main(["server", "renew", "--dir", str(server), "--days", "90"])

    with ServerFolder(server).serving(str(run)), (run / "public.jsonl").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert code() == main(["status", str(run)]) == 0
        (run / "config.json").rename(run / "config")
        assert code() == RUN_FAILED  # nobody can say what it is
        (run / "config").rename(run / "config.json")
    assert code() == main(["status", str(run)]) == RUN_FAILED  # it was killed, as where its machine went down
    with folder_of_one_process(run):  # whoever has just resumed it
        assert code() == main(["status", str(run)]) == 0
    settings = (run / "config.json").read_text()
    (run / "config.json").write_text(settings.replace('"rounds": 3', '"rounds": 2'))
    assert code() == main(["status", str(run)]) == 0
    (run / "logs" / "outcome.json").write_text(json.dumps({"error": "FederationError", "text": "no score"}))
    assert code() == main(["status", str(run)]) == RUN_FAILED


def test_a_run_that_nobody_runs_is_not_stopped(tmp_path: Path, capsys: Capture) -> None:
    assert main(["stop", str(tmp_path)]) == RUN_FAILED

    assert "no process of this machine runs it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_just_begins_is_asked_to_stop_until_it_has_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Who starts it has the folder, its server not yet the log; it removes what an earlier stop has left there."""
    (tmp_path / "config.json").write_text(to_json(filled(LaunchConfig(fl=FlConfig(rounds=2)))))
    (tmp_path / "public.jsonl").write_text("")
    asked = []
    with contextlib.ExitStack() as launcher:
        launcher.enter_context(folder_of_one_process(tmp_path))

        def look(seconds: float) -> None:
            asked.append((tmp_path / "stop").exists())
            if len(asked) == 1:
                (tmp_path / "stop").unlink()
            else:
                launcher.close()

        monkeypatch.setattr("fedzo.commands.status.time.sleep", look)
        assert main(["stop", str(tmp_path)]) == 0

    assert asked == [True, True]
    assert "stopped after 0 of 2 rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rounds", "says"),
    [
        (2, "the run has ended, after all its 2 rounds\n"),
        (1, "stopped after 1 of 2 rounds. Continue with: fedzo resume {run}\n"),
    ],
)
def test_a_run_that_ends_by_itself_is_not_called_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, rounds: int, says: str
) -> None:
    task = TaskConfig(name="rotten_tomatoes", template="{text}", candidates=[" bad", " good"])
    (tmp_path / "config.json").write_text(to_json(filled(LaunchConfig(task=task, fl=FlConfig(rounds=2)))))
    proof = Proof(chain="a" * 64, check=1, digest=None)
    each = [ScalarRecord(round=i, lr=0.5, owners=(0,), coefficients=np.ones((1, 1, 1), np.float32)) for i in range(2)]
    lines = [to_line(record.to_line(attendance=[0], proof=proof)) + "\n" for record in each]
    (tmp_path / "public.jsonl").write_text("".join(lines[:rounds]))
    asked = []
    with (tmp_path / "public.jsonl").open() as run:  # whoever runs it
        fcntl.flock(run, fcntl.LOCK_EX)

        def end(seconds: float) -> None:
            asked.append((tmp_path / "stop").exists())
            fcntl.flock(run, fcntl.LOCK_UN)

        monkeypatch.setattr("fedzo.commands.status.time.sleep", end)
        assert main(["stop", str(tmp_path)]) == 0

    assert asked == [True]
    assert not (tmp_path / "stop").exists()
    assert capsys.readouterr().out.endswith(says.format(run=tmp_path))


def status_error(status: int) -> httpx.HTTPStatusError:
    response = httpx.Response(status, request=httpx.Request("POST", "https://127.0.0.1"))
    return httpx.HTTPStatusError("", request=response.request, response=response)


def test_what_a_superlink_refuses_is_told_from_what_it_cannot_do_at_the_moment() -> None:
    with (
        pytest.raises(ProtocolError, match=r"the key must be taken, but says: status 409"),
        _told("the key must be taken"),
    ):
        raise status_error(409)
    with pytest.raises(httpx.HTTPStatusError), _told("the key must be taken"):
        raise status_error(500)  # as where its database is locked


def test_a_server_is_up_once_and_the_second_start_removes_nothing(server: Path, capsys: Capture) -> None:
    (server / "superlink.db").write_text("of the first, which does not listen yet")

    with (server / "up.lock").open("ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert main(["server", "up", str(server)]) == RUN_FAILED

    assert f"server folder {server}: another process is using it" in capsys.readouterr().err
    assert (server / "superlink.db").read_text() == "of the first, which does not listen yet"


def test_a_link_in_a_servers_folder_is_not_followed_and_is_called_by_no_other_folder(
    server: Path, tmp_path: Path, capsys: Capture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (server / "invitations").symlink_to(outside)
    (server / "up.lock").symlink_to(outside / "file")
    for name, command in (("invitations", ["add-client", "a", "--dir"]), ("up.lock", ["up"])):
        capsys.readouterr()
        assert main(["server", *command, str(server)]) == RUN_FAILED
        said = capsys.readouterr().err
        assert f"{server / name}: it must lie in its folder itself, got a link to {outside}" in said
        assert "run folder" not in said

    assert list(outside.iterdir()) == []
    assert ServerFolder(server).registry.clients == []


def test_invitations_that_only_their_owner_can_close_are_told_of(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refused(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    room = server / "invitations"
    room.mkdir()
    room.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refused)
    capsys.readouterr()

    assert main(["server", "add-client", "a", "--dir", str(server)]) == 0

    told = capsys.readouterr().out.splitlines()[0]
    assert told == f"{room}: others may read it, and only its owner can close it: chmod 700 {room}"


def test_a_superlink_that_does_not_answer_is_told_its_clients_at_the_next_look(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked = []
    errors = {1: httpx.ConnectError("it is started again"), 2: status_error(500), 3: KeyboardInterrupt()}

    def register(folder: ServerFolder) -> None:
        asked.append(folder)
        with _told("a key must be registered"):
            raise errors[len(asked)]

    stand_ins = {"start_superlink": lambda *_, **__: None, "wait_for_superlink": lambda *_, **__: None}
    monkeypatch.setattr("fedzo.commands.server.LOOK_S", 0.0)
    for name, stand_in in {**stand_ins, "register_clients": register}.items():
        monkeypatch.setattr(f"fedzo.runtime.net.launch.{name}", stand_in)

    assert main(["server", "up", str(server)]) == 0
    assert len(asked) == 3
    assert "clients are registered" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plain", 'a "b" $c `d` %e'])
def test_services_are_filled_in_for_this_folder_and_python(name: str, tmp_path: Path) -> None:
    server, site = tmp_path / f"server {name}", tmp_path / f"site {name}"
    main(["server", "init", str(server), "--host", "h"])
    main(["client", "init", str(site), "--server", "h:1"])

    for file, words in (
        (server / "fedzo-server.service", ["server", "up", str(server)]),
        (server / "fedzo-run@.service", ["resume", "%f"]),  # the path that stands behind the @ of the unit
        (site / "fedzo-client.service", ["client", "up", str(site)]),
    ):
        unit = configparser.RawConfigParser()
        unit.read(file)
        started = shlex.split(unit["Service"]["ExecStart"].replace("%%", "%").replace("$$", "$"))
        assert started == [sys.executable, "-P", "-m", "fedzo", *words]  # not the fedzo of the folder it is called in
        assert unit["Service"]["KillMode"] == "mixed"  # its processes are ended by the command, in order
    script = (site / "client.sbatch").read_text()
    assert "$SLURM_CPUS_PER_TASK" in script
    assert "\n##SBATCH --gres=gpu:1\n" in script
    assert "\n#SBATCH --gres" not in script  # which a cluster without GPUs refuses
    told = ["bash", "-c", script.replace("exec ", "printf '%s\\n' ")]
    started = subprocess.run(told, check=True, capture_output=True, text=True).stdout.splitlines()
    assert started == [sys.executable, "-P", "-m", "fedzo", "client", "up", str(site)]


def test_the_unit_of_a_run_begins_it_again_after_an_error_and_not_after_a_stop(server: Path) -> None:
    unit = configparser.RawConfigParser()
    unit.read(server / "fedzo-run@.service")

    assert (unit["Service"]["Restart"], unit["Service"]["SuccessExitStatus"]) == ("on-failure", str(INTERRUPTED))
    assert "fedzo-server.service" in unit["Unit"]["After"].split()  # at a shutdown the run ends first
    assert unit["Service"]["CacheDirectory"] == "%p"  # one for all runs: a path's escapes are no name of a folder
    assert unit["Service"]["Environment"] == "NUMBA_CACHE_DIR=%C/%p FEDZO_CACHE=%C/%p/models"


def test_a_container_of_a_site_is_healthy_while_the_site_is_up(server: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "h:1", "--ca", str(server / "ca.crt")])
    check = yaml.safe_load((site / "compose.yaml").read_text())["services"]["client"]["healthcheck"]
    how, program, *words = check["test"]
    command = [str(site) if word == "/fedzo" else word for word in words]

    assert (how, program) == ("CMD", "fedzo")
    assert main(command) == RUN_FAILED
    with folder_of_one_process(site):
        assert main(command) == 0


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 1000"), OSError("No username set")])
def test_a_user_without_a_name_is_named_by_number(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, by Python 3.11 and by 3.13."""

    def getuser() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", getuser)
    assert main(["server", "init", str(tmp_path), "--host", "h"]) == 0
    unit = configparser.RawConfigParser()
    unit.read(tmp_path / "fedzo-server.service")
    assert unit["Service"]["User"] == str(os.getuid())


def test_compose_files_leave_the_name_of_the_project_to_the_folder(server: Path, tmp_path: Path) -> None:
    """Compose takes two projects of one name for one, and would replace the first site by the second."""
    main(["client", "init", str(tmp_path / "site"), "--server", "h:1"])
    for folder in (server, tmp_path / "site"):
        assert "name" not in yaml.safe_load((folder / "compose.yaml").read_text())


def test_a_site_has_a_place_for_compiled_kernels_also_where_its_user_has_no_home(tmp_path: Path) -> None:
    """Numba refuses to import a kernel that it cannot keep."""
    main(["client", "init", str(tmp_path), "--server", "h:1"])
    unit, image = configparser.RawConfigParser(), (tmp_path / "image" / "Containerfile").read_text()
    unit.read(tmp_path / "fedzo-client.service")

    assert (unit["Service"]["CacheDirectory"], unit["Service"]["Environment"]) == (
        "%N",
        "NUMBA_CACHE_DIR=%C/%N FEDZO_CACHE=%C/%N/models",
    )
    (home,) = re.findall(r"^ENV HOME=(.*)$", image, re.MULTILINE)
    assert home.startswith("/fedzo/")  # the folder that is mounted


def test_services_of_a_site_have_a_line_for_a_proxy(tmp_path: Path) -> None:
    main(["client", "init", str(tmp_path), "--server", "h:1"])
    compose = (tmp_path / "compose.yaml").read_text().replace("# environment:", "environment:")

    assert "# Environment=HTTPS_PROXY=http://proxy:3128" in (tmp_path / "fedzo-client.service").read_text()
    assert yaml.safe_load(compose)["services"]["client"]["environment"] == {"HTTPS_PROXY": "http://proxy:3128"}


@pytest.mark.parametrize(("side", "mounted"), [("server", [".:/fedzo"]), ("client", [".:/fedzo"])])
def test_a_container_runs_one_side_with_its_folder_and_holds_nothing_of_it(
    server: Path, tmp_path: Path, side: str, mounted: list[str]
) -> None:
    main(["client", "init", str(tmp_path / "site"), "--server", "h:1"])
    folder = server if side == "server" else tmp_path / "site"

    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    (name, service), image = *compose["services"].items(), (folder / "image" / "Containerfile").read_text()

    assert (name, service["command"]) == (side, [side, "up", "/fedzo"])
    assert service["volumes"] == mounted
    assert service["user"] == f"{os.getuid()}:{os.getgid()}"
    listens = json.loads((server / "server.json").read_text())["listen"].rpartition(":")[2]
    assert service.get("ports", []) == ([f"{listens}:{listens}"] if side == "server" else [])  # no control port
    assert 'ENTRYPOINT ["fedzo"]' in image
    copied = [line for line in image.splitlines() if line.startswith(("COPY", "ADD"))]
    assert copied == ["COPY *.whl constraints.txt /wheels/"]
    install = "RUN pip install --no-cache-dir --constraint /wheels/constraints.txt /wheels/*.whl"
    assert install in image.splitlines()  # by no name, which others may own
    assert list((folder / "image").iterdir()) == [folder / "image" / "Containerfile"]  # all that a build is sent


def test_the_manifest_of_the_docs_runs_commands_that_exist() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to-deploy.md").read_text()
    parts = [part for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) for part in yaml.safe_load_all(block)]

    assert [part["kind"] for part in parts] == ["StatefulSet", "Service", "Deployment"]
    for part in parts:
        for container in part["spec"].get("template", {}).get("spec", {}).get("containers", []):
            side, *_ = container["args"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in part["spec"]["template"]["spec"]["volumes"]}
            assert container["args"][1] == "up"
            with pytest.raises(SystemExit):  # argparse knows the command
                main([side, "up", "--help"])


def bad(folder: Path) -> dict[str, str]:
    return {name: told for name, good, told in folder_checks(folder) if not good}


def test_doctor_names_what_is_wrong_with_a_server_and_what_to_do(server: Path) -> None:
    main(["server", "add-client", "a", "--dir", str(server)])
    assert set(bad(server)) == {"SuperLink"}  # which nobody has started
    with socket.create_server(("127.0.0.1", 9443)):
        assert "somebody listens there already" in bad(server)["ports"]

    (server / "server.key").chmod(0o644)
    main(["server", "renew", "--dir", str(server), "--host", "other.example.org", "--days", "5"])
    (server / "ca.key").chmod(0o640)
    found = bad(server)

    assert "chmod 600" in found["secrets"]
    assert "ca.key" in found["secrets"]
    assert f"valid for 5 days. `fedzo server renew --dir {server}`" in found["certificate"]
    remedy = found["name"].partition("`fedzo ")[2].partition("`")[0]
    assert main(remedy.split()) == 0
    assert read_certificate(server / "server.crt").names == (
        "fed.example.org", "other.example.org", "localhost", "127.0.0.1",
    )  # fmt: skip


def test_doctor_of_a_folder_that_it_may_not_look_into_names_the_file(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", refused)
        assert bad(server)["folder"].startswith(f"{server / 'ca.key'}: Permission denied. Let this user read it")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refused)
        assert f"server folder {server}: this user must be allowed to read it" in bad(server)["folder"]


def test_doctor_names_what_is_wrong_with_a_site(server: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    (site / "site.yaml").write_text(json.dumps({"data": {"path": "./rows.jsonl"}, "model": {"name": "./model"}}))

    found = bad(site)

    assert set(found) == {"rows", "model", "server"}
    assert "Is `fedzo server up` running there" in found["server"]
    (site / "site.yaml").write_text("threads: [1]")
    assert set(bad(site)) == {"folder"}


def test_doctor_reads_rows_and_model_of_a_site(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    save_tiny_model(site / "model", "llama")
    for client, count in ((3, 2), (4, 1)):
        (site / f"rows-{client}.jsonl").write_text('{"text": "a", "label": 0}\n' * count)

    def checks(**limits: str) -> dict[str, tuple[bool, str]]:
        settings = {"data": {"path": "./rows-{client}.jsonl"}, "model": {"name": "./model"}, "limits": limits}
        (site / "site.yaml").write_text(json.dumps(settings))
        return {name: (good, told) for name, good, told in folder_checks(site)}

    found = checks()
    loaded = load_model(ModelConfig(name=str(site / "model")))
    digest = loaded.base_digest
    assert found["rows"] == (True, "3 rows with text, label")
    assert found["model"] == (True, f"SHA-256 {digest}")
    assert found["tokenizer"] == (True, f"SHA-256 {loaded.tokenizer_digest}")
    assert found["memory"][0]
    assert checks(base_digest=digest)["model"][0]
    assert checks(base_digest="a" * 64)["model"] == (
        False, f"SHA-256 {digest}, but limits.base_digest of site.yaml is {'a' * 64}",
    )  # fmt: skip
    (site / "rows-4.jsonl").write_text('{"text": ')
    assert f"{site / 'rows-4.jsonl'}:1: not valid JSON" in bad(site)["rows"]
    monkeypatch.setattr("fedzo.commands.doctor.available_memory_bytes", lambda device: 1000)
    assert "1.0 kB are free. Free some" in bad(site)["memory"]


def test_doctor_loads_no_second_model_where_a_site_is_up(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    save_tiny_model(site / "model", "llama")
    (site / "rows.jsonl").write_text('{"text": "a", "label": 0}\n')
    settings = {"device": "cpu", "data": {"path": "./rows.jsonl"}, "model": {"name": "./model"}}
    (site / "site.yaml").write_text(json.dumps(settings))
    down = {name for name, *_ in folder_checks(site)}
    monkeypatch.setattr("fedzo.commands.doctor.available_memory_bytes", lambda device: 0)  # its executor has it all

    assert set(bad(site)) == {"server", "memory"}
    with folder_of_one_process(site):
        found = {name: (good, told) for name, good, told in folder_checks(site)}

    assert [name for name, (good, _) in found.items() if not good] == ["server"]
    assert found["rows"] == (True, "1 rows with text, label")
    left_out, _, why = found["not checked"][1].partition(", for ")
    assert set(left_out.replace(" and ", ", ").split(", ")) == {*down, "CUDA kernels"} - set(found)
    assert why == f"the site is up and needs the memory: `fedzo status {site}`"


@pytest.mark.parametrize(
    ("stored", "held", "good"),
    [(torch.bfloat16, "float32", False), (torch.float32, "bfloat16", True), (torch.bfloat16, "bfloat16", True)],
)
def test_doctor_judges_memory_by_what_the_weights_take_once_they_are_read(
    stored: torch.dtype, held: str, good: bool, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    model = load_model(ModelConfig(name=str(save_tiny_model(tmp_path / "float32", "llama"))), device="cpu")
    model.model.to(stored).save_pretrained(site / "model")
    model.tokenizer.save_pretrained(site / "model")
    settings = {"device": "cpu", "data": {"path": "./rows.jsonl"}, "model": {"name": "./model", "dtype": held}}
    (site / "site.yaml").write_text(json.dumps(settings))
    monkeypatch.setattr("fedzo.commands.doctor.available_memory_bytes", lambda device: 34_976 * 3)

    (found,) = ((whether, told) for name, whether, told in folder_checks(site) if name == "memory")

    assert found[0] == good
    assert f"the weights take {'70' if good else '140'} kB" in found[1]


def test_doctor_compares_the_directions_of_a_sites_device_with_the_specified_ones(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, kernel = tmp_path / "site", directions.add_kernel
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    settings = {"device": "cpu", "data": {"path": "./rows.jsonl"}, "model": {"name": "./model"}}
    (site / "site.yaml").write_text(json.dumps(settings))

    def found() -> tuple[bool, str]:
        return next((good, told) for name, good, told in folder_checks(site) if name == "directions")

    def rounds_otherwise(base: Any, out: Any, *rest: Any) -> None:
        kernel(base, out, *rest)
        out[-1] = np.nextafter(out[-1], np.float32(9))

    assert found() == (True, "those of cpu are the specified ones")
    monkeypatch.setattr(directions, "add_kernel", rounds_otherwise)
    good, told = found()
    assert not good
    assert told.startswith("those of cpu are not the specified ones (gaussian). Update torch")


def test_doctor_tells_of_the_server_first_and_of_a_driver_that_fails_in_a_line(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    save_tiny_model(site / "model", "llama")
    settings = {"device": "cpu", "data": {"path": "./rows.jsonl"}, "model": {"name": "./model"}}
    (site / "site.yaml").write_text(json.dumps(settings))

    def busy(config: ModelConfig, *, device: str) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with more")

    monkeypatch.setattr("fedzo.commands.doctor.load_model", busy)
    capsys.readouterr()

    assert main(["doctor", str(site)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "BAD  model: RuntimeError: CUDA error: all CUDA-capable devices are busy Compile with more"
    names = [line[5:].partition(":")[0] for line in lines]
    assert names[names.index("authority") + 1 :] == ["proxy", "server", "rows", "device", "directions", "model"]


@pytest.mark.parametrize(
    ("proxy", "good"),
    [
        ("socks5://user:word@127.0.0.1:1", True),
        ("http://user:word@127.0.0.1:1", True),
        ("socks4://user:word@127.0.0.1:1", False),
        ("http://127.0.0.1:port", False),
    ],
)
def test_doctor_tells_whether_a_site_can_speak_by_the_proxy_of_its_environment(
    proxy: str, good: bool, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")])
    (site / "site.yaml").write_text(json.dumps({"data": {"path": "./rows.jsonl"}, "model": {"name": "./model"}}))
    for name in ("ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)

    found = {name: (fine, told) for name, fine, told in folder_checks(site)}

    assert found["proxy"][0] == good
    assert "ALL_PROXY, all_proxy" in found["proxy"][1]
    assert "word" not in found["proxy"][1]
    assert ("must begin with http://, https://, socks5:// or socks5h://" in found["proxy"][1]) != good
    assert ("server" in found) == good  # else nothing can be asked


def test_doctor_names_the_variable_that_no_proxy_is_at_fault_for(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):  # Python reads the latter first
        monkeypatch.setenv(name, "[::1]")

    found = {name: (fine, told) for name, fine, told in folder_checks(server)}

    assert not found["proxy"][0]
    assert found["proxy"][1].startswith("NO_PROXY, no_proxy: ")


def test_doctor_finds_this_machine_fit() -> None:
    assert [name for name, good, _ in doctor() if not good] == []


def test_doctor_compares_packages_with_what_fedzo_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.commands.doctor.package_problems", lambda: {"torch": "too old", "wrapt": "is away"})

    found = {name: (good, told) for name, good, told in doctor()}

    assert found["torch"] == (False, "too old")
    assert found["wrapt"] == (False, "is away")
    assert found["numpy"] == (True, np.__version__)


@pytest.mark.parametrize("there", [True, False])
def test_doctor_tells_whether_a_gpu_of_this_machine_has_kernels_for_directions(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def fused(device: torch.device) -> object | None:
        asked.append(device)
        return object() if there else None

    monkeypatch.setattr("fedzo.commands.doctor.fused", fused)
    monkeypatch.setattr("fedzo.commands.doctor._directions", lambda device: ("directions", True, f"of {device}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = doctor()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    name, good, told = doctor()[-1]

    assert (name, good) == ("CUDA kernels", there)
    assert ("many times slower" in told) != there
    assert asked == [torch.device("cuda", 1)]
    assert "CUDA kernels" not in [check[0] for check in before]


@pytest.mark.parametrize("good", [True, False])
def test_doctor_compares_directions_on_the_device_that_it_names(good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.commands.doctor._directions", lambda device: ("directions", good, f"of {device}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    found = doctor()

    assert next(told for name, _, told in found if name == "device").startswith("mps, ")
    assert [check for check in found if check[0] == "directions"][-1] == ("directions", good, "of mps")
