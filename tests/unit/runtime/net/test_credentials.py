"""Keys, certificates and folders of a server and its sites; compared with what OpenSSL and OpenSSH say of them."""

from __future__ import annotations

import errno
import json
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from fedzo.commands.server import add_client
from fedzo.errors import ConfigError
from fedzo.runtime.net.client_folder import ClientFolder, Invitation, read_invitation, write_invitation
from fedzo.runtime.net.credentials import (
    fingerprint,
    is_private,
    is_signed_by,
    make_key,
    pem_of,
    public_key_of,
    read_certificate,
    read_public_key,
)
from fedzo.runtime.net.server_folder import Listening, ServerFolder

LISTENING = Listening(address="fed.example.org:8443", listen="0.0.0.0:8443", control="127.0.0.1:8444")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")


def server(path: Path) -> ServerFolder:
    return ServerFolder.make(path, LISTENING, names=["fed.example.org", "10.1.2.3"], days=365)


@needs_openssl
def test_the_certificate_is_what_openssl_takes_for_these_names_and_no_others(tmp_path: Path) -> None:
    folder = server(tmp_path / "s")

    for name, good in [("fed.example.org", True), ("localhost", True), ("other.example.org", False)]:
        command = ["openssl", "verify", "-CAfile", "ca.crt", "-x509_strict", "-purpose", "sslserver"]
        done = subprocess.run([*command, "-verify_hostname", name, "server.crt"], cwd=folder.path, check=False)
        assert (done.returncode == 0) is good
    ssl.create_default_context(cafile=str(folder.file("ca.crt"))).load_cert_chain(
        folder.file("server.crt"), folder.file("server.key")
    )


def test_a_certificate_says_names_and_days_and_who_signed_it(tmp_path: Path) -> None:
    one, other = server(tmp_path / "one"), server(tmp_path / "other")

    certificate = read_certificate(one.file("server.crt"))
    assert certificate.names == ("fed.example.org", "localhost", "10.1.2.3", "127.0.0.1")
    assert 364.9 < certificate.days_left <= 365
    assert is_signed_by(one.file("server.crt"), one.file("ca.crt"))
    assert not is_signed_by(one.file("server.crt"), other.file("ca.crt"))


def test_only_this_user_reads_what_is_secret(tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    client = ClientFolder.make(tmp_path / "c", address="fed.example.org:8443", site="")

    for file in (folder.file("ca.key"), folder.file("server.key"), folder.file("secret"), folder.file("clients.json")):
        assert is_private(file), file
    assert all(is_private(client.file(name)) for name in ("key", "secret"))
    assert [path.stat().st_mode & 0o777 for path in (folder.path, client.path)] == [0o700, 0o700]


def test_logs_are_secret_also_in_a_folder_that_was_there_before(tmp_path: Path) -> None:
    for name in ("s", "c"):
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "logs").chmod(0o755)

    folders = server(tmp_path / "s"), ClientFolder.make(tmp_path / "c", address="fed.example.org:8443", site="")

    assert all(is_private(folder.file("logs")) for folder in folders)


def test_a_folder_that_this_user_may_not_read_is_told_from_one_that_lacks_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = server(tmp_path / "s"), ClientFolder.make(tmp_path / "c", address="fed.example.org:8443", site="")

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)

    for folder in folders:
        with pytest.raises(ConfigError, match=rf"folder {folder.path}: this user must be allowed to read it"):
            folder.check()


def test_making_a_folder_again_keeps_all_that_is_there(tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in server(tmp_path / "s").path.iterdir() if path.is_file()}

    assert {path.name: path.read_bytes() for path in server(tmp_path / "s").path.iterdir() if path.is_file()} == before


def test_a_renewed_certificate_is_another_of_the_same_authority(tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    authority, before = folder.file("ca.crt").read_bytes(), folder.file("server.crt").read_bytes()
    key = folder.file("server.key").read_bytes()

    folder.renew(names=["new.example.org"], days=10)

    assert folder.file("ca.crt").read_bytes() == authority
    assert folder.file("server.crt").read_bytes() != before
    assert folder.file("server.key").read_bytes() == key  # a kill cannot leave one that does not fit
    assert read_certificate(folder.file("server.crt")).names[0] == "new.example.org"
    assert is_signed_by(folder.file("server.crt"), folder.file("ca.crt"))


@needs_ssh_keygen
def test_a_key_and_its_fingerprint_are_those_of_openssh(tmp_path: Path) -> None:
    line = make_key(tmp_path / "key")

    said = subprocess.run(["ssh-keygen", "-y", "-f", str(tmp_path / "key")], capture_output=True, text=True, check=True)
    assert read_public_key(said.stdout) == line == public_key_of(tmp_path / "key")
    (tmp_path / "key.pub").write_text(line)
    said = subprocess.run(["ssh-keygen", "-lf", str(tmp_path / "key.pub")], capture_output=True, text=True, check=True)
    assert fingerprint(pem_of(line)) == said.stdout.split()[1]


@pytest.mark.parametrize(
    "text", ["", "no key", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJmfYdqyXyWHCWfnpBDpDQNpUVcXAe5zRsPKjZuq0KGe"]
)
def test_what_is_no_key_of_a_supernode_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the public key must be"):
        read_public_key(text)


# --- the registry


def keys(tmp_path: Path, count: int) -> list[str]:
    return [make_key(tmp_path / f"key{number}") for number in range(count)]


def test_a_client_is_registered_once_with_an_index_a_name_and_a_key_of_its_own(tmp_path: Path) -> None:
    folder, (first, second, third) = server(tmp_path / "s"), keys(tmp_path, 3)

    folder.add_client("a", index=3, key=first)
    assert folder.add_client("a", index=3, key=first + " comment").index == 3  # again: nothing changes
    assert folder.add_client("b", index=None, key=second).index == 0  # the lowest that is free

    for name, index, key, what in [("a", 5, third, "name"), ("c", 3, third, "index"), ("c", 5, first, "key")]:
        with pytest.raises(ConfigError, match=rf"its {what} must be its own, but client") as refused:
            folder.add_client(name, index=index, key=key)
        assert ("Then restart `fedzo server up`" in str(refused.value)) is (key == first)  # which Flower remembers
    assert [(client.index, client.name) for client in folder.clients] == [(0, "b"), (3, "a")]
    assert {key: client.index for key, client in folder.by_key().items()} == {pem_of(first): 3, pem_of(second): 0}


@needs_ssh_keygen
def test_a_key_with_a_passphrase_is_refused_as_no_key_of_a_site(tmp_path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "word five", "-f", str(tmp_path / "key")]
    subprocess.run(command, check=True)

    with pytest.raises(ConfigError, match=r"key: it must be a private key as `fedzo client init` writes it \("):
        public_key_of(tmp_path / "key")


def test_a_registry_of_many_clients_is_read_in_a_moment(tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    rows = [{"index": i, "name": f"n{i}", "key": f"k{i}", "added": "2026-01-01"} for i in range(10_000)]
    folder.file("clients.json").write_text(json.dumps(rows))
    begun = time.process_time()

    assert len(folder.clients) == 10_000
    assert time.process_time() - begun < 2.0


@pytest.mark.parametrize("name", ["two words", "../../evil", "bad/name", "", "x" * 64])
def test_a_name_that_is_none_is_refused_before_any_file_is_made_by_it(tmp_path: Path, name: str) -> None:
    folder = server(tmp_path / "s")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ConfigError, match="NAME must be at most 63 letters, digits"):
        list(add_client(folder, name, index=None, key=None))

    assert sorted(tmp_path.rglob("*")) == before


def test_a_registry_that_is_spoilt_while_it_is_in_use_leaves_the_one_before_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, (key,) = server(tmp_path / "s"), keys(tmp_path, 1)
    folder.add_client("a", index=0, key=key)
    before, good = folder.by_key(), folder.file("clients.json").read_text()

    for bad in (good[:-3], "[]x", None):
        caplog.clear()
        folder.file("clients.json").unlink()
        if bad is not None:
            folder.file("clients.json").write_text(bad)
        assert [folder.by_key(), folder.by_key()] == [before, before]
        assert caplog.text.count("Until then the old client list is used") == 1

    with pytest.raises(ConfigError, match=r"clients\.json"):
        ServerFolder(folder.path).by_key()
    folder.file("clients.json").write_text("[]")
    assert folder.by_key() == {}


def test_a_removed_client_is_nobody_and_its_index_is_free(tmp_path: Path) -> None:
    folder, (first, second) = server(tmp_path / "s"), keys(tmp_path, 2)
    folder.add_client("a", index=0, key=first)
    assert set(folder.by_key()) == {pem_of(first)}

    folder.remove_client("a")

    assert folder.by_key() == {}
    assert folder.add_client("a", index=0, key=second).key == second
    with pytest.raises(ConfigError, match=r"client c: it must be registered \(a\)"):
        folder.remove_client("c")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": -1}, "index"),
        ({"name": "../x"}, "name"),
        ({"added": 7}, "added"),
        ({"more": 1}, "more"),
    ],
)
def test_a_registry_that_somebody_spoiled_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    folder = server(tmp_path / "s")
    folder.add_client("a", index=0, key=make_key(tmp_path / "key"))
    (row,) = json.loads(folder.file("clients.json").read_text())
    folder.file("clients.json").write_text(json.dumps([{**row, **change}]))

    with pytest.raises(ConfigError, match=rf"clients\.json: .*{says}"):
        _ = folder.clients


@pytest.mark.parametrize("host", ["0.0.0.0", "[::1]"])  # the certificate names no IPv6 address
def test_the_control_api_stays_on_the_loopback_interface(host: str, tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    text = folder.file("server.json").read_text()
    folder.file("server.json").write_text(text.replace("127.0.0.1:8444", f"{host}:8444"))

    with pytest.raises(ConfigError, match="control must be on the loopback interface"):
        folder.check()


@pytest.mark.parametrize(("lost", "other"), [("ca.key", "ca.crt"), ("ca.crt", "ca.key")])
def test_an_authority_that_sites_trust_is_never_made_anew(lost: str, other: str, tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    before = folder.file(other).read_bytes()
    folder.file(lost).unlink()

    for use in (folder.check, lambda: server(tmp_path / "s")):
        with pytest.raises(ConfigError, match=rf"which all sites trust, but has no {lost}\. Put a copy back"):
            use()

    assert folder.file(other).read_bytes() == before


def test_a_folder_that_was_not_finished_is(tmp_path: Path) -> None:
    """Killed after the key of the authority: nothing is signed by it yet."""
    folder = server(tmp_path / "s")
    for name in ("ca.crt", "server.crt", "server.key"):
        folder.file(name).unlink()

    server(tmp_path / "s").check()


def test_a_server_serves_one_run_at_a_time(tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    assert (folder.served, folder.last_served) == (None, None)

    with folder.serving("/runs/one"):
        assert folder.served is not None
        assert folder.served.run == "/runs/one"
        with (
            pytest.raises(ConfigError, match=r"one run at a time, and serves /runs/one \(process \d+\)"),
            folder.serving("x"),
        ):
            pass
    assert folder.served is None
    assert folder.last_served is not None
    assert folder.last_served.run == "/runs/one"


def test_a_server_serves_a_run_also_where_the_file_system_knows_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(opened: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder = server(tmp_path / "s")
    monkeypatch.setattr("fcntl.flock", refused)

    with folder.serving("/runs/one"):
        assert folder.last_served is not None
        assert folder.last_served.run == "/runs/one"


# --- a site


def test_a_site_that_is_invited_has_all_that_it_needs(tmp_path: Path) -> None:
    folder = server(tmp_path / "s")
    make_key(tmp_path / "key")
    authority, key = folder.file("ca.crt").read_text(), (tmp_path / "key").read_text()
    write_invitation(tmp_path / "i.json", Invitation(address=LISTENING.address, authority=authority, key=key))
    assert is_private(tmp_path / "i.json")

    invitation = read_invitation(tmp_path / "i.json")
    client = ClientFolder.make(tmp_path / "c", address=invitation.address, site="x: 1\n", invitation=invitation)

    client.check()
    assert client.public_key == public_key_of(tmp_path / "key")
    assert client.file("site.yaml").read_text() == "x: 1\n"
    assert (client.endpoint.address, client.endpoint.secret) == (LISTENING.address, None)


def test_an_invitation_is_of_the_same_authority_however_its_certificate_was_copied(tmp_path: Path) -> None:
    authority = server(tmp_path / "s").file("ca.crt").read_bytes()
    client = ClientFolder.make(tmp_path / "c", address="h:1", site="")
    client.file("ca.crt").write_bytes(b"\xef\xbb\xbf" + authority.replace(b"\n", b"\r\n"))

    ClientFolder.make(
        tmp_path / "c", address="h:1", site="", invitation=Invitation(address="h:1", authority=authority.decode())
    )

    assert client.file("ca.crt").read_bytes() == authority
    other = server(tmp_path / "other").file("ca.crt").read_text()
    with pytest.raises(ConfigError, match=r"its ca\.crt is another server's"):
        ClientFolder.make(tmp_path / "c", address="h:1", site="", invitation=Invitation(address="h:1", authority=other))


def test_a_site_without_the_servers_authority_is_told_what_to_copy(tmp_path: Path) -> None:
    client = ClientFolder.make(tmp_path / "c", address="h:1", site="")

    with pytest.raises(ConfigError, match=r"ca\.crt must be the server's certificate authority, but is missing"):
        client.check()


def test_making_a_site_again_keeps_its_key_and_its_file_and_another_server_is_refused(tmp_path: Path) -> None:
    client = ClientFolder.make(tmp_path / "c", address="h:1", site="one\n")
    key = client.public_key

    assert ClientFolder.make(tmp_path / "c", address="h:1", site="two\n").public_key == key
    assert client.file("site.yaml").read_text() == "one\n"
    with pytest.raises(ConfigError, match=r"it is of h:1, and you gave h:2"):
        ClientFolder.make(tmp_path / "c", address="h:2", site="")
