"""Claims of the paper, and our own, judged by the differences of paired seeds: one line each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from collect import Row
from pieces import BUDGETS, METHODS, SEEDS

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t by degrees of freedom, from 1; beyond 9 the last, which is a little wide."""
LEAST = 0.01
"""Accuracy below which a difference is not judged: it is that of a few test rows."""
SAME = 0.02
"""Accuracy within which two are as good as each other."""
Runs = Mapping[int, float]  # by seed
Gains = Sequence[float]  # one a seed


class Verdict(NamedTuple):
    """One line of the table."""

    claim: str
    seen: str
    verdict: str


class Results:
    """Finished runs by piece, found by task, method, budget and what was changed."""

    def __init__(self, pieces: Mapping[str, Sequence[Row]]) -> None:
        self._pieces = pieces

    def rows(self, piece: str, task: str, method: str = "meerkat", budget: str = "T10", **changed: str) -> list[Row]:
        """The runs of which ``changed`` holds; a dot of a key is written as two underscores."""
        wanted = {key.replace("__", "."): value for key, value in changed.items()}
        return [
            row
            for row in self._pieces.get(piece, ())
            if (row["task"], row["method"], row["budget"]) == (task, method, budget)
            and all(str(row["changed"].get(key, "")).endswith(value) for key, value in wanted.items())
        ]

    def grid(self, task: str, method: str = "meerkat", budget: str = "T10") -> list[Row]:
        """The runs of a method without changes."""
        return self.rows("T50" if budget == "T50" else "core", task, method, budget)

    def by_lot(self, task: str) -> list[Row]:
        """For each run of VPCS one that stopped as many clients, by lot: the plain run where VPCS stopped nobody."""
        nobody = {row["seed"] for row in self.rows("selection", task, selection="vpcs") if not row["flagged"]}
        return [*self.rows("random_selection", task), *(row for row in self.grid(task) if row["seed"] in nobody)]


def interval(values: Gains) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t over seeds; nan for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * error


def tested(rows: Iterable[Row]) -> dict[int, float]:
    """Test accuracy by seed; of several learning rates that of the best dev loss."""
    rows = best_rate([*rows])
    return {row["seed"]: row["after"]["value"] for row in rows}


def best_rate(rows: Sequence[Row]) -> list[Row]:
    """The runs of the learning rate whose dev loss, of the tested rounds and over seeds, is lowest."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row["lr"], []).append(row)
    return min(by_rate.values(), key=_mean_dev_loss) if by_rate else []


def _mean_dev_loss(rows: Sequence[Row]) -> float:
    best = [min((loss for _, _, loss in row["dev"] if loss is not None), default=math.inf) for row in rows]
    return statistics.fmean(best)


def gains(ours: Runs, theirs: Runs) -> list[float]:
    """Differences of paired seeds."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def ahead(found: Gains) -> str:
    """Whether the first is better."""
    mean, half = interval(found)
    if abs(mean) < max(half, LEAST):
        return "cannot judge"
    return "confirmed" if mean > 0 else "not confirmed"


def as_good(found: Gains) -> str:
    """Whether the two are within ``SAME`` of each other."""
    mean, half = interval(found)
    if abs(mean) + half <= SAME:
        return "confirmed"
    return "not confirmed" if abs(mean) - half > SAME else "cannot judge"


def judge(results: Results, task: str) -> list[Verdict]:
    """Every claim, the paper's first; what has not run on all seeds is said to be missing."""
    return [_sizes(results, task), *_of_the_paper(results, task), *_our_own(results, task)]


def _sizes(results: Results, task: str) -> Verdict:
    claim = "Over 1,000 times fewer values than Full-FedZO, where values are sent"
    sizes = [
        rows[0]["space_size"] for method in ("full", "meerkat") if (rows := results.rows("core", task, method, "T1"))
    ]
    if len(sizes) < 2:
        return Verdict(claim, "", "not run")
    ratio = sizes[0] / sizes[1]
    return Verdict(claim, f"{ratio:,.0f} times", "confirmed" if ratio > 1000 else "not confirmed")


def _of_the_paper(results: Results, task: str) -> Iterable[Verdict]:
    find = results.rows
    meerkat = {budget: tested(results.grid(task, budget=budget)) for budget in BUDGETS}
    for budget, steps in list(BUDGETS.items())[1:]:
        for method in ("full", "lora", "magnitude"):
            theirs = tested(results.grid(task, method, budget))
            claim = f"T = {steps}: Meerkat is ahead of {METHODS[method]}"
            yield _line(claim, gains(meerkat[budget], theirs), ahead)
    claim = "T = 1: Meerkat is ahead of DeComFL (with all clients taking part it is Full-FedZO)"
    yield _line(claim, gains(meerkat["T1"], tested(results.grid(task, "full", "T1"))), ahead)
    claim = "T = 1: unlike clients do as well as clients with the same mix of labels"
    yield _line(claim, gains(meerkat["T1"], tested(find("iid", task, budget="T1"))), as_good)
    sparse = tested(find("masks", task, budget="T1", trainer__mask_path="c4-1e-4.safetensors"))
    yield _line("T = 1: a density of 1e-4 does as well as 1e-3", gains(sparse, meerkat["T1"]), as_good)
    vpcs = tested(find("selection", task, selection="vpcs"))
    feddyn = tested(find("servers", task, optimizer="feddyn"))
    for claim, theirs in (
        ("T = 10: VPCS (by our tests of |g|) is ahead of no selection", meerkat["T10"]),
        ("T = 10: VPCS (by our tests of |g|) is ahead of stopping as many by lot", tested(results.by_lot(task))),
        ("T = 10: VPCS (by our tests of |g|) is ahead of FedDyn on the mask", feddyn),
    ):
        yield _line(claim, gains(vpcs, theirs), ahead)
    yield _decay(results.grid(task))


def _our_own(results: Results, task: str) -> Iterable[Verdict]:
    find = results.rows
    meerkat = {budget: tested(results.grid(task, budget=budget)) for budget in ("T1", "T10")}
    for method in ("lora", "magnitude", "random"):
        theirs = tested(results.grid(task, method, "T1"))
        yield _line(f"ours, T = 1: Meerkat is ahead of {METHODS[method]}", gains(meerkat["T1"], theirs), ahead)
    on_c4 = tested(find("masks", task, budget="T1", trainer__mask_path="c4-60.safetensors"))
    for corpus, title in (("wikitext2", "WikiText"), (task, "the task's own rows")):
        other = tested(find("masks", task, budget="T1", trainer__mask_path=f"mask-{corpus}-60.safetensors"))
        yield _line(f"ours, T = 1: a mask of {title} does as well as one of C4", gains(other, on_c4), as_good)
    theirs = tested(results.grid(task, "random", "T10"))
    yield _line("ours, T = 10: Meerkat is ahead of Random mask", gains(meerkat["T10"], theirs), ahead)
    for method, title in METHODS.items():
        often, seldom = (tested(results.grid(task, method, budget)) for budget in ("T1", "T10"))
        yield _line(f"ours: {title} is better off with T = 1 than with T = 10", gains(often, seldom), ahead)


def _line(claim: str, found: Gains, rule: Callable[[Gains], str]) -> Verdict:
    if len(found) < len(SEEDS):
        missing = "not run" if not found else f"{len(found)} of {len(SEEDS)} seeds"
        return Verdict(claim, "", missing)
    mean, half = interval(found)
    return Verdict(claim, f"{100 * mean:+.1f} +- {100 * half:.1f} points", rule(found))


def _decay(rows: Sequence[Row]) -> Verdict:
    """How much more |GradIP| falls, from the first to the last quarter of the steps, in clients of one label."""
    claim = "T = 10: |GradIP| falls more in clients with one label than in the others"
    found = []
    for row in rows:
        falls: dict[bool, list[float]] = {True: [], False: []}
        for client in row["clients"]:
            if client["mean_grad_ip"] and all(client["mean_grad_ip"]):
                first, last = client["mean_grad_ip"]
                falls[len(client["labels"]) == 1].append(math.log(first / last))
        if all(falls.values()):
            found.append(statistics.fmean(falls[True]) - statistics.fmean(falls[False]))
    if len(found) < len(SEEDS):
        return Verdict(claim, "", "not run" if not found else f"{len(found)} of {len(SEEDS)} seeds")
    mean, half = interval(found)
    low, high = math.exp(mean - half), math.exp(mean + half)
    verdict = "confirmed" if low > 1 else "not confirmed" if high < 1 else "cannot judge"
    return Verdict(claim, f"{math.exp(mean):.2f} times as much ({low:.2f} to {high:.2f})", verdict)
