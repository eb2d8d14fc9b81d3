"""Keys, certificates and folders of a server and its sites; compared with what OpenSSL and OpenSSH say of them."""

from __future__ import annotations

import datetime
import errno
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from fedzo.errors import ConfigError
from fedzo.runtime.net.client_folder import ClientFolder, Invitation, read_invitation, write_invitation
from fedzo.runtime.net.credentials import (
    Certificate,
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


@pytest.mark.parametrize(
    ("host", "covered"),
    [("a.example.org", True), ("fed.other.org", True), ("example.org", False), ("a.b.example.org", False),
     ("other.org", False), ("10.0.0.1", True), ("20.0.0.1", False)],
)  # fmt: skip
def test_a_certificate_covers_its_names_and_one_label_before_a_name_with_a_star(host: str, covered: bool) -> None:
    ends = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)

    assert Certificate(("*.example.org", "fed.other.org", "10.0.0.1"), ends).covers(host) is covered


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


@needs_ssh_keygen
def test_a_key_with_a_passphrase_is_refused_as_no_key_of_a_site(tmp_path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "word five", "-f", str(tmp_path / "key")]
    subprocess.run(command, check=True)

    with pytest.raises(ConfigError, match=r"key: it must be a private key as `fedzo client init` writes it \("):
        public_key_of(tmp_path / "key")


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
