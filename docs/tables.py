"""Fills the tables of the README and the docs from ``experiments/``: ``python docs/tables.py`` (``--check`` compares).

A table stands between ``<!-- table: experiments/NAME/FILE.json -->`` (or ``FILE.json#PART``) and ``<!-- /table -->``;
what a file's rows become is decided by ``RENDERERS``. Otherwise they are claims, and PART is the script that made them.
A file that is not there yet leaves its table empty.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from fedzo.bench.claims import NOT_MEASURED, number, wanted
from fedzo.errors import RunFolderError
from fedzo.records.decode import decode
from fedzo.records.metrics import Summary
from fedzo.report.format import interval
from fedzo.report.sinks import ending as last_words

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/*.md")))
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Lines = list[str]
LONG = 25


def quickstart(results: Any) -> Lines:
    """Before and after of each seed, and what they come to."""
    rows = [
        "| run seed | accuracy before -> after | at the best threshold | AUC | best round | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for run, wall_s in zip(results["run"], results["wall_s"], strict=True):
        cells = [
            f"{run['before'][k]:.3f} -> {run['after'][k]:.3f}" for k in ("value", "best_threshold_accuracy", "auc")
        ]
        rows.append(f"| {run['seed']} | {' | '.join(cells)} | {run['best_round']} | {wall_s / 60:.1f} |")
    gains = [100 * (run["after"]["value"] - run["before"]["best_threshold_accuracy"]) for run in results["run"]]
    mean, half = interval(gains)
    beyond = f"{mean:+.1f} +- {half:.1f} points over seeds, {min(gains):+.1f} in the worst"
    return [*rows, "", f"Accuracy beyond the base's best threshold: {beyond}."]


def ending(results: Any) -> Lines:
    """What the run of seed 0 prints last."""
    run = {key: value for key, value in results["run"][0].items() if key != "seed"}
    summary = decode(Summary, run, where="experiments/quickstart/results.json", error=RunFolderError)
    return ["```", *last_words(summary), "```"]


def claims(rows: Any) -> Lines:
    """One line a claim; whether it holds is said where there is a target. What all claims begin with is the caption."""
    rows = list(rows)
    begins = caption([row["claim"] for row in rows])
    lines = [f"*{begins.rstrip(':, ')}*", ""] if begins else []
    lines += ["| claim | value | target |", "|---|---|---|"]
    for row in rows:
        verdict = {True: ": holds", False: ": **missed**", None: ""}[row["holds"]]
        target = goal(row) and f"{goal(row)}{verdict}"
        claim = row["claim"].removeprefix(begins).replace("|", r"\|")
        lines.append(f"| {claim} | {amount(row['value'], row['unit'])} | {target} |")
    return lines


def caption(names: list[str]) -> str:
    """What names of claims begin with alike, up to a colon or comma, if it is long."""
    ends = (min(names), max(names)) if len(names) > 1 else ("", "")
    alike = "".join(one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    whole = max(alike.rfind(": "), alike.rfind(", ")) + 2
    return alike[:whole] if whole > LONG else ""


def amount(value: float | None, unit: str) -> str:
    """A number with its unit as people write it, and what the unit tells in brackets behind both."""
    if value is None:
        return NOT_MEASURED
    unit, ends = split_range(unit)
    if unit == "share":
        return f"{number(100 * value)} %{ends}"
    if unit == "bytes":
        return f"{value:,.0f} bytes{ends}"
    return f"{number(value)}{ends}" if unit in ("", "area", "ratio") else f"{number(value)} {unit}{ends}"


def split_range(unit: str) -> tuple[str, str]:
    """A unit, and what it tells in brackets (``with_range``) with a space before it, or nothing."""
    unit, bracket, ends = unit.partition("(")
    return unit.rstrip(), f" ({ends}" if bracket else ""


def goal(row: Any) -> str:
    """What a claim's target says, in the unit of its value; nothing where it has none."""
    unit = split_range(row["unit"])[0].partition("+-")[0].rstrip()  # range and half width are the value's own
    return wanted(row, lambda target: amount(target, unit))


def missed(row: Any) -> str:
    """Said behind a target that is missed; not where nothing was measured."""
    return " **missed**" if row["holds"] is False else ""


def clients(points: Any) -> Lines:
    """Seconds a round and peak memory: one line a number of clients and of local steps."""
    at = {
        (p["clients"], p["local_steps"], p["runtime"]): f"{p['round_s']:.3g} s, {p['peak_bytes'] / 1e9:.1f} GB"
        for p in points
    }
    lines = ["| clients | T | together | one after another | Ray, two actors |", "|---|---|---|---|---|"]
    for count, steps in sorted({key[:2] for key in at}, key=lambda pair: pair[::-1]):
        cells = [at.get((count, steps, runtime), "") for runtime in ("inline_batched", "inline", "ray")]
        lines.append(f"| {count} | {steps} | {' | '.join(cells)} |")
    return lines


def bench(rows: Any) -> Lines:
    """One line a case: time and peak memory of each contestant as a multiple of the bare forwards'."""
    cases: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        case, rest = row["claim"].split(": ", 1)
        who, what = rest.split(" / bare forwards, ")
        cases.setdefault(case, {})[who, what] = row
    beside = {"default products' forwards": "PyTorch's own product: time", "eager forwards": "not compiled: time"}
    shown_beside = {
        (who, "time"): head for who, head in beside.items() if any((who, "time") in cells for cells in cases.values())
    }
    heads = [
        "case",
        "fedzo: time",
        "target",
        "memory",
        "target",
        "base model's forwards: time",
        "MeZO walk: time",
        "memory",
        "first order: time",
        "memory",
    ]
    heads += shown_beside.values()
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case, cells in cases.items():
        shown = []
        columns = [(w, k) for w in ("fedzo step", "MeZO walk", "first-order step") for k in ("time", "peak memory")]
        columns.insert(2, ("base model's forwards", "time"))
        for who, what in columns:
            row = cells.get((who, what))
            shown.append(padded(row["value"]) if row else "" if who.startswith("base") else "n/a")
            if who == "fedzo step":
                shown[-1] += split_range(row["unit"])[1] if row else ""
                shown.append(f"{goal(row)}{', **missed**' if missed(row) else ''}" if row else "")
        shown += [padded(cells[which]["value"]) if which in cells else "" for which in shown_beside]
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return lines


def padded(ratio: float) -> str:
    """A ratio with all of its digits, and at least three behind the point."""
    return max(f"{ratio:.3f}", number(ratio), key=len)


def ranges(rows: Any) -> Lines:
    """A step's least and most over the cases; one without a target is not reliable and left out."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        case, _, what = row["claim"].partition(": fedzo step / bare forwards, ")
        if what and row["target"] is not None:
            trained = "all weights" if case.endswith("-full") else "a mask or an adapter"
            values.setdefault((trained, what), []).append(row["value"])
    at: dict[str, dict[str, str]] = {}
    for (trained, what), found in values.items():
        at.setdefault(trained, {})[what] = f"{min(found):.3f} to {max(found):.3f}"
    return grid("trained", at)


BAR_G = r"\|g\|"  # of which a bar would end the cell


def planted(results: Any) -> Lines:
    """How well each test tells planted clients; what it flags at its threshold after the last step."""
    steps = sorted({test["steps"] for test in results["run"][0]["tests"]})
    heads = [f"AUC, T = {count}" for count in steps] + [
        f"{name}, T = {steps[-1]}" for name in ("found", "false alarms")
    ]
    lines = [f"| statistic | test | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for key in dict.fromkeys((test["statistic"], test["rule"]) for test in results["run"][0]["tests"]):
        tests = [t for run in results["run"] for t in run["tests"] if (t["statistic"], t["rule"]) == key]
        areas = [[t["auc"] for t in tests if t["steps"] == count] for count in steps]
        last = [t for t in tests if t["steps"] == steps[-1]]
        there = sum(len(run["planted"]) for run in results["run"])
        others = sum(len(run["clients"]) - len(run["planted"]) for run in results["run"])
        flagged = [
            f"{sum(len(t[key]) for t in last)} of {total}"
            for key, total in (("found", there), ("false_alarms", others))
        ]
        head = f"| {'GradIP' if key[0] == 'gradip' else BAR_G} | {key[1]} "
        lines.append(
            f"{head}| {' | '.join(f'{sum(area) / len(area):.2f}' for area in areas)} | {' | '.join(flagged)} |"
        )
    return lines


def percent(part: Any) -> str:
    """A share with its 95 % interval."""
    low, high = (100 * end for end in part["interval"])
    share = f"{100 * part['share']:.3g} %"
    return f"{share} ({low:.3g} to {high:.3g})" if 0 < part["share"] < 1 else share


def vpcs_auc(results: Any) -> Lines:
    """How well the ratio of means separates, beside what another simulation found."""
    lines = ["| steps (initial / later) | tau | GradIP | expected | \\|g\\| | expected |", "|---|---|---|---|---|---|"]
    for gradip, abs_g in zip(results["auc"][0::2], results["auc"][1::2], strict=True):
        head = f"{gradip['steps']} ({gradip['initial']} / {gradip['later']}) | {gradip['tau']}"
        cells = [f"{entry[key]:.3f}" for entry in (gradip, abs_g) for key in ("auc", "expected")]
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return lines


def vpcs_ratio(results: Any) -> Lines:
    """How often a ratio exceeds 2 and 3."""
    lines = [
        "| steps (initial / later) | client | GradIP > 2 | GradIP > 3 | \\|g\\| > 2 | \\|g\\| > 3 |",
        "|---|---|---|---|---|---|",
    ]
    for four in (results["ratio"][start : start + 4] for start in range(0, len(results["ratio"]), 4)):
        who = "stationary" if four[0]["tau"] is None else f"falls, tau = {four[0]['tau']}"
        steps = f"{four[0]['steps']} ({four[0]['initial']} / {four[0]['later']})"
        lines.append(f"| {steps} | {who} | {' | '.join(map(percent, four))} |")
    return lines


def vpcs_compared(results: Any) -> Lines:
    """The shares of which another simulation gave figures, and how far off chance lets them be."""
    lines = ["| client | steps (initial / later) | ratio | found | expected | tolerance |", "|---|---|---|---|---|---|"]
    for entry in (entry for entry in results["ratio"] if "expected" in entry):
        who = "stationary" if entry["tau"] is None else f"falls, tau = {entry['tau']}"
        steps = f"{entry['steps']} ({entry['initial']} / {entry['later']})"
        ratio = f"{BAR_G if entry['statistic'] == '|g|' else entry['statistic']} > {entry['threshold']:g}"
        cells = [f"{100 * entry[key]:.4g} %" for key in ("share", "expected", "tolerance")]
        lines.append(f"| {who} | {steps} | {ratio} | {' | '.join(cells)} |")
    return lines


def decay(results: Any) -> Lines:
    """How far each client's steps fall from the first to the last twenty, and what the default tests say."""
    heads = [r"\|GradIP\|, first and last 20 steps", "times", BAR_G, "times (ratio)", "quiet", "level"]
    lines = [f"| client | labels | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|---|"]
    for client in results["run"][0]["clients"]:
        cells = []
        for name in ("grad_ip", "abs_g"):
            first, last = (fmean(map(abs, part)) for part in (client[name][:20], client[name][-20:]))
            cells.append(f"{first:.1f}, {last:.1f} | {first / last:.1f}")
        tests = f"{100 * client['quiet']:.0f} % | {client['level']:.1f}"
        lines.append(
            f"| {client['client']} | {'one' if client['planted'] else 'IID'} | {' | '.join(cells)} | {tests} |"
        )
    return lines


def vpcs_rules(results: Any) -> Lines:
    """What the default thresholds make of a client of a federation of twelve, by |g|."""
    found = [entry for entry in results["federations"] if entry["statistic"] == "|g|"]
    rules = list(dict.fromkeys(entry["rule"] for entry in found))
    lines = [f"| client | spread | {' | '.join(rules)} |", "|---|---|" + "---|" * len(rules)]
    for kind, spread in dict.fromkeys((entry["kind"], entry["spread"]) for entry in found):
        cells = [percent(entry) for entry in found if (entry["kind"], entry["spread"]) == (kind, spread)]
        lines.append(f"| {kind} | {spread:g} | {' | '.join(cells)} |")
    return lines


def vpcs_cusum(results: Any) -> Lines:
    """By when the default CUSUM flags a client among stationary others."""
    lines = [
        "| clients | the one | flagged by step 100 | by step 1,000 | half of them by step |",
        "|---|---|---|---|---|",
    ]
    for entry in results["cusum"]:
        half = "" if entry["median_step"] is None else f"{entry['median_step']:g}"
        flagged = f"{percent(entry['by_100'])} | {percent(entry['by_1000'])}"
        lines.append(f"| {entry['clients']} | {entry['kind']} | {flagged} | {half} |")
    return lines


def hostile(results: Any) -> Lines:
    """Loss and accuracy on test rows after each attack, by what the server makes of the scalars."""
    rules = sorted({run["rule"] for run in results}, key=lambda rule: ("mean" not in rule, rule))
    lines = [f"| two of ten clients send | {' | '.join(rules)} |", "|---" * (1 + len(rules)) + "|"]
    for attack in dict.fromkeys(run["attack"] for run in results):
        cells = []
        for rule in rules:
            found = [run["after"] for run in results if (run["attack"], run["rule"]) == (attack, rule)]
            cells.append(f"{found[0]['loss']:.3f}, {100 * found[0]['accuracy']:.1f} %" if found else "")
        lines.append(f"| {'true scalars' if attack == 'none' else attack} | {' | '.join(cells)} |")
    before = results[0]["before"]
    return [*lines, "", f"Before training: {before['loss']:.3f}, {100 * before['accuracy']:.1f} %."]


def traffic(rows: Any) -> Lines:
    """Bytes and seconds of each case; then what is said of all of them."""
    at: dict[str, dict[str, str]] = {}
    rest = []
    for row in of_script("traffic", rows):
        case, _, measure = row["claim"].partition(": ")
        if case.startswith(("scalars", "vectors")):
            at.setdefault(case, {})[measure.partition(",")[0]] = amount(row["value"], row["unit"])
        else:
            rest.append(row)
    return [*grid("a client and round sends", at), "", *claims(rest)]


def sketches(rows: Any) -> Lines:
    """Perplexity, bits and error of each sketch and other format; then how they compare."""
    at: dict[str, dict[str, str]] = {}
    rest = []
    for row in of_script("quality", rows):
        _, found, cell = row["claim"].partition(" tokens: ")
        if not found:
            rest.append(row)
            continue
        case, _, measure = cell.rpartition(", ")
        target = missed(row) and f", target {goal(row)}{missed(row)}"
        at.setdefault(case, {})[measure] = f"{amount(row['value'], '')}{target}"
    return [*grid("weights", at), "", *claims(rest)]


def published(rows: Any) -> Lines:
    """What each check found in each published set of rewrites; then what holds for all sets."""
    at: dict[str, dict[str, str]] = {}
    rest = []
    for row in of_script("published", rows):
        name, _, measure = row["claim"].partition(": ")
        if name == "all sets":
            rest.append(row)
        else:
            at.setdefault(measure, {})[name] = amount(row["value"], row["unit"]).removesuffix(" rewrites")
    return [*grid("rewrites", at), "", *claims(rest)]


def effect(rows: Any) -> Lines:
    """Each gain with its interval."""
    at: dict[str, dict[str, str]] = {}
    for row in of_script("effect", rows):
        case, _, _ = row["claim"].partition(", lower end" if ", lower end" in row["claim"] else ", upper end")
        cells = at.setdefault(case, {})
        if case == row["claim"]:
            cells["value"] = amount(row["value"], row["unit"])
        else:
            low = cells.get("95 % interval")
            cells["95 % interval"] = f"{low} to {number(row['value'])}" if low else number(row["value"])
    return grid("claim", at)


def pivoted(script: str, corner: str) -> Callable[[Any], Lines]:
    """Claims "case: measure" of one script as a table of cases by measures, with their targets."""

    def render(rows: Any) -> Lines:
        at: dict[str, dict[str, str]] = {}
        for row in of_script(script, rows):
            case, _, measure = row["claim"].rpartition(": ")
            target = goal(row) and f", target {goal(row)}{missed(row)}"
            at.setdefault(case, {})[measure] = f"{amount(row['value'], row['unit'])}{target}"
        return grid(corner, at) if at else []

    return render


def by_task(script: str) -> Callable[[Any], Lines]:
    """Claims "task, setting: measure" of one script as a table of measures by tasks; the setting is the caption."""

    def render(rows: Any) -> Lines:
        at: dict[str, dict[str, str]] = {}
        setting = ""
        for row in of_script(script, rows):
            case, _, measure = row["claim"].partition(": ")
            task, _, setting = case.partition(", ")
            at.setdefault(measure, {})[task] = amount(row["value"], row["unit"])
        return [f"*{setting}*", "", *grid("measure", at)] if at else []

    return render


def peers(task: str, measures: tuple[str, ...]) -> Callable[[Any], Lines]:
    """Claims "task, method: measure" of one task as a table of methods by those measures that begin so.

    A method that has such claims of another task alone is told as not run.
    """

    def render(rows: Any) -> Lines:
        at: dict[str, dict[str, str]] = {}
        for row in rows:
            case, _, measure = row["claim"].partition(": ")
            of_task, _, method = case.partition(", ")
            if measure.startswith(measures):
                cells = at.setdefault(method, {})
                if of_task == task:
                    cells[measure] = amount(row["value"], row["unit"])
        first = next((measure for cells in at.values() for measure in cells), None)
        return grid("method", {method: cells or {first: "not run"} for method, cells in at.items()}) if first else []

    return render


def spread(results: Any) -> Lines:
    """How unequal the runs of equal time were."""
    runs = [run for name, run in results.items() if name.startswith("run ") and not run["diverged"]]
    seconds = [run["train_s"] for run in runs]
    scores = [sum(score["round"] > 0 for score in run["dev"]) for run in runs]
    took = f"The {len(runs)} runs so far took {min(seconds):.0f} to {max(seconds):.0f} s of training"
    return [f"{took}, and a tested model was chosen among {min(scores)} to {max(scores)} dev scores."]


def grid(corner: str, at: dict[str, dict[str, str]]) -> Lines:
    """Cells by case and measure, both in the order in which they first came."""
    heads = list(dict.fromkeys(measure for cells in at.values() for measure in cells))
    lines = [f"| {corner} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    return lines + [f"| {case} | {' | '.join(cells.get(head, '') for head in heads)} |" for case, cells in at.items()]


def of_script(script: str, rows: Any) -> list[Any]:
    """The claims of one script, where several write to one file."""
    return [row for row in rows if row["command"].split()[1].endswith(f"/{script}.py")]


RENDERERS: dict[str, Callable[[Any], Lines]] = {
    "experiments/quickstart/results.json": quickstart,
    "experiments/quickstart/results.json#ending": ending,
    "experiments/quickstart/claims.json#tried": pivoted("tried", "setting"),
    "experiments/quickstart/claims.json#curvature": pivoted("curvature", "factor"),
    **{
        f"experiments/peers/claims.json#{part}": peers(task, measures)
        for part, task, measures in (
            ("rotten_tomatoes", "Rotten Tomatoes", ("seeds", "learning rate", "test ")),
            ("rotten_tomatoes_cost", "Rotten Tomatoes", ("dev ", "forwards", "s to", "bytes to", "training", "memory")),
            ("sst2", "SST-2", ("seeds", "learning rate", "test ")),
            ("sst2_cost", "SST-2", ("dev ", "forwards", "s to", "bytes to", "training", "memory")),
        )
    },
    "experiments/peers/results.json#spread": spread,
    "experiments/bench/claims.json": bench,
    "experiments/bench/claims.json#ranges": ranges,
    "experiments/clients/results.json": clients,
    "experiments/network/hostile.json": hostile,
    "experiments/network/claims.json#traffic": traffic,
    "experiments/oat_rephrase/claims.json#published": published,
    "experiments/oat_rephrase/claims.json#effect": effect,
    "experiments/spallm/claims.json#quality": sketches,
    "experiments/spallm/claims.json#accuracy": by_task("accuracy"),
    "experiments/lower_layers/claims.json#step": pivoted("step", "trained"),
    "experiments/lower_layers/claims.json#accuracy": pivoted("accuracy", "trained"),
    **{
        f"experiments/meerkat/tables.json#{part}": itemgetter(part)
        for part in ("state", "tuning", "accuracy", "verdicts", "holm", "others", "hours", "sequential")
    },
    "experiments/vpcs/planted.json": planted,
    "experiments/vpcs/planted.json#decay": decay,
    "experiments/vpcs/simulation.json#compared": vpcs_compared,
    "experiments/vpcs/simulation.json#auc": vpcs_auc,
    "experiments/vpcs/simulation.json#ratio": vpcs_ratio,
    "experiments/vpcs/simulation.json#rules": vpcs_rules,
    "experiments/vpcs/simulation.json#cusum": vpcs_cusum,
}


def filled(text: str) -> str:
    """The page with every table made anew."""

    def fill(found: re.Match[str]) -> str:
        name, _, part = found[2].partition("#")
        rows = json.loads((ROOT / name).read_text()) if (ROOT / name).exists() else None
        other = RENDERERS.get(found[2])
        lines = [] if rows is None else other(rows) if other else claims(of_script(part, rows) if part else rows)
        return found[1] + "".join(f"{line}\n" for line in ["", *lines, ""]) + found[3]

    return BLOCK.sub(fill, text)


def main() -> int:
    """Fill all pages, or with ``--check`` return 1 where one is not up to date."""
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        for page in stale:
            sys.stderr.write(
                f"{page.relative_to(ROOT)} does not show the figures of experiments/. Run: python docs/tables.py\n"
            )
        return int(bool(stale))
    for page in stale:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
