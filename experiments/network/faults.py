"""Which faults a federation of real processes survives: ``python experiments/network/faults.py``.

The tests marked ``faults`` and those of single processes that are killed, as rows of claims: each fault and whether
it was survived. A test that cannot run here (no network namespace, no mount) is left out and named. About twenty
minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from fedzo.bench.claims import Claims

HERE = Path(__file__).parent
TESTS = ["tests/network/test_faults.py", "tests/network/test_killed_server.py", "tests/network/test_local.py"]


def main() -> None:
    """Run the tests, print and write the claims; exit status 1 where a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORDS", help="of pytest's -k: these tests alone; the others' rows stay")
    options = parser.parse_args()
    claims = Claims(command="python experiments/network/faults.py")
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "faults or net", *TESTS, f"--junitxml={told}"]
        command += ["-k", options.only] if options.only else []
        subprocess.run(command, cwd=HERE.parents[1], check=False)
        cases = list(ElementTree.parse(told).iter("testcase"))
    for case in cases:
        name = case.attrib["name"].removeprefix("test_").replace("_", " ")
        if case.find("skipped") is not None:
            print(f"not run here: {name}")
            continue
        survived = case.find("failure") is None and case.find("error") is None
        claims.add(f"survived: {name}", float(survived), "of 1", at_least=1)
    claims.show()
    if options.only:
        again = {row["claim"] for row in claims.rows}
        known = json.loads((HERE / "claims.json").read_text())
        claims.rows += [row for row in known if row["command"] == claims.command and row["claim"] not in again]
    claims.write(HERE / "claims.json")
    if not all(row["holds"] for row in claims.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
