"""Memory of all processes of a federation over 2,000 rounds: ``python experiments/network/memory.py``.

One run of ``runtime=local`` with two clients and a tiny model. The resident memory of each process is read all the time
and compared between rounds 200 to 300 and the last hundred. It cannot be resumed, since a new process begins anew.
About half an hour.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from traffic import tiny_run

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
WARM, WINDOW = 200, 100
GROWTH = 0.05
ROLES = {
    "SuperLink": "daemons superlink",
    "SuperNode": "daemons supernode",
    "executor": "net.executor",
    "server": "fedzo.cli.serve",
}


class Memory:
    """Resident bytes by role and round, and those of the SuperLink's database."""

    def __init__(self) -> None:
        self.shown = 0
        self.bytes: dict[str, list[tuple[int, int]]] = {role: [] for role in (*ROLES, "database")}

    def look(self, folder: Path, pid: int) -> None:
        """Read all of them; of two sites' processes the larger counts."""
        log = folder / "public.jsonl"
        done = log.read_bytes().count(b"\n") if log.exists() else 0
        found: dict[str, int] = {}
        with suppress(psutil.Error):
            for process in psutil.Process(pid).children(recursive=True):
                with suppress(psutil.Error):
                    command = " ".join(process.cmdline())
                    for role, words in ROLES.items():
                        if words in command:
                            found[role] = max(found.get(role, 0), process.memory_info().rss)
        found["database"] = sum(file.stat().st_size for file in self._database(folder))
        for role, size in found.items():
            self.bytes[role].append((done, size))
        if done >= self.shown + WINDOW:
            self.shown = done
            print(f"round {done}:", ", ".join(f"{role} {size:,} bytes" for role, size in found.items()), flush=True)

    def around(self, role: str, first: int) -> float:
        """Median over a window of rounds."""
        return statistics.median(size for done, size in self.bytes[role] if first <= done < first + WINDOW)

    @staticmethod
    def _database(folder: Path) -> Iterator[Path]:
        return (folder / "network" / "server").glob("superlink.db*")


def main() -> None:
    """Measure, print and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="rounds of the run (default: 2000)")
    rounds = parser.parse_args().rounds
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        tiny_run(Path(folder) / "run", [f"fl.rounds={rounds}"], watch=memory.look)
    claims = Claims(command="python experiments/network/memory.py")
    last = rounds - WINDOW
    for role in ROLES:
        warm, end = memory.around(role, WARM), memory.around(role, last)
        claims.add(f"{role}: resident memory at round {WARM}", warm / 1e6, "MB")
        what = f"{role}: its growth from round {WARM} to {rounds:,}"
        claims.add(what, end / warm - 1, "share", at_most=GROWTH)
    grown = memory.around("database", last) - memory.around("database", WARM)
    claims.add(f"SuperLink's database: bytes a round, of rounds {WARM} to {rounds:,}", grown / (last - WARM), "bytes")
    claims.show()
    claims.write(HERE / "claims.json")


if __name__ == "__main__":
    main()
