"""Lines of the audit log, made by hand: what a step policy or a clip is tested with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedzo.records.log import ScalarAudit, ScalarAuditLine


def audit_line(
    g: Mapping[int, npt.ArrayLike],
    *,
    dropped: Mapping[int, npt.ArrayLike] | None = None,
    xi: npt.ArrayLike | None = None,
    round: int = 0,
    lr: float = 0.5,
) -> ScalarAuditLine:
    """A round's line of the audit log.

    Args:
        g: Scalars of each client, [T_k, P].
        dropped: Flags of the clients that dropped probes, [T_k, P]; the others dropped none.
        xi: The server's gradient along every direction, [T, P, clients or 1]; None without a gradient.
        round: Number of the round.
        lr: Learning rate of the local steps.
    """
    clients = []
    for client, scalars in g.items():
        measured = np.asarray(scalars, np.float32)
        flags = np.asarray((dropped or {}).get(client, np.zeros(measured.shape)), bool)
        entry = ScalarAudit(
            client=client,
            g=measured,
            loss=np.where(flags, np.float32(np.nan), np.float32(1)),
            dropped=flags,
            steps=len(measured),
            used=0,
            weight=1.0,
            end_check=0,
        )
        clients.append(entry)
    products = None if xi is None else np.asarray(xi, np.float64)
    return ScalarAuditLine(round=round, lr=lr, xi=products, clients=tuple(clients), refused=())
