"""What the server of a run leaves of an error, and what whoever started it makes of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedzo.data.kept_digests import RowsChangedError
from fedzo.errors import ConfigError, FedzoError, NumericsError, ProtocolError, RunFolderError
from fedzo.runtime.net import server_process
from fedzo.runtime.net.server_process import FAILED, ServerProcess, write_outcome


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RowsChangedError("rows"), ConfigError),  # of a class that only its own module knows
        (NumericsError("numbers"), NumericsError),
        (ValueError("a bug"), ProtocolError),
    ],
)
def test_an_error_is_of_the_same_kind_in_both_processes(
    error: Exception, kind: type[FedzoError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "SERVE", ["false"])  # which ends with status 1, as a server that failed
    server = ServerProcess(tmp_path, tmp_path)
    assert write_outcome(tmp_path, error) == FAILED

    with pytest.raises(kind, match=str(error)) as caught:
        server.wait(lambda: None)

    assert type(caught.value) is kind


def test_a_server_that_the_kernel_killed_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot leave a message."""
    monkeypatch.setattr(server_process, "SERVE", ["sh", "-c", "kill -9 $$"])

    with pytest.raises(ProtocolError, match=r"ended with status -9 \(killed: most often by the kernel"):
        ServerProcess(tmp_path, tmp_path).wait(lambda: None)


@pytest.mark.parametrize("name", ["logs", "logs/server.log"])
def test_what_a_detached_server_says_goes_through_no_link(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder may come from somebody else."""
    monkeypatch.setattr(server_process, "SERVE", ["false"])
    folder, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(outside if name == "logs" else outside / "server.log")

    with pytest.raises(RunFolderError, match=f"{name}: it must lie in its folder itself, got a link to"):
        ServerProcess(folder, tmp_path, detached=True)

    assert list(outside.iterdir()) == []
