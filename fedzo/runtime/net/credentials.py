"""Keys, certificates and secrets of a federation's machines: made here, kept in files of mode 0600.

The server has a certificate authority of its own, whose certificate each site gets, and a certificate for its names. A
site has a key: its public half is what the server registers. Each machine has a secret for the processes that work
beside its SuperLink or SuperNode.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedzo.errors import ConfigError, printable
from fedzo.records.folder import replace_file

AUTHORITY_DAYS = 3650
FEW_DAYS = 14
"""With fewer left a certificate should be renewed."""
HOST_NAME = re.compile(r"(?=.{1,253}$)(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_MALFORMED = (
    *(OSError, ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)  # what reading bad keys and certificates raises
_EARLIER = datetime.timedelta(hours=1)  # a certificate is valid at once where a clock is a little slow


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A SuperLink as somebody who speaks with it knows it.

    Attributes:
        address: ``host:port``.
        authority: File with the certificate that signs the SuperLink's own.
        secret: What a process must know to be given tasks of runs; None for one that only controls.
    """

    address: str
    authority: Path
    secret: bytes | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says.

    Attributes:
        names: Host names and addresses that it is for.
        ends: When it ceases to be valid (UTC).
    """

    names: tuple[str, ...]
    ends: datetime.datetime

    @property
    def days_left(self) -> float:
        """Days from now to its end; negative when it is over."""
        return (self.ends - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400

    def covers(self, host: str) -> bool:
        """Whether it is for this host, also by a name whose first label is ``*``."""
        return not {host, f"*.{host.partition('.')[2]}"}.isdisjoint(self.names)


def make_authority(certificate: Path, key: Path) -> None:
    """Write a new certificate authority."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedzo authority {secrets.token_hex(4)}")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        _builder(name, name, private.public_key(), private.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(private, hashes.SHA256())
    )
    write_private(key, _private_pem(private))
    replace_file(certificate, made.public_bytes(serialization.Encoding.PEM))


def check_names(names: Sequence[str]) -> None:
    """Refuse what a certificate cannot name.

    Raises:
        ConfigError: One is neither a host name nor an IP address.
    """
    for name in names:
        if not HOST_NAME.fullmatch(name) and _ip_address(name) is None:
            raise ConfigError(
                f"--host must be a host name or an IP address, got {printable(name, most=80)!r}. "
                "Write letters, digits, dots and hyphens; other letters in their ASCII form (xn--...)."
            )


def make_certificate(
    certificate: Path,
    key: Path,
    *,
    authority: Path,
    authority_key: Path,
    names: Sequence[str],
    days: int,
) -> None:
    """Write a new certificate of a server, and its key where there is none.

    Args:
        certificate: File to write.
        key: File to write, or the key that stays.
        authority: Certificate of who signs.
        authority_key: Key of who signs.
        names: Host names and IP addresses that the server is reached at.
        days: How long it is valid, from now.
    """
    signer = x509.load_pem_x509_certificate(authority.read_bytes())
    signing = serialization.load_pem_private_key(authority_key.read_bytes(), None)
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority_key}: it must be an elliptic curve key. Restore the file from a copy.")
    if not key.exists():  # one that is there stays: of two files, one could be new and the other not
        write_private(key, _private_pem(ec.generate_private_key(ec.SECP256R1())))
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key}: it must be an elliptic curve key. Remove it, and a new one is made.")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    made = (
        _builder(name, signer.subject, private.public_key(), signing.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signing, hashes.SHA256())
    )
    replace_file(certificate, made.public_bytes(serialization.Encoding.PEM))


def read_certificate(file: Path) -> Certificate:
    """What a certificate file says.

    Raises:
        ConfigError: It is no certificate.
    """
    try:
        found = x509.load_pem_x509_certificate(file.read_bytes())
        return Certificate(tuple(_names_of(found)), found.not_valid_after_utc)
    except _MALFORMED as error:
        raise _no_certificate(file, error) from error


def plain_pem(content: bytes, where: object) -> bytes:
    """Certificates in the one form that everybody reads: a copy may have got a byte order mark or other line ends.

    Args:
        content: Of its file.
        where: The file, for the message.

    Raises:
        ConfigError: It is no certificate.
    """
    try:
        found = x509.load_pem_x509_certificates(content)
        return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in found)
    except _MALFORMED as error:
        raise _no_certificate(where, error) from error


def _no_certificate(where: object, error: Exception) -> ConfigError:
    why = printable(str(error), most=120)
    return ConfigError(f"{where}: it must be a certificate (PEM), but is not ({why}). Restore it.")


def is_signed_by(certificate: Path, authority: Path) -> bool:
    """Whether a certificate is an authority's."""
    try:
        one, other = (x509.load_pem_x509_certificate(file.read_bytes()) for file in (certificate, authority))
        one.verify_directly_issued_by(other)
    except (*_MALFORMED, InvalidSignature):
        return False
    return True


def make_key(file: Path) -> str:
    """Write a SuperNode's private key, in the form that Flower reads; returns the public key as one line of text."""
    private = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    write_private(file, private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return _line(private.public_key())


def public_key_of(file: Path) -> str:
    """The public half of a private key's file, as one line of text.

    Raises:
        ConfigError: It is no such key.
    """
    try:
        private = serialization.load_ssh_private_key(file.read_bytes(), None)
    except _MALFORMED as error:
        why = printable(str(error), most=120)
        raise ConfigError(f"{file}: it must be a private key as `fedzo client init` writes it ({why}).") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file}: it must be an elliptic curve key. Make one with `fedzo client init`.")
    return _line(private.public_key())


def read_public_key(text: str) -> str:
    """A public key's line without its comment.

    Raises:
        ConfigError: It is no public key of a SuperNode.
    """
    return _line(_public_key(text))


def _public_key(text: str) -> ec.EllipticCurvePublicKey:
    try:
        public = serialization.load_ssh_public_key(text.strip().encode())
    except _MALFORMED as error:
        raise ConfigError(
            "the public key must be one line as `fedzo client init` prints it (ecdsa-sha2-nistp384 AAAA...), got "
            f"{text[:60]!r}. Give the line, or the file key.pub of the site."
        ) from error
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ConfigError("the public key must be one of an elliptic curve. Make one with `fedzo client init`.")
    return public


def pem_of(public_key: str) -> bytes:
    """A public key's line in the form in which Flower sends and keeps it; errors as in ``read_public_key``."""
    public = _public_key(public_key)
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(pem: bytes) -> str:
    """Names a public key for people, as OpenSSH does; for bytes that are no key, says so."""
    try:
        public = serialization.load_pem_public_key(pem)
        if not isinstance(public, ec.EllipticCurvePublicKey):
            return "no elliptic curve key"
        blob = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).split()[1]
    except _MALFORMED:
        return "no key"
    return "SHA256:" + b64encode(hashlib.sha256(b64decode(blob)).digest()).decode().rstrip("=")


def make_secret(file: Path) -> None:
    """Write a new secret, 64 hexadecimal digits."""
    write_private(file, secrets.token_hex(32).encode())


def write_private(file: Path, content: bytes) -> None:
    """Write a file that only this user may read, all of it or nothing."""
    replace_file(file, content, mode=0o600)


def is_private(file: Path) -> bool:
    """Whether only this user may read a file, or look into a folder."""
    return file.stat().st_mode & 0o077 == 0 and file.stat().st_uid == os.getuid()


def keep_private(folder: Path) -> str:
    """Close a folder to other users; says so where this user cannot. What a link leads to is left as it is."""
    try:
        if not (folder.is_symlink() or is_private(folder)):
            folder.chmod(0o700)
    except PermissionError:
        return f"{folder}: others may read it, and only its owner can close it: chmod 700 {folder}"
    return ""


def missing_files(folder: Path, names: Sequence[str], what: str) -> list[str]:
    """Which files a folder lacks.

    Args:
        folder: The folder.
        names: Of files that it must have.
        what: The folder is, for the message.

    Raises:
        ConfigError: This user may not look.
    """
    try:
        return [name for name in names if not (folder / name).is_file()]
    except PermissionError as error:
        raise ConfigError(
            f"{what} {folder}: this user must be allowed to read it, got {error.strerror!r}. Call the command as the "
            "user who made the folder."
        ) from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    address = _ip_address(name)
    return x509.DNSName(name) if address is None else x509.IPAddress(address)


def _ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _line(public: ec.EllipticCurvePublicKey) -> str:
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _names_of(certificate: x509.Certificate) -> Iterator[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for kind in (x509.DNSName, x509.IPAddress):
        yield from map(str, names.get_values_for_type(kind))
