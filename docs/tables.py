"""Fills the tables of figures in the README and the docs from ``experiments/``: ``python docs/tables.py`` (``--check`` only compares).

A table stands between ``<!-- table: experiments/NAME/FILE.json -->`` (or ``FILE.json#PART``) and ``<!-- /table -->``; what a file's rows become is
decided by ``RENDERERS``. A file that is not there yet leaves its table empty.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from fedzo.report.format import bytes_text

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/*.md")))
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Lines = list[str]


def quickstart(results: Any) -> Lines:
    """Before and after of each seed, and what they come to."""
    rows = ["| run seed | accuracy before -> after | at the best threshold | AUC | best round | minutes |", "|---|---|---|---|---|---|"]
    for run in results["run"]:
        cells = [f"{run['before'][k]:.3f} -> {run['after'][k]:.3f}" for k in ("value", "best_threshold_accuracy", "auc")]
        rows.append(f"| {run['seed']} | {' | '.join(cells)} | {run['best_round']} | {run['seconds'] / 60:.1f} |")
    gains = [100 * (run["after"]["value"] - run["before"]["value"]) for run in results["run"]]
    return [*rows, "", f"Gain: {sum(gains) / len(gains):+.1f} points on average, {min(gains):+.1f} in the worst."]


def ending(results: Any) -> Lines:
    """What the run of seed 0 prints last."""
    run = results["run"][0]
    before, after = run["before"], run["after"]
    lines = [f"test, before -> after (best dev round {run['best_round']} of {run['rounds']}):"]
    for name, key in (("accuracy", "value"), ("accuracy at the best threshold", "best_threshold_accuracy"), ("AUC", "auc")):
        lines.append(f"  {name:<32} {before[key]:.3f} -> {after[key]:.3f}")
    scalars = bytes_text(run["payload_up_bytes"] + run["payload_down_bytes"])
    messages = bytes_text(run["message_up_bytes"] + run["message_down_bytes"])
    return ["```", *lines, f"  {'scalars, all clients, both ways':<32} {scalars} ({messages} as messages, with set-up)", "```"]


def claims(rows: Any) -> Lines:
    """One line a claim; whether it holds is said where there is a target."""
    lines = ["| claim | value | target |", "|---|---|---|"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:g} {row['unit']}: {'holds' if row['holds'] else '**missed**'}"
        lines.append(f"| {row['claim']} | {row['value']:.4g} {row['unit']} | {target} |")
    return lines


def bench(rows: Any) -> Lines:
    """One line a case: time and peak memory of each contestant as a multiple of the bare forwards'."""
    cases: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        case, rest = row["claim"].split(": ", 1)
        who, what = rest.split(" / bare forwards, ")
        cases.setdefault(case, {})[who, what] = row
    lines = [
        "| case | fedzo: time | target | memory | target | MeZO walk: time | memory | first order: time | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, cells in cases.items():
        shown = []
        for who, what in ((w, k) for w in ("fedzo step", "MeZO walk", "first-order step") for k in ("time", "peak memory")):
            row = cells.get((who, what))
            shown.append(f"{row['value']:.3f}" if row else "n/a")
            if who == "fedzo step":
                reached = "" if row is None or row["target"] is None else f"{row['target']:g}{'' if row['holds'] else ', **missed**'}"
                shown.append(reached)
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return lines


RENDERERS: dict[str, Callable[[Any], Lines]] = {
    "experiments/quickstart/results.json": quickstart,
    "experiments/quickstart/results.json#ending": ending,
    "experiments/bench/claims.json": bench,
    **{f"experiments/meerkat/tables.json#{part}": itemgetter(part) for part in ("accuracy", "tuning", "verdicts")},
}


def filled(text: str) -> str:
    """The page with every table made anew."""

    def fill(found: re.Match[str]) -> str:
        path = ROOT / found[2].partition("#")[0]
        lines = RENDERERS.get(found[2], claims)(json.loads(path.read_text())) if path.exists() else []
        return found[1] + "".join(f"{line}\n" for line in ["", *lines, ""]) + found[3]

    return BLOCK.sub(fill, text)


def main() -> int:
    """Fill all pages, or with ``--check`` return 1 where one is not up to date."""
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        for page in stale:
            sys.stderr.write(f"{page.relative_to(ROOT)} does not show the figures of experiments/. Run: python docs/tables.py\n")
        return int(bool(stale))
    for page in stale:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
