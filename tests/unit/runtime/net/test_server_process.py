"""What the server of a run leaves of an error, and what whoever started it makes of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedzo.data.kept_digests import RowsChangedError
from fedzo.errors import ConfigError, FedzoError, NumericsError, ProtocolError
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
    error: Exception, kind: type[FedzoError], tmp_path: Path
) -> None:
    server = ServerProcess(tmp_path, tmp_path, serve=["false"])  # which ends with status 1, as a server that failed
    assert write_outcome(tmp_path, error) == FAILED

    with pytest.raises(kind, match=str(error)) as caught:
        server.wait(lambda: None)

    assert type(caught.value) is kind
