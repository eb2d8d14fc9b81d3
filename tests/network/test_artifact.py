"""A large artifact over a real SuperLink and SuperNode: once, in pieces, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fedzo.runtime.config import LocalConfig
from fedzo.runtime.local import run_local
from fedzo.runtime.net import launch, server_process
from fedzo.trainers.artifacts import PIECE_BYTES

SIZE = 200_000_000
PROGRAM = Path(__file__).with_name("toy_artifact.py")
pytestmark = [pytest.mark.net, pytest.mark.timeout(400)]


def test_200_mb_travel_once_a_wrong_byte_is_named_and_both_sides_hold_less_than_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, digest, file = np.random.default_rng(0), hashlib.sha256(), tmp_path / "artifact"
    with file.open("wb") as out:
        for _ in range(SIZE // 10**6):
            block = generator.bytes(10**6)
            digest.update(block)
            out.write(block)
    (tmp_path / "toy.json").write_text(json.dumps({"file": str(file), "spoiled": 17 * PIECE_BYTES}))
    monkeypatch.setenv("TOY_SERVER", PROGRAM.stem)
    monkeypatch.setattr(server_process, "SERVE", [sys.executable, str(PROGRAM.with_name("toy_serve.py"))])
    monkeypatch.setattr(launch, "EXECUTOR", [sys.executable, str(PROGRAM)])

    run_local(num_clients=1, run_dir=tmp_path, config=LocalConfig())

    result = json.loads((tmp_path / "result.json").read_text())
    received = Path(result["path"])
    with received.open("rb") as data:
        assert hashlib.file_digest(data, "sha256").hexdigest() == digest.hexdigest() == result["digest"]
    shutil.rmtree(received.parent)
    assert result["refused"] == [{}, {}]
    places = list(range(0, SIZE, PIECE_BYTES))
    assert result["sent"] == [*places[:18], *places[17:]]  # the second time nothing is sent
    (said,) = result["said"]
    place = "piece 18 of 48 (bytes 71303168 to 75497471)"
    assert said == f"client 0: artifact {digest.hexdigest()[:12]}: {place} came with other bytes"
    grown = result["grown_bytes"]
    assert sorted(grown) == ["executor", "server", "superlink", "supernode"]
    assert max(grown["server"], grown["executor"]) < SIZE / 2, grown  # 64 MB seen: they hold a piece at a time
    assert max(grown["superlink"], grown["supernode"]) < 2 * SIZE, grown  # 210 MB seen: Flower's, and theirs to free
    assert result["seconds"][0] < 300
    assert result["seconds"][1] < 10
