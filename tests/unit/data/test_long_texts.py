"""Texts that somebody else chose are read in a time that grows with their length, and not with its square.

A site reads a run's templates before any limit of its own holds, and a regular expression lets no other thread run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LONG_S = 60.0
"""What is linear takes a second or two of it, and what is not takes minutes to hours."""
PROGRAMS = {
    "a template": (
        "from fedzo.data.tasks import template_faults\n"
        "[fault] = template_faults('} ' + 'a' * 400_000)\n"
        "assert fault.startswith('hold a {column}'), fault\n"
    ),
    "a row of which pairs are made": (
        "from fedzo.data.preprocess.rephrase.pairs import paraphrased\n"
        "text = paraphrased('A' + ' because a' * 60_000)\n"
        "assert text.startswith('It is true that a because a'), text[:80]\n"
    ),
    "a rewrite with many names": (
        "from fedzo.data.preprocess.rephrase.checks import lost_names\n"
        "old, new = (' '.join(f'{first}{number}' for number in range(60_000)) for first in ('Anna', 'Otto'))\n"
        "lost = lost_names('so ' + new, 'so ' + old)\n"
        "assert (len(lost), lost[0], lost[-1]) == (120_000, 'Anna0', 'Otto59999'), lost[:3]\n"
    ),
    "a row with many keys": (
        "import sys\n"
        "from pathlib import Path\n"
        "from fedzo.data.files import read_rows\n"
        "from fedzo.errors import ConfigError\n"
        "try:\n"
        "    read_rows(Path(sys.argv[1]))\n"
        "except ConfigError as error:\n"
        "    assert \"got '99999' twice\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    ),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_long_text_does_not_keep_a_process_busy(what: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{" + ", ".join(f"{json.dumps(str(min(key, 99_999)))}: 0" for key in range(100_001)) + "}\n")

    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[what], str(file)], capture_output=True, text=True, timeout=LONG_S, check=False
    )

    assert done.returncode == 0, done.stderr
