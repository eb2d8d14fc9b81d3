"""``fedzo doctor``: whether this machine can take part, and whether a server's or a site's folder is in order."""

from __future__ import annotations

import email.utils
import os
import platform
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch

from fedzo.config.schema import SiteFile
from fedzo.config.travel import load_site
from fedzo.data.sources import own_files, read_own
from fedzo.errors import ConfigError, FedzoError, printable, shell
from fedzo.models.available import available_memory_bytes, held_bytes, mapped_bytes, ways_to_fit
from fedzo.models.load import load_model, resolve_device
from fedzo.models.memory import weights_bytes
from fedzo.models.source import find_source
from fedzo.records.folder import LOCK, is_locked
from fedzo.report.format import bytes_text
from fedzo.runtime.net.addresses import accepts, split_address
from fedzo.runtime.net.client_folder import AUTHORITY, KEY, SECRET, SITE, ClientFolder
from fedzo.runtime.net.credentials import FEW_DAYS, is_private, is_signed_by, plain_pem, read_certificate
from fedzo.runtime.net.launch import listening_problem
from fedzo.runtime.net.server_folder import ServerFolder
from fedzo.system import PACKAGES, code_version, default_threads, device_text, package_problems, package_version
from fedzo.zo.config import Distribution
from fedzo.zo.directions import add_direction, direction, direction_at, fused, stream_key

Check = tuple[str, bool, str]
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")


def folder_checks(path: Path) -> Iterator[Check]:
    """Whether a server's or a site's folder is in order: what is checked, whether it is good, and what to do.

    Raises:
        ConfigError: It is neither.
    """
    try:
        if ServerFolder.is_one(path):
            yield from _server_checks(ServerFolder(path))
        elif (path / SITE).exists():
            yield from _client_checks(ClientFolder(path))
        else:
            raise ConfigError(f"{path}: it must be a server's folder or a site's, but is neither. Check the path.")
    except PermissionError as error:
        who = "Let this user read it, or call the command as the user who made the folder"
        yield "folder", False, f"{error.filename or path}: {error.strerror}. {who}"


def _server_checks(folder: ServerFolder) -> Iterator[Check]:
    try:
        folder.check()
    except FedzoError as error:
        yield "folder", False, str(error)
        return
    secrets = [folder.file(name) for name in ("ca.key", "server.key", "secret", "superlink.db")]
    yield from _private([file for file in secrets if file.exists()])
    yield from _logs(folder.file("logs"))
    listening, certificate = folder.listening, read_certificate(folder.file("server.crt"))
    days, renew = certificate.days_left, shell("fedzo server renew --dir", folder.path)
    yield _check("certificate", days > FEW_DAYS, f"valid for {days:.0f} days", f". `{renew}`")
    host = split_address(listening.address)[0]
    names, hosts = ", ".join(certificate.names), " ".join(f"--host {name}" for name in (host, *certificate.names))
    yield _check("name", certificate.covers(host), host, f" is none of {names}. `{renew} {hosts}`")
    signed = is_signed_by(folder.file("server.crt"), folder.file("ca.crt"))
    yield "authority", signed, "signs the certificate" if signed else f"does not sign it. `{renew}`"
    up = accepts(listening.control)
    yield _check("SuperLink", up, listening.control, f" is silent. `{shell('fedzo server up', folder.path)}`")
    if not up:
        taken = listening_problem(folder)
        yield "ports", not taken, taken or f"{listening.listen} and {listening.control} are free"
    count, register = len(folder.registry.clients), shell("fedzo server add-client NAME --dir", folder.path)
    yield _check("clients", count > 0, f"{count} registered", f". `{register}`")
    yield _proxies()


def _client_checks(folder: ClientFolder) -> Iterator[Check]:
    try:
        folder.check()
        site = load_site(folder.file(SITE))
    except FedzoError as error:
        yield "folder", False, str(error)
        return
    yield from _private([folder.file(KEY), folder.file(SECRET)])
    yield from _logs(folder.file("logs"))
    days = read_certificate(folder.file(AUTHORITY)).days_left
    yield _check("authority", days > FEW_DAYS, f"valid for {days:.0f} days", f". Ask the server for a new {AUTHORITY}")
    yield (proxy := _proxies())
    if proxy[1]:
        yield from _server_seen(folder)
    yield _rows(site.data.path)
    if is_locked(folder.file(LOCK)):
        see = shell("fedzo status", folder.path)
        skipped = "device, directions, CUDA kernels, memory, model and tokenizer"
        yield "not checked", True, f"{skipped}, for the site is up and needs the memory: `{see}`"
        return
    yield from _model(site)


def _rows(path: str | None) -> Check:
    """Whether the site's rows can be read, and what they are; the task of a run says later which columns it needs."""
    if path is None:
        return "rows", False, f"data.path of {SITE} must name their file"
    try:
        rows = [row for file in own_files(path) for _, row in read_own(file)]
    except ConfigError as error:
        return "rows", False, str(error)
    return "rows", True, f"{len(rows)} rows with {printable(', '.join(rows[0]))}"


def _model(site: SiteFile) -> Iterator[Check]:
    """Whether the device is there and computes right, the model fits in its memory, and the site allows its weights."""
    try:
        device = resolve_device(site.device)
        told = device_text(device)
    except (ConfigError, RuntimeError) as error:  # the latter of a driver
        yield "device", False, printable(str(error))
        return
    yield "device", True, told
    yield _directions(device)
    yield from _kernels(device)
    try:
        files = find_source(site.model).files
        held = held_bytes(site.model, files)
        needed = sum(file.stat().st_size for file in files) if held is None else held.total
        left = available_memory_bytes(device)
        if needed > left:
            ways = ways_to_fit(site.model, device)
            yield "memory", False, f"the weights take {bytes_text(needed)}, {bytes_text(left)} are free. {ways}"
            return
        loaded = load_model(site.model, device=site.device)
    except PermissionError:  # which is told of for the whole folder
        raise
    except Exception as error:  # a driver, or a model's own code, may raise anything
        foreseen = isinstance(error, ConfigError)
        yield "model", False, str(error) if foreseen else printable(f"{type(error).__name__}: {error}")
        return
    taken, left = weights_bytes(loaded.model), available_memory_bytes(device)
    left = max(0, left - mapped_bytes()) if device.type == "cpu" else left
    yield "memory", True, f"the weights take {bytes_text(taken)}, {bytes_text(left)} are left beside them"
    digest, allowed = loaded.base_digest, site.limits.base_digest
    otherwise = f", but limits.base_digest of {SITE} is {allowed}"
    yield _check("model", not allowed or digest == allowed, f"SHA-256 {digest}", otherwise)
    yield "tokenizer", True, f"SHA-256 {loaded.tokenizer_digest}"


def _directions(device: torch.device) -> Check:
    """Whether a device makes the directions that all others make, whatever computes them there."""
    base, key, start, scale = torch.linspace(-1, 1, 4099), 5, 2**35 - 1001, 2.0**-9 + 2.0**-20
    coordinates = torch.arange(start, start + base.numel())
    told = f"those of {device} "
    try:
        for law in Distribution:
            expected = base + direction_at(key, coordinates, distribution=law) * scale
            made = add_direction(base.to(device), key, scale=scale, start=start, distribution=law)
            if not torch.equal(made.cpu(), expected):
                remedy = "Update torch, Numba and the driver, or name another device"
                return "directions", False, f"{told}are not the specified ones ({law}). {remedy}"
    except RuntimeError as error:  # of a driver, or of memory
        return "directions", False, f"{told}cannot be made: {printable(str(error), most=200)}"
    return "directions", True, f"{told}are the specified ones"


def _kernels(device: torch.device) -> Iterator[Check]:
    """Whether a device of NVIDIA's makes directions by kernels of their own."""
    if device.type == "cuda" and torch.version.cuda:
        slow = "none, so directions are many times slower. See the warning"
        try:
            index = torch.cuda.current_device() if device.index is None else device.index
            found = fused(torch.device("cuda", index)) is not None
        except RuntimeError as error:  # of a driver
            found, slow = False, printable(str(error))
        yield "CUDA kernels", found, "make the directions" if found else slow


def _server_seen(folder: ClientFolder) -> Iterator[Check]:
    """Whether the site reaches its server, the certificate is the server's, and the clocks agree."""
    authority = plain_pem(folder.file(AUTHORITY).read_bytes(), folder.file(AUTHORITY))  # as `fedzo client up` makes it
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    try:
        answer = httpx.get(f"https://{folder.address}/", verify=context, timeout=10.0)
    except httpx.HTTPError as error:
        remedy = "Is `fedzo server up` running there, and is its port open? Is ca.crt this server's?"
        yield "server", False, f"{folder.address}: {error}. {remedy}"
        return
    yield "server", True, f"{folder.address} answers, with a certificate of {AUTHORITY}"
    if (told := email.utils.parsedate_tz(answer.headers.get("date", ""))) is not None:
        behind = email.utils.mktime_tz(told) - time.time()
        off = f"{abs(behind):.0f} s off the server's"
        yield _check("clock", -4.0 < behind < 300.0, off, ". One of the two clocks is wrong: set that one")


def _check(name: str, good: bool, told: str, otherwise: str) -> Check:
    """A check that tells the same either way, and ``otherwise`` behind it where it is not good."""
    return name, good, told if good else told + otherwise


def _private(files: list[Path]) -> Iterator[Check]:
    readable = [file.name for file in files if not is_private(file)]
    told = f"others may read {', '.join(readable)}: chmod 600" if readable else "only this user reads them"
    yield "secrets", not readable, told


def _logs(folder: Path) -> Iterator[Check]:
    """Whether only this user looks into the logs, which may name rows and sites."""
    if folder.exists():
        good = is_private(folder)
        yield "logs", good, "only this user reads them" if good else f"others may read them: chmod 700 {folder}"


def _proxies() -> Check:
    """Which proxies the environment names, and whether all that is asked of the server can go by them."""
    found = ", ".join(name for name in PROXIES if os.environ.get(name))
    except_for = ", ".join(name for name in ("NO_PROXY", "no_proxy") if os.environ.get(name))
    try:
        httpx.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)).close()  # which looks at all of them
    except (ValueError, httpx.InvalidURL, ImportError) as error:
        what = ", ".join(filter(None, (found, except_for)))
        remedy = "A proxy's address must begin with http://, https://, socks5:// or socks5h://. NO_PROXY names hosts"
        return "proxy", False, f"{what}: {printable(str(error))}. {remedy}"
    return "proxy", True, f"{found}: used for traffic to other machines" if found else "none in the environment"


def doctor() -> list[Check]:
    """Whether this machine can take part: versions, its device, and directions against golden numbers and on it."""
    checks = [("python", sys.version_info >= (3, 11), platform.python_version()), ("fedzo", True, code_version())]
    problems = package_problems()
    for name in dict.fromkeys((*PACKAGES, *problems)):
        checks.append((name, name not in problems, problems.get(name) or package_version(name) or "not installed"))
    device = resolve_device("auto")
    checks.append(("device", True, f"{device}, {default_threads()} CPU threads"))
    bits = [f"{word:08x}" for word in direction(stream_key(0, round=0), 4).view("uint32")]
    golden = bits == ["bea7d6d0", "3e5d41d9", "3fd9904a", "401c6450"]
    checks.append(("directions", golden, "golden vector " + ("matches" if golden else f"differs: {bits}")))
    return [*checks, _directions(device), *_kernels(device)]
