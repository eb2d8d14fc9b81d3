"""What `fedzo server up` and `fedzo client up` say, by what the processes that they keep are made to tell."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from fedzo.cli import main
from fedzo.commands.client import up
from fedzo.commands.doctor import folder_checks
from fedzo.records.folder import folder_of_one_process
from fedzo.runtime.net.client_folder import ClientFolder
from fedzo.runtime.net.credentials import Certificate
from fedzo.runtime.net.daemons import CONNECTED, HEARD, LATE, REFUSED, SILENT, STARTED
from fedzo.runtime.net.processes import Processes
from fedzo.runtime.net.server_folder import ServerFolder

Capture = pytest.CaptureFixture[str]
BOM = b"\xef\xbb\xbf"
TIME = "2026-01-01 00:00:00,000 WARNING"
EXPIRED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1006)"


@pytest.fixture
def site(server: Path, tmp_path: Path) -> Path:
    """The folder of a site that has rows, and whose server does not answer."""
    init = ["client", "init", str(tmp_path / "site"), "--server", "127.0.0.1:9", "--ca", str(server / "ca.crt")]
    assert main(init) == 0
    (tmp_path / "site" / "rows").mkdir()
    (tmp_path / "site" / "rows" / "train.jsonl").write_text('{"text": "fine", "label": 1}\n')
    return tmp_path / "site"


@pytest.fixture
def said(site: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What `fedzo client up` says after it has begun, while its SuperNode's log, or another, grows by these pieces."""

    def keep(*pieces: str, log: str = "supernode") -> list[str]:
        left, told = list(pieces), list[str]()

        def write(seconds: float) -> None:
            if not left:
                raise KeyboardInterrupt
            with (site / "logs" / f"{log}.log").open("a") as file:
                file.write(left.pop(0))

        monkeypatch.setattr(Processes, "start", lambda *_, **__: None)
        monkeypatch.setattr("fedzo.commands.client.time.sleep", write)
        with suppress(KeyboardInterrupt):
            for line in up(ClientFolder(site)):
                told.append(line)
        return told[1:]

    return keep


def wrong(folder: Path) -> dict[str, str]:
    return {name: told for name, good, told in folder_checks(folder) if not good}


# --- a site


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("[code: 1203] Failed to activate.", "the server refused: [code: 1203] Failed to activate."),
        (EXPIRED, f"cannot connect: {EXPIRED}"),
    ],
)
def test_a_site_that_does_not_connect_says_the_reason_and_whose_word_it_is(
    said: Callable[..., list[str]], reason: str, says: str
) -> None:
    """By the lines with which Flower ends a SuperNode, which may come in pieces."""
    first = "\x1b[91mERROR \x1b[0m:    Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n"
    rest = f"{reason}\nThe SuperNode could not establish a connection to the SuperLink.\n\nFor more, visit a page\n"

    assert said(first, rest) == [says]


def test_words_of_a_server_reach_the_terminal_without_escapes(said: Callable[..., list[str]]) -> None:
    first = "Failed to initialize the connection to the SuperLink.\n"

    assert said(first, "[code: 1203] no\x1b]52;c;ZWNobw==\x07 and\x1b[2J\n") == [
        "the server refused: [code: 1203] no ]52;c;ZWNobw==  and [2J"
    ]


def test_the_sites_own_log_reaches_the_terminal_without_escapes(said: Callable[..., list[str]]) -> None:
    """A traceback there has the words of an exception as they are."""
    assert said("client 0: failed\nZeroDivisionError: \x1b]52;c;ZWNobw==\x07" + "x" * 500 + "\n", log="site") == [
        "client 0: failed",
        "ZeroDivisionError:  ]52;c;ZWNobw== " + "x" * 500,
    ]


def test_a_site_says_once_that_its_server_is_silent_and_that_it_answers_again(said: Callable[..., list[str]]) -> None:
    written = (
        f"WARNING :  Connection attempt failed, retrying in 0.71 seconds\n{TIME} {SILENT} ([Errno 111] refused)\n",
        "WARNING :  Connection attempt failed, retrying in 1.52 seconds\n",
        f"{TIME} {HEARD}\n{TIME} {CONNECTED} 17\n",
    )

    assert said(*written) == [
        "127.0.0.1:9 does not answer ([Errno 111] refused); retrying",
        "127.0.0.1:9 answers again",
        "connected to 127.0.0.1:9",
    ]


def test_a_site_says_nothing_of_a_supernode_that_starts_until_it_has_connected(said: Callable[..., list[str]]) -> None:
    once = f"{TIME} {STARTED}\n", f"{TIME} {CONNECTED} 17\n"

    assert said(*once, *once) == ["connected to 127.0.0.1:9"] * 2


def test_a_site_says_that_a_message_is_lost_and_why(said: Callable[..., list[str]]) -> None:
    """The server waits for the reply as long as for a site that is slow."""
    error = "\x1b[91mERROR \x1b[0m:    "

    assert said(
        f"{error} Failed to send message 3fa9: _ssl.c:989: The handshake operation timed out\n",
        f"{error} Failed to receive message 77: Server error '500 Internal Server Error' for url 'https://h/x'\n",
    ) == [
        "a reply to the server is lost: _ssl.c:989: The handshake operation timed out",
        "a request of the server is lost: Server error '500 Internal Server Error' for url 'https://h/x'",
    ]


def test_a_site_that_goes_up_without_rows_says_so_and_stays_up(site: Path, said: Callable[..., list[str]]) -> None:
    """Rows may come before a run does; one that is there and cannot be read is for `fedzo doctor`."""
    refused, rows = "a run that needs this site's rows will be refused: ", (site / "rows").resolve()

    assert said() == []
    (rows / "train.jsonl").rename(rows / "rows-of-3.jsonl")
    told, *more = said("client 3: still here\n", log="site")
    assert told.startswith(f"{refused}{rows}: must hold a file train.* (")
    assert more == ["client 3: still here"]
    (site / "site.yaml").write_text("data: {path: './rows/rows-of-{client}.jsonl'}\n")
    assert said() == []
    (rows / "rows-of-3.jsonl").unlink()
    assert said() == [f"{refused}{rows}/rows-of-{{client}}.jsonl: there is no such file or folder. Check data.path."]
    (site / "site.yaml").write_text("")
    assert said() == [f"{refused}data.path of site.yaml must name their file"]


@pytest.mark.parametrize(
    ("written", "says", "code"),
    [
        ("", "connected or not: {logs}/supernode.log does not say", 0),  # it has just begun, or its log was cut
        (f"{TIME} {CONNECTED} 17\n", "connected to 127.0.0.1:9", 0),
        (f"{TIME} {CONNECTED} 17\n{TIME} {SILENT} (refused)\n", "127.0.0.1:9 does not answer (refused); retrying", 1),
        (f"{TIME} {SILENT} (refused)\n{TIME} {HEARD}\n", "127.0.0.1:9 answers again", 0),
        (f"{TIME} {CONNECTED} 17\n{TIME} {REFUSED}: its key\x1b[2J\n", "the server refused: its key [2J", 1),
        (f"Failed to initialize the connection\n{EXPIRED}\nand more\n", f"cannot connect: {EXPIRED}", 1),
        (f"{TIME} {CONNECTED} 17\n{TIME} {REFUSED}: {LATE}.\n", f"the server refused: {LATE}.", 0),
        (f"{TIME} {STARTED}\n{TIME} {CONNECTED} 17\n", "connected to 127.0.0.1:9", 0),
        # it ends again and again, of itself or since the server does not let it in
        (f"{TIME} {CONNECTED} 17\n{TIME} {STARTED}\n", "connecting to 127.0.0.1:9", 1),
        (f"{TIME} {STARTED}\n{TIME} {REFUSED}: its key\n{TIME} {STARTED}\n", "the server refused: its key", 1),
    ],
)
def test_status_of_a_site_that_is_up_tells_of_its_connection_and_the_end_of_its_log(
    site: Path, capsys: Capture, written: str, says: str, code: int
) -> None:
    logs = site / "logs"
    (logs / "supernode.log").write_text(f"\x1b[92mINFO \x1b[0m: one\n{written}\x1b[92mINFO \x1b[0m: another\n")
    (logs / "site.log").write_text("".join(f"line {number}\x1b]52;c\x07\n" for number in range(9)))
    capsys.readouterr()

    with folder_of_one_process(site):
        assert main(["status", str(site)]) == code

    first, connection, *rest = capsys.readouterr().out.splitlines()
    assert (first, connection) == ("site of 127.0.0.1:9: up", says.format(logs=logs))
    assert rest == [f"the end of {logs / 'site.log'}:", *(f"line {number} ]52;c " for number in range(4, 9))]


def test_status_of_a_site_that_is_down_is_no_word_of_an_earlier_start(site: Path, capsys: Capture) -> None:
    (site / "logs" / "supernode.log").write_text(f"{TIME} {CONNECTED} 17\n")
    capsys.readouterr()

    assert main(["status", str(site)]) == 1
    assert capsys.readouterr().out == "site of 127.0.0.1:9: down\n"


@pytest.mark.usefixtures("no_locks")
def test_status_of_a_site_that_may_be_up_says_so(site: Path, capsys: Capture) -> None:
    (site / "logs" / "supernode.log").write_text(f"{TIME} {CONNECTED} 17\n")
    capsys.readouterr()

    with folder_of_one_process(site):
        assert main(["status", str(site)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "site of 127.0.0.1:9: perhaps up (the file system has no locks)",
        "connected to 127.0.0.1:9",
    ]


def test_a_site_on_a_disk_of_several_machines_is_up_once_and_seen_to_be_up(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """NFS locks a folder for the machine that asks alone; the others are let in, as all are here."""
    flock = fcntl.flock

    def lock(opened: int, how: int) -> None:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            flock(opened, how)

    monkeypatch.setattr("fcntl.flock", lock)
    monkeypatch.setattr(Processes, "start", lambda *_, **__: None)
    first = up(ClientFolder(site))
    next(first)
    capsys.readouterr()

    assert main(["client", "up", str(site)]) == 1
    assert "another process is using it" in capsys.readouterr().err
    assert main(["status", str(site)]) == 0
    assert capsys.readouterr().out.startswith("site of 127.0.0.1:9: up\n")
    assert "not checked" in {name for name, *_ in folder_checks(site)}  # no second model is loaded
    first.close()
    assert main(["status", str(site)]) == 1
    assert capsys.readouterr().out == "site of 127.0.0.1:9: down\n"


def test_a_site_that_goes_up_keeps_its_logs_to_itself(site: Path, said: Callable[..., list[str]]) -> None:
    (site / "logs").chmod(0o755)
    assert wrong(site)["logs"] == f"others may read them: chmod 700 {site / 'logs'}"

    said()

    assert "logs" not in wrong(site)


@pytest.mark.parametrize(
    "copied", [lambda pem: BOM + pem, lambda pem: pem.replace(b"\n", b"\r\n")], ids=["with a mark", "with CRLF"]
)
def test_an_authority_that_was_copied_by_hand_is_the_same_and_is_made_plain(
    server: Path, site: Path, said: Callable[..., list[str]], copied: Callable[[bytes], bytes]
) -> None:
    plain, copy = (server / "ca.crt").read_bytes(), server.with_name("copy.crt")
    copy.write_bytes(copied(plain))

    assert main(["client", "init", str(site), "--server", "127.0.0.1:9", "--ca", str(copy)]) == 0
    assert (site / "ca.crt").read_bytes() == plain
    (site / "ca.crt").write_bytes(copied(plain))  # without the command
    assert "Is `fedzo server up` running there" in wrong(site)["server"]  # and no word of the certificate
    said()

    assert (site / "ca.crt").read_bytes() == plain


# --- a server


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let `fedzo server up` have a SuperLink that answers to the registration of clients as is given, then end it."""

    def keep(*answers: int | BaseException) -> None:
        left = list(answers)

        def register(folder: ServerFolder) -> int:
            if isinstance(answer := left.pop(0), BaseException):
                raise answer
            return answer

        def look(seconds: float) -> None:
            if not left:
                raise KeyboardInterrupt

        stand_ins = {"start_superlink": lambda *_, **__: None, "wait_for_superlink": lambda *_, **__: None}
        monkeypatch.setattr("fedzo.commands.server.time.sleep", look)
        for name, stand_in in {**stand_ins, "register_clients": register}.items():
            monkeypatch.setattr(f"fedzo.runtime.net.launch.{name}", stand_in)

    return keep


def test_a_certificate_that_ends_soon_is_told_of_and_once_that_nobody_accepts_it(
    server: Path, registered: Callable[..., None], capsys: Capture
) -> None:
    main(["server", "renew", "--dir", str(server), "--days", "5"])
    silent, expired = httpx.ConnectError("[Errno 111] Connection refused"), httpx.ConnectError(EXPIRED)
    registered(silent, expired, expired, 0)
    capsys.readouterr()

    assert main(["server", "up", str(server)]) == 0

    said = capsys.readouterr().out.splitlines()
    assert f"certificate valid for 5 days. `fedzo server renew --dir {server}`" in said
    told = f"the clients cannot be registered: {EXPIRED}. See `fedzo doctor {server}`"
    assert [line for line in said if "registered" in line] == [told, "0 clients are registered"]


def test_a_certificate_that_ends_while_the_server_is_up_is_told_of(
    server: Path, registered: Callable[..., None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = iter([20.0, 20.0, 5.2, 5.1, -1.0, 300.0])
    monkeypatch.setattr(Certificate, "days_left", property(lambda self: next(days)))
    registered(*[httpx.ConnectError("[Errno 111] Connection refused")] * 6)
    capsys.readouterr()

    assert main(["server", "up", str(server)]) == 0

    said = [line.partition(". ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in said if line.startswith(("certificate", "the certificate"))] == [
        "certificate valid for 5 days",
        "the certificate expired",
        "the certificate is renewed",
    ]


def test_what_cannot_be_looked_at_for_a_moment_is_told_of_and_ends_nothing(
    server: Path, registered: Callable[..., None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that is just copied is empty at first, and a network disk may be away."""
    certificate = server / "server.crt"
    plain, usage = certificate.read_bytes(), shutil.disk_usage
    looks = iter([(b"", True), (b"", True), (plain, False)])

    def disk_usage(path: Path) -> object:
        if is_away:
            raise OSError(errno.ESTALE, "Stale file handle")
        return usage(path)

    def look(seconds: float) -> None:
        nonlocal is_away
        if (coming := next(looks, None)) is None:
            raise KeyboardInterrupt
        content, is_away = coming
        certificate.write_bytes(content)

    is_away = False
    registered(0)
    monkeypatch.setattr("fedzo.commands.server.time.sleep", look)
    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    capsys.readouterr()

    assert main(["server", "up", str(server)]) == 0

    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if "disk" in line or "certificate" in line]
    assert told[0].startswith(f"{certificate}: it must be a certificate (PEM), but is not (")
    assert told[1:] == [
        f"The disk of {server} does not answer (Stale file handle).",
        "the certificate is renewed",
        f"there is room on the disk of {server}",
    ]


def test_logs_that_another_user_owns_are_told_of_and_the_site_goes_up(
    site: Path, said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    (site / "logs").chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refused)

    with suppress(KeyboardInterrupt):
        told = next(up(ClientFolder(site)))

    assert told == f"{site / 'logs'}: others may read it, and only its owner can close it: chmod 700 {site / 'logs'}"


@pytest.mark.usefixtures("no_locks")
def test_what_flower_remembers_of_a_run_that_may_go_on_is_kept(server: Path, registered: Callable[..., None]) -> None:
    remembered = server / "superlink.db"
    remembered.touch()
    registered(0)
    assert main(["server", "up", str(server)]) == 0
    assert not remembered.exists()  # no run has ever been served

    with ServerFolder(server).serving("/runs/one"):
        remembered.touch()
        registered(0)
        assert main(["server", "up", str(server)]) == 0

    assert remembered.exists()


def test_the_clients_that_are_counted_are_those_that_the_superlink_lets_in(
    server: Path, registered: Callable[..., None], capsys: Capture
) -> None:
    for name in ("a", "b"):
        main(["server", "add-client", name, "--dir", str(server)])
    registered(1)  # the key of one of them was revoked before
    capsys.readouterr()

    assert main(["server", "up", str(server)]) == 0

    said = capsys.readouterr().out
    assert "1 clients are registered" in said
    assert "certificate" not in said  # which is good for long
