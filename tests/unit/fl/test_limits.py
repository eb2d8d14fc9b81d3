"""What a client refuses to be asked: every number of a request outside of what the run announced."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.config.schema import RunConfig, SiteFile
from fedzo.data.kept_digests import KeptDigests
from fedzo.errors import ProtocolError
from fedzo.fl.config import FlConfig, SiteLimitsConfig
from fedzo.fl.limits import Limits
from fedzo.fl.messages import Refusal, TrainRequest
from fedzo.fl.site_limits import SiteError
from fedzo.models.config import BaseConfig
from fedzo.zo.directions import SHARED
from fedzo.zo.estimator import BackpropConfig, TwoPointConfig
from fedzo.zo.keys import OWN
from fedzo.zo.log import EMPTY_CHAIN, ScalarRecord, VectorRecord, pack
from fedzo.zo.server_optimizer import ScaffoldConfig, SgdConfig

RUN = RunConfig(
    base=BaseConfig(label="m", weights_digest="", tokenizer_digest="", architecture_digest=""),
    artifact="a" * 64,
    fl=FlConfig(num_clients=3, rounds=6, local_steps=5, batch_size=4),
    estimator=TwoPointConfig(num_probes=2),
    server_optimizer=SgdConfig(lr=0.1),
)
LIMITS = Limits(run=RUN, site=SiteFile())
WALKED = replace(LIMITS, run=replace(RUN, server_optimizer=ScaffoldConfig(lr=0.1)))
REQUEST = TrainRequest(
    client=2,
    space_id="a" * 64,
    round=2,
    from_round=1,
    chain=EMPTY_CHAIN.hex(),
    steps=5,
    used=10,
    lr=float(np.float32(0.1)),
)


def record(**fields: Any) -> ScalarRecord:
    shape = fields.pop("shape", (5, 2, 1))
    sound = {"round": 1, "lr": 0.05, "owners": (SHARED,), "coefficients": np.ones(shape, np.float32)}
    return ScalarRecord(**{**sound, **fields})


def test_what_the_run_announced_passes() -> None:
    for each in (record(), record(lr=0.0, shape=(1, 2, 1))):
        LIMITS.check_state(replace(REQUEST, log=pack([each])))
    own = record(shape=(5, 2, 3), owners=(0, 1, 2), directions=SHARED)
    WALKED.check_state(replace(REQUEST, log=pack([own])))
    LIMITS.check_steps(REQUEST)
    LIMITS.check_state(replace(REQUEST, round=6, from_round=6))  # scores after the last round


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"steps": 6}, "steps must be 1 to 5 in this run, got 6"),
        ({"steps": 65535}, "steps must be 1 to 5"),
        ({"used": 11}, "used must be 0 to 10 in this run, got 11"),
        ({"used": 1 << 53}, "used must be 0 to 10"),
        ({"round": 6}, "round must be 0 to 5 in this run, got 6"),
        ({"lr": 0.1001}, "lr must be 0 to 0.1 in this run, got 0.1001"),
        ({"lr": math.nan}, "lr must be 0 to 0.1 in this run, got nan"),
        ({"lr": -0.1}, "lr must be"),
        ({"max_abs_g": 1e7}, r"max_abs_g must be 0 to 1e\+06 in this run, got 1e\+07"),
        ({"max_abs_g": math.inf}, "max_abs_g must be"),
    ],
)
def test_work_beyond_what_the_run_announced_is_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        LIMITS.check_steps(replace(REQUEST, **fields))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"round": 7}, "round must be 0 to 6 in this run, got 7"),
        ({"from_round": 3}, "from_round must be 0 to 2 in this run, got 3"),
        ({"chain": ""}, "chain must be 64 hexadecimal digits, got none"),
        ({"space_id": "b" * 64}, r"artifact: it must be the run's \(aaaaaaaaaaaa\), got bbbbbbbbbbbb"),
        ({"space_id": ""}, "artifact: it must be the run's .*, got none"),
        ({"log": pack([record(round=0)])}, "the round of a record must be 1 to 1 in this run, got 0"),
        ({"log": pack([record(), record()])}, "the round of a record must be 2 to 2 in this run, got 1"),
        ({"log": pack([record(lr=0.2)])}, "log, round 1: lr must be 0 to 0.1 in this run, got 0.2"),
        ({"log": pack([record(shape=(6, 2, 1))])}, "the number of steps must be 1 to 5 in this run, got 6"),
        ({"log": pack([record(shape=(5, 3, 1))])}, "the number of probes must be 2 to 2 in this run, got 3"),
        ({"log": pack([record(shape=(5, 2, 4), owners=(0, 1, 2, 3))])}, "the number of owners must be 1 to 3"),
    ],
)
def test_a_state_that_the_run_cannot_have_is_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        LIMITS.check_state(replace(REQUEST, **fields))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"shape": (5, 2, 2), "owners": (1, 1)}, "owners must be clients of 0 to 2, ascending"),
        ({"owners": (3,)}, "owners must be clients of 0 to 2"),
        ({"owners": (1,), "directions": OWN}, "directions must be 4294967295, got 0"),
    ],
)
def test_columns_that_are_not_those_of_the_runs_clients_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        WALKED.check_state(replace(REQUEST, log=pack([record(**fields)])))


def test_records_that_the_run_cannot_have_are_refused_before_anything_moves_along_them() -> None:
    """A vector would move the model anywhere, and columns of clients along directions that the run does not have."""
    vector = VectorRecord.of(np.ones(4, np.float32), round=1, lr=0.05)
    shared, columns = record(), record(shape=(5, 2, 2), owners=(0, 2), directions=SHARED)

    for limits, refused, match in (
        (LIMITS, vector, "log, round 1: it must hold scalars"),
        (replace(LIMITS, run=replace(RUN, estimator=BackpropConfig())), shared, "log, round 1: it must hold a vector"),
        (LIMITS, columns, "log, round 1: it must hold scalars of all together"),
        (WALKED, shared, "log, round 1: it must hold scalars of each client"),
    ):
        with pytest.raises(ProtocolError, match=match):
            limits.check_state(replace(REQUEST, log=pack([refused])))


def test_values_in_place_of_the_log_must_have_been_asked_for() -> None:
    """By a log a server can only move the model along the run's directions."""
    values = replace(REQUEST, values=b"1234")

    with pytest.raises(ProtocolError, match="values must be left out: in this run a client replays the log"):
        LIMITS.check_state(values)

    LIMITS.check_state(values, asked_values=True)
    replace(LIMITS, takes_values=True).check_state(values)


def test_the_sites_own_limits_hold_at_each_request() -> None:
    """Also against a server that never asked whether the site takes part."""
    file = SiteFile(limits=SiteLimitsConfig(max_steps=4, max_rows=12), artifact_max_bytes=100)
    site = replace(LIMITS, site=file)

    site.check_steps(replace(REQUEST, steps=3))
    site.check_artifact_size(100)
    for refused, refusal in (
        (lambda: site.check_steps(replace(REQUEST, steps=5)), Refusal.steps),
        (lambda: site.check_steps(replace(REQUEST, steps=4)), Refusal.step_rows),
        (lambda: site.check_artifact_size(101), Refusal.artifact),
    ):
        with pytest.raises(SiteError) as caught:
            refused()
        assert caught.value.refusal is refusal


def test_a_site_is_one_client_of_a_run_and_no_other(tmp_path: Path) -> None:
    site = replace(LIMITS, kept=KeptDigests(tmp_path, "b" * 16))

    site.check_client(1)
    site.check_client(1)
    with pytest.raises(SiteError, match="refusal 20, its site is another client of this run") as caught:
        site.check_client(2)
    assert caught.value.details == (
        "the site is client 1 of this run, and client 2 is asked. If the server's list was wrong before, delete "
        f"{tmp_path}/client-of-{'b' * 16} and restart the site"
    )
    replace(LIMITS, kept=KeptDigests(tmp_path, "c" * 16)).check_client(2)


def test_a_client_that_the_run_does_not_have_is_nobody() -> None:
    LIMITS.check_client(2)
    with pytest.raises(ProtocolError, match="client must be 0 to 2 in this run, got 3"):
        LIMITS.check_client(3)


def test_records_without_numbers_are_refused() -> None:
    """14 bytes may declare 65,535 steps and probes; without an owner they would be walked for seconds."""
    header = (1).to_bytes(4, "little") + np.float32(0.1).tobytes() + b"\xff\xff\xff\xff\x00\x00"

    with pytest.raises(ProtocolError, match="the record of round 1 must hold at least one step, probe and owner"):
        LIMITS.check_state(replace(REQUEST, log=header))
