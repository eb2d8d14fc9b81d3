"""Every check on published rewrites: ``python experiments/oat_rephrase/published.py --data FOLDER``.

FOLDER holds ``copa``, ``cb`` and ``rte``, each with ``train.jsonl`` and ``rewrites-*.jsonl`` of ``{row, field, text,
verdict}``, as made from a public repository that states no licence: nothing of it is here, and only counts are
written. Counted are the rewrites that the published judge kept. Each check is asked alone, so that a rewrite with two
faults counts twice.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from fedzo.bench.claims import Claims
from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.checks import check, lost_names
from fedzo.data.preprocess.rephrase.config import Check, OatRephraseConfig, Style
from fedzo.data.preprocess.rephrase.figures import SetFigures
from fedzo.data.preprocess.rephrase.prompts import Prompts
from fedzo.data.preprocess.rephrase.tasks import TASKS, RephraseTask

HERE = Path(__file__).parent
# No prompt was published with the sets, no answer is marked as cut off: these two cannot be looked for.
NOT_LOOKED_FOR = (Check.truncated, Check.echo)
LOOKED_FOR = [each for each in Check if each not in NOT_LOOKED_FOR]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one set, or in several together."""

    kept: int
    faults: Counter[str]
    figures: SetFigures


def main() -> None:
    """Count, print and write the claims."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    folder: Path = parser.parse_args().data
    claims = Claims(command="python experiments/oat_rephrase/published.py --data FOLDER")
    cannot = ", ".join(NOT_LOOKED_FOR)
    claims.add(f"all sets: checks that cannot be looked for in them ({cannot})", len(NOT_LOOKED_FOR), "checks")
    print("set | kept |", " | ".join([*LOOKED_FOR, "cleaned", "names"]), "| leaks right, wrong | words")
    for name, task in [(name, TASKS[name]) for name in ("copa", "cb", "rte")]:
        rows = _read(folder / name / "train.jsonl")
        main_sets: list[tuple[Row, str]] = []
        for path in sorted((folder / name).glob("rewrites-*.jsonl")):
            kept = [(rows[each["row"]], each["text"]) for each in _read(path) if each["verdict"] == "same"]
            _show(f"{name} {path.stem.removeprefix('rewrites-')}", _look(kept, task))
            if "prompt" in path.stem:
                _claim(claims, f"{name}, {path.stem.removeprefix('rewrites-')}", _look(kept, task))
            else:
                main_sets += kept
        found = _look(main_sets, task)
        _show(f"{name} main prompt", found)
        _claim(claims, f"{name}, sets of the main prompt", found)
    claims.write(HERE / "claims.json")


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _look(kept: list[tuple[Row, str]], task: RephraseTask) -> Found:
    faults: Counter[str] = Counter()
    texts = []
    prompts = Prompts(Style.plain, task, task.column)  # whose words are not looked for
    for row, answer in kept:
        for each in LOOKED_FOR:
            found = check(answer, row, row["label"], prompts=prompts, rules=OatRephraseConfig(checks=[each]))
            faults[each] += found.fault is not None
        texts.append(found.text)
        faults["cleaned"] += found.text != answer.strip()
        original = row[task.column]
        faults["names"] += found.text != original.strip() and bool(lost_names(found.text, original))
    figures = SetFigures.of(
        zip([row for row, _ in kept], texts, strict=True), task=task, column=task.column, label_of=itemgetter("label")
    )
    return Found(len(kept), faults, figures)


def _show(name: str, found: Found) -> None:
    figures = found.figures
    counts = [found.faults[each] for each in (*LOOKED_FOR, "cleaned", "names")]
    print(name, found.kept, *counts, f"{figures.leaks_right}, {figures.leaks_wrong}", sep=" | ", end=" | ")
    print(f"{figures.words_before:.1f} -> {figures.words_after:.1f}")
    for label, shared in figures.overlap.items():
        print(f"    label {label}, {shared.rows} rows: {shared.before:.2f} -> {shared.after:.2f} of the other's words")


def _claim(claims: Claims, name: str, found: Found) -> None:
    figures = found.figures
    claims.add(f"{name}: rewrites that the published judge kept", found.kept, "rewrites")
    for each in (*LOOKED_FOR, "cleaned", "names"):
        what = {"cleaned": "cleaned of quotes or a lead-in", "names": "with other names (a warning)"}
        claims.add(f"{name}: {what.get(each, f'rejected by {each}')}", found.faults[each], "rewrites")
    claims.add(f"{name}: new words of the right answer alone", figures.leaks_right, "rewrites")
    claims.add(f"{name}: new words of a wrong answer alone", figures.leaks_wrong, "rewrites")
    claims.add(f"{name}: mean words before", figures.words_before, "words")
    claims.add(f"{name}: mean words after", figures.words_after, "words")
    if figures.overlap:
        lost = fmean(each.before - each.after for each in figures.overlap.values())
        claims.add(f"{name}: words shared with the hypothesis that are lost, mean over labels", lost, "share")
    for label, shared in figures.overlap.items():
        claims.add(f"{name}: share of the hypothesis found before, label {label}", shared.before, "share")
        claims.add(f"{name}: share of the hypothesis found after, label {label}", shared.after, "share")


if __name__ == "__main__":
    main()
