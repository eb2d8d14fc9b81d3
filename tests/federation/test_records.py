"""What a tiny federation writes is read by the strict decoder, and written again byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedzo.errors import RunFolderError
from fedzo.records.decode import decode, parse_json, to_json
from fedzo.records.log import AuditLine, PublicLine
from fedzo.records.metrics import METRIC_KINDS, decode_metric

READ: dict[str, Callable[..., object]] = {
    "public.jsonl": lambda value, **told: decode(PublicLine, value, **told),
    "audit.jsonl": lambda value, **told: decode(AuditLine, value, **told),
    "metrics.jsonl": decode_metric,
}


def test_every_kind_of_record_comes_back_byte_for_byte(run: Callable[..., Path]) -> None:
    vpcs = ["step_policy=vpcs", "step_policy.calibration_steps=4", "step_policy.initial_steps=2"]
    folder = run(
        *[*vpcs, "step_policy.later_steps=2", "fl.local_steps=2", "faults.absent=['1@1']", "fl.seeds=pool"],
        "partition.holdout=0.2",
    )

    seen = set()
    for name, read in READ.items():
        for number, line in enumerate((folder / name).read_bytes().splitlines(), start=1):
            told = {"where": f"{name}, line {number}", "error": RunFolderError}
            record = read(parse_json(line, **told), **told)
            assert to_json(record).encode() == line
            seen.add(type(record))

    assert seen == {PublicLine, AuditLine, *METRIC_KINDS.values()}
