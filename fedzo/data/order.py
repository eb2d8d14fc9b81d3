"""Which rows a step uses: a function of (run seed, client, steps used), so resume and absence change nothing."""

from __future__ import annotations

from fedzo.zo.directions import PURPOSE_DATA, permutation, stream_key


def batch_rows(*, run_seed: int, client: int, used: int, batch_size: int, num_rows: int) -> list[int]:
    """Row numbers (0..num_rows-1) of a client's step number ``used``.

    The client's rows are read one permutation (epoch) after another; a batch may span two of them. Each epoch's
    permutation is drawn from the client's own stream, so no two clients share an order.
    """
    first = used * batch_size
    orders: dict[int, list[int]] = {}
    rows = []
    for at in range(first, first + batch_size):
        epoch, offset = divmod(at, num_rows)
        if epoch not in orders:
            key = stream_key(run_seed, round=epoch, owner=client)
            orders[epoch] = permutation(key, num_rows, purpose=PURPOSE_DATA).tolist()
        rows.append(orders[epoch][offset])
    return rows
