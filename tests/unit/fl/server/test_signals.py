"""Signals of local steps against materialised float64 vectors, one client and step at a time."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.config.schema import RunSettings
from fedzo.errors import RunFolderError
from fedzo.fl.config import Directions, FlConfig
from fedzo.fl.server.scalar_aggregator import ScalarResult, aggregate
from fedzo.fl.server.signals import Signals
from fedzo.records.decode import decode_json, to_json
from fedzo.records.log import ScalarAuditLine
from fedzo.records.metrics import StepSignals
from fedzo.testing.logs import audit_line
from fedzo.zo.config import Distribution
from fedzo.zo.directions import SHARED, direction
from fedzo.zo.keys import OWN, step_key
from fedzo.zo.log import ScalarRecord

N, SEED = 50, 11
GRADIENT = np.linspace(-2, 3, N).astype(np.float32)
LAWS = list(Distribution)
RUNS = {
    SHARED: RunSettings(),
    OWN: RunSettings(fl=FlConfig(directions=Directions.per_client)),
    3: RunSettings(fl=FlConfig(directions=Directions.pool, pool_size=3)),
}


def replies(round: int) -> dict[int, ScalarResult]:
    """Clients whose numbers of steps differ; client 4 is absent in round 1, client 2 loses a probe and a step."""
    made = {}
    for client, steps in {2: 3, 4: 1, 7: 2 + round}.items():
        if (client, round) == (4, 1):
            continue
        drawn = direction(100 * round + client, 2 * steps * 2).reshape(2, steps, 2)
        g, loss = drawn[0].copy(), np.abs(drawn[1])
        dropped = np.zeros((steps, 2), bool)
        if client == 2:
            dropped[0, 1], dropped[1] = True, True
            g[dropped], loss[dropped] = 0, np.nan
        made[client] = ScalarResult(g=g, loss=loss, dropped=dropped, end_check=0)
    return made


def oracle(
    result: ScalarResult, round: int, client: int, directions: int, law: Distribution
) -> dict[str, list[float | None]]:
    rows: dict[str, list[float | None]] = {"grad_ip": [], "abs_g": [], "loss": [], "cosine": []}
    wide = GRADIENT.astype(np.float64)
    for t, (g, loss) in enumerate(zip(result.g.astype(float), result.loss.astype(float), strict=True)):
        ghat = np.zeros(N)
        for p in range(2):
            key = step_key(SEED, round=round, step=t, probe=p, owner=client, directions=directions)
            ghat += g[p] * direction(key, N, distribution=law).astype(np.float64) / 2
        if result.dropped[t].all():
            for values in rows.values():
                values.append(None)
            continue
        rows["grad_ip"].append(float(wide @ ghat))
        rows["abs_g"].append((abs(g[0]) + abs(g[1])) / 2)
        rows["loss"].append(sum(x for x in loss if not math.isnan(x)) / sum(not math.isnan(x) for x in loss))
        rows["cosine"].append(float(wide @ ghat / math.sqrt(wide @ wide) / math.sqrt(ghat @ ghat)))
    return rows


def play(signals: Signals, round: int, directions: int, audit: list[ScalarAuditLine]) -> dict[int, dict[str, Any]]:
    """One round as the server plays it."""
    results = replies(round)
    g = {client: result.g for client, result in results.items()}
    record = aggregate(g, {2: 1, 4: 2, 7: 3}, RUNS[directions], round=round, lr=0.1)
    line = line_of(record, results, signals)
    audit.append(decode_json(ScalarAuditLine, to_json(line), where="audit", error=RunFolderError))
    signals.note(line)
    found = signals.of_round(record, line)
    return {client: listed(signals) for client, signals in found.items()}


def line_of(record: ScalarRecord, results: dict[int, ScalarResult], signals: Signals) -> ScalarAuditLine:
    line = audit_line(
        {client: result.g for client, result in sorted(results.items())},
        dropped={client: result.dropped for client, result in results.items()},
        xi=signals.products(record),
        round=record.round,
    )
    return replace(line, clients=tuple(replace(entry, loss=results[entry.client].loss) for entry in line.clients))


def listed(signals: StepSignals) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(signals).items()}


def new_signals(law: Distribution, audit: list[ScalarAuditLine], *, known: bool = True) -> Signals:
    signals = Signals(torch.from_numpy(GRADIENT) if known else None, run_seed=SEED, distribution=law)
    for line in audit:
        signals.note(line)
    return signals


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("directions", [SHARED, OWN, 3])
def test_signals_are_those_of_whole_vectors_and_their_means_go_over_all_rounds(
    law: Distribution, directions: int
) -> None:
    audit: list[ScalarAuditLine] = []
    signals, seen = new_signals(law, audit), {2: [], 4: [], 7: []}

    for round in range(3):
        found = play(signals, round, directions, audit)

        assert list(found) == sorted(replies(round))
        for client, result in replies(round).items():
            expected = oracle(result, round, client, directions, law)
            for name, values in expected.items():
                assert found[client][name] == [v if v is None else pytest.approx(v, rel=1e-5) for v in values], name
            seen[client] += zip(expected["grad_ip"], expected["abs_g"], strict=True)
            known = [pair for pair in seen[client] if pair[0] is not None]
            means = np.abs(known).mean(axis=0)
            got = (found[client]["mean_abs_grad_ip"], found[client]["mean_abs_g"])
            assert got == pytest.approx(means, rel=1e-5)

    # a resumed server knows the steps of before from the log, to the last bit
    again = new_signals(law, audit[:2])
    assert play(again, 2, directions, []) == found


def test_without_a_gradient_only_what_needs_none_is_known() -> None:
    with_one, without = ([], [])
    found = play(new_signals(LAWS[0], [], known=False), 0, SHARED, without)
    full = play(new_signals(LAWS[0], []), 0, SHARED, with_one)

    assert without[0].xi is None
    for client, signals in found.items():
        assert signals["grad_ip"] == signals["cosine"] == [None] * len(replies(0)[client].g)
        assert signals["mean_abs_grad_ip"] is None
        for name in ("abs_g", "loss", "mean_abs_g"):
            assert signals[name] == full[client][name]


def test_a_client_whose_every_step_was_lost_has_no_means() -> None:
    lost = np.ones((2, 1), bool)
    result = ScalarResult(g=np.zeros((2, 1), np.float32), loss=np.full((2, 1), np.nan, np.float32), dropped=lost,
                          end_check=0)  # fmt: skip
    signals = new_signals(LAWS[0], [])
    record = aggregate({0: result.g}, {0: 1}, RUNS[SHARED], round=0, lr=0.1)
    line = line_of(record, {0: result}, signals)
    signals.note(line)

    assert listed(signals.of_round(record, line)[0]) == {
        **{name: [None, None] for name in ("grad_ip", "abs_g", "loss", "cosine")},
        **dict.fromkeys(("mean_abs_grad_ip", "mean_abs_g")),
    }
