"""``fedzo replay``: a log, verified from the base weights; or one client's local steps of a round, its virtual path.

The values after every local step have the bits that the client had: it started from the round's state of the log and
stepped along known directions by the scalars that it sent (arXiv 2506.03337). These are proved by the round's public
scalars, of which they are a part of the mean (or of what the run takes for it). Several steps are proved by the check
that it sent with them, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedzo.commands.run_folder import read_run, rebuild
from fedzo.config.schema import RunConfig
from fedzo.config.travel import config_hash
from fedzo.errors import ConfigError, ProtocolError, RunFolderError
from fedzo.fl.config import directions_of
from fedzo.fl.log_store import RunLog
from fedzo.fl.server.scalar_aggregator import aggregate
from fedzo.records.folder import METRICS, raised_as
from fedzo.records.log import ScalarAudit, ScalarAuditLine
from fedzo.records.metrics import Extension
from fedzo.zo.keys import step_keys
from fedzo.zo.log import ScalarRecord, Scalars
from fedzo.zo.spaces.base import Space, Values
from fedzo.zo.steps import local_step, probe_shares


def replay_run(run_dir: Path, *, rounds: int | None = None) -> dict[str, object]:
    """Verify a log: rebuild every state from the base weights and compare it with the log's own hashes.

    Returns:
        What was found; ``extended`` says where the run was made longer, as far as the metrics are there to tell.
    """
    config, log = read_run(run_dir), RunLog(run_dir)
    longer = log.metrics_of(Extension) if (run_dir / METRICS).exists() else []
    extended = [{"round": each.round, "before": each.before, "rounds": each.rounds} for each in longer]
    replica = rebuild(run_dir, rounds=len(log.records) if rounds is None else rounds).replica
    return {
        "rounds": replica.position,
        "space_size": replica.space.size,
        "digest": replica.digest(),
        "chain": replica.chain.hex(),
        "config_hash": config_hash(config),
        **({"extended": extended} if extended else {}),
    }


@dataclass(frozen=True, slots=True)
class ClientPath:
    """The local steps of one client in one round, T_k of them.

    Attributes:
        lr: Learning rate of the local steps.
        checks: 32-bit check of theta after each step.
        g: Scalars, float32 [T_k, P].
        loss: Each probe's view of the loss before the step, float64 [T_k, P]; nan where dropped.
        checked: Whether the client's own check was compared, too; it sends none of a single step.
    """

    client: int
    round: int
    lr: float
    checks: tuple[int, ...]
    g: Scalars
    loss: np.ndarray
    checked: bool

    def table(self) -> Iterator[str]:
        """Lines of text, one a step."""
        yield f"client {self.client}, round {self.round}: T = {len(self.g)}, lr = {self.lr:g}"
        yield f"{'step':>5}  {'checksum':>8}  {'loss':>10}  g"
        for t, check in enumerate(self.checks):
            known = self.loss[t][np.isfinite(self.loss[t])]
            loss = f"{known.mean():10.6f}" if known.size else f"{'dropped':>10}"
            yield f"{t + 1:>5}  {check:08x}  {loss}  " + " ".join(f"{g:.6g}" for g in self.g[t])
        if self.checked:
            yield f"end: {self.checks[-1]:08x}, the checksum that the client sent"
        else:
            yield "end: one step, checked by the public scalars of the round"


def replay_client(run_dir: Path, *, client: int, round: int, out: Path | None = None) -> ClientPath:
    """Rebuild a client's local steps, and prove them by the public log and by the check that the client sent.

    Args:
        run_dir: The run folder; nothing else but the base model is needed.
        client: Which client.
        round: Which round, from 0.
        out: A safetensors file to write: one float32 tensor [n] a step in wire order, ``step_0001`` after the first.

    Raises:
        ConfigError: The round is beyond the log, the client did not take part in it, or ``out`` is no place for a file.
        ProtocolError: The logs do not belong together, or do not lead to the checksum that the client sent.
        RunFolderError: ``out`` cannot be written.
    """
    config = read_run(run_dir)
    if config.estimator.sends_vectors:
        raise ConfigError(
            f"--client: the run must have clients that send scalars, but those of {run_dir} send vectors, of which the "
            "log keeps the round's mean only. Leave out --client, which replays the whole run."
        )
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out must be a file in an existing folder, got {str(out)!r}. Choose another.")
    log = RunLog(run_dir)
    line, entry = _find(cast(Sequence[ScalarAuditLine], log.audit), client=client, round=round)
    record = cast(ScalarRecord, log.records[round])
    g = entry.g
    replica = rebuild(run_dir, rounds=round).replica
    space, drift = replica.space, replica.drift(client, lr=line.lr)
    checked = len(g) > 1
    if line.lr == record.lr:  # a calibration's record has zeros, which tell nothing
        _check_sum(line, record, config)
    checks, own = [], {"round": round, "owner": client, "directions": directions_of(config.fl)}
    about = {"client": str(client), "round": str(round), "lr": repr(line.lr)}
    with vector_file(out, steps=len(g), size=space.size, about=about) as write:
        for step, scalars in enumerate(g):
            keys = step_keys(config.seed, step=step, probes=len(scalars), **own)
            local_step(space, lr=line.lr, c=probe_shares(scalars), keys=keys, drift=drift)
            checks.append(space.check())
            write(space)
        if checked and checks[-1] != entry.end_check:
            raise ProtocolError(
                f"client {client}, round {round}: its local steps must lead to the checksum {entry.end_check:08x} "
                f"that it sent, but they lead to {checks[-1]:08x}. The client did other steps than it "
                "reported, or the audit log was changed."
            )
    return ClientPath(client, round, line.lr, tuple(checks), g, entry.loss.astype(np.float64), checked)


def _check_sum(line: ScalarAuditLine, record: ScalarRecord, config: RunConfig) -> None:
    """Compare a round's public scalars with those that the audit log's make.

    Raises:
        ProtocolError: They differ, so one of the logs is not the run's.
    """
    g = {entry.client: entry.g for entry in line.clients}
    weights = {entry.client: entry.weight for entry in line.clients}
    made = aggregate(g, weights, config, round=record.round, lr=record.lr)
    if not np.array_equal(made.coefficients, record.coefficients):
        raise ProtocolError(
            f"round {record.round}: the clients' scalars of the audit log must give those of the public log, but do "
            "not. One of the logs is from another run. Restore it from a copy."
        )


def _find(audit: Sequence[ScalarAuditLine], *, client: int, round: int) -> tuple[ScalarAuditLine, ScalarAudit]:
    if round >= len(audit):
        raise ConfigError(
            f"--round must be below {len(audit)}, the number of rounds in the log, got {round}. Rounds count from 0."
        )
    line = audit[round]
    for entry in line.clients:
        if entry.client == client:
            return line, entry
    present = ", ".join(str(entry.client) for entry in line.clients)
    why = "sent nothing usable, or rested" if client in line.refused else "was not asked"
    raise ConfigError(
        f"--client must have taken part in round {round} (clients {present}), but client {client} {why}. "
        "Choose another client or round."
    )


@contextmanager
def vector_file(
    path: Path | None, *, steps: int, size: int, about: Mapping[str, str]
) -> Iterator[Callable[[Space], None]]:
    """A safetensors file that is written vector by vector, so that memory holds one; all of it appears, or nothing."""
    if path is None:
        yield lambda space: None
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with raised_as(RunFolderError, f"--out {path}: it must be writable", "Choose another place."):
            with part.open("wb") as file:
                file.write(_header(steps, size, about))
                yield lambda space: _write(file, space.values())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write(file: Any, values: Values) -> None:
    file.write(np.ascontiguousarray(values, "<f4").data)


def _header(steps: int, size: int, about: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON with the place of every tensor."""
    tensors = {
        f"step_{t + 1:04d}": {"dtype": "F32", "shape": [size], "data_offsets": [4 * size * t, 4 * size * (t + 1)]}
        for t in range(steps)
    }
    head = json.dumps({"__metadata__": dict(about), **tensors}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head
