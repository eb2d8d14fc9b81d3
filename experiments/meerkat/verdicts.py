"""Claims of the paper, and our own, judged by the differences of paired seeds: one line each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from collect import Row, best_dev_loss
from pieces import BUDGETS, METHODS, SEEDS

from fedzo.report.format import interval

EXTREME = 0.9
"""Share of a client's commonest label from which on it is not one of "the others"."""
Runs = Mapping[int, float]  # by seed
Gains = Sequence[float]  # one a seed


class Measure(NamedTuple):
    """What a model's test rows are judged by; more is better."""

    name: str
    of: Callable[[Row], float]
    """Of a score."""
    unit: str
    scale: float
    """What a number is multiplied by to be shown in the unit."""
    least: float
    """A smaller difference is not judged: it is that of a few test rows."""
    same: float
    """What one may be worse by and still do as well."""


Rule = Callable[[Gains, Measure], str]
ACCURACY = Measure("accuracy", lambda score: score["value"], "points", 100, least=0.01, same=0.02)
AUC = Measure("AUC", lambda score: score["auc"], "points", 100, least=0.01, same=0.02)
LOSS = Measure("loss", lambda score: -score["loss"], "nats", 1, least=0.01, same=0.02)


def measures_of(rows: Sequence[Row]) -> tuple[Measure, Measure]:
    """Accuracy, and what does not gain by answering another label more often: the AUC where there are two labels."""
    return ACCURACY, AUC if rows and all(row["after"]["auc"] is not None for row in rows) else LOSS


class Verdict(NamedTuple):
    """One cell of the table.

    Attributes:
        p: Of no difference, by Student's t, also where the verdict is withheld; None where that is not asked.
    """

    claim: str
    seen: str
    verdict: str
    p: float | None = None


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
        """For each run of VPCS one that stopped as many clients, by lot: the plain run where VPCS stopped nobody.

        Where too many were flagged all clients take fewer steps in both runs, which says nothing of who is stopped.
        """
        nobody = {row["seed"] for row in self.rows("step_policy", task, step_policy="vpcs") if not row["flagged"]}
        stopped = [row for row in self.rows("random_step_policy", task) if not row["fallback"]]
        return [*stopped, *(row for row in self.grid(task) if row["seed"] in nobody)]


def p_value(values: Gains) -> float:
    """Two-sided, of a mean of 0; Student's t of three values, whose distribution has this closed form.

    Values that are all 0, as where both runs of each seed ended with the base model, say nothing against that: 1.
    """
    assert len(values) == len(SEEDS) == 3
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(3)
    t = mean / error if error else math.inf if mean else 0.0
    return 1 - abs(t) / math.sqrt(2 + t * t) if math.isfinite(t) else 0.0


def after_holm(verdicts: Iterable[Verdict], *, level: float = 0.05) -> list[Verdict]:
    """Those decided that stay below the level when Holm corrects all for their number."""
    ranked = sorted((each for each in verdicts if each.p is not None), key=lambda each: each.p or 0.0)
    kept = []
    for place, each in enumerate(ranked):
        if (each.p or 0.0) * (len(ranked) - place) > level:
            break
        kept.append(each)
    return [each for each in kept if each.verdict != "cannot judge"]


def tested(rows: Iterable[Row], measure: Measure) -> dict[int, float]:
    """The measure on the test rows by seed; of several learning rates that of the best dev loss."""
    rows = best_rate([*rows])
    return {row["seed"]: measure.of(row["after"]) for row in rows}


def best_rate(rows: Sequence[Row]) -> list[Row]:
    """The runs of the learning rate whose dev loss, of the tested rounds and over seeds, is lowest."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row["lr"], []).append(row)
    return min(by_rate.values(), key=_mean_dev_loss) if by_rate else []


def _mean_dev_loss(rows: Sequence[Row]) -> float:
    return statistics.fmean(best_dev_loss(row) for row in rows)


def diverged(row: Row) -> bool:
    """Whether the run ended with a higher dev loss than the base model's, whatever its best checkpoint reached."""
    base, last = row["dev"][0][2], row["dev"][-1][2]
    return last is None or last > base


def gains(ours: Runs, theirs: Runs) -> list[float]:
    """Differences of paired seeds."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def ahead(found: Gains, measure: Measure) -> str:
    """Whether the first is better."""
    mean, half = interval(found)
    if abs(mean) < max(half, measure.least):
        return "cannot judge"
    return "confirmed" if mean > 0 else "contradicted"


def as_good(found: Gains, measure: Measure) -> str:
    """Whether the first is no worse than the second by more than ``measure.same``."""
    mean, half = interval(found)
    if mean - half >= -measure.same:
        return "confirmed"
    return "contradicted" if mean + half < -measure.same else "cannot judge"


def judge(results: Results, task: str, measure: Measure) -> list[Verdict]:
    """Every claim, the paper's first; what has not run on all seeds is said to be missing."""
    return [*_of_the_paper(results, task, measure), *_our_own(results, task, measure)]


def _of_the_paper(results: Results, task: str, measure: Measure) -> Iterable[Verdict]:
    def find(piece: str, method: str = "meerkat", budget: str = "T1", **changed: str) -> list[Row]:
        return results.rows(piece, task, method, budget, **changed)

    def line(claim: str, ours: Sequence[Row], theirs: Sequence[Row], rule: Rule = ahead) -> Verdict:
        return _line(claim, ours, theirs, rule, measure)

    meerkat = {budget: results.grid(task, budget=budget) for budget in BUDGETS}
    for budget in ("T10", "T50"):
        for method in ("full", "lora", "magnitude"):
            theirs = results.grid(task, method, budget)
            yield line(f"T = {BUDGETS[budget]}: Meerkat is ahead of {METHODS[method]}", meerkat[budget], theirs)
    claim = "T = 1: Meerkat is ahead of DeComFL (one-sided differences on all weights, one probe, all clients)"
    yield line(claim, meerkat["T1"], find("protocols", "full", estimator="one_sided"))
    yield line("Meerkat is better off with T = 1 than with T = 10", meerkat["T1"], meerkat["T10"])
    claim = "T = 1: unlike clients do as well as clients with the same mix of labels"
    yield line(claim, meerkat["T1"], find("iid"), as_good)
    sparse = find("masks", inputs__artifact="c4-1e-4.safetensors")
    yield line("T = 1: a density of 1e-4 does as well as 1e-3", sparse, meerkat["T1"], as_good)
    wiki, c4 = (find("masks", inputs__artifact=f"mask-{corpus}-60.safetensors") for corpus in ("wikitext2", "c4"))
    yield line("T = 1: a mask of WikiText does as well as one of C4", wiki, c4, as_good)
    vpcs = find("step_policy", budget="T10", step_policy="vpcs")
    who = "T = 10: VPCS (by our tests of |g|) is ahead of"
    yield line(f"{who} no step policy", vpcs, meerkat["T10"])
    yield line(f"{who} stopping as many by lot", vpcs, results.by_lot(task))
    yield line(f"{who} FedDyn on the mask", vpcs, find("servers", budget="T10", server_optimizer="feddyn"))
    claim = "T = 10: VPCS does as well as backpropagation on the same mask"
    yield line(claim, vpcs, find("first_order", budget="T10"), as_good)
    if measure is ACCURACY:
        yield _fewer_values(results.grid(task, "full", "T1"), results.grid(task, budget="T1"))


def _our_own(results: Results, task: str, measure: Measure) -> Iterable[Verdict]:
    def reached(method: str, budget: str) -> list[Row]:
        return results.grid(task, method, budget)

    def line(claim: str, ours: Sequence[Row], theirs: Sequence[Row], rule: Rule = ahead) -> Verdict:
        return _line(f"(ours) {claim}", ours, theirs, rule, measure)

    for method in ("full", "lora", "magnitude", "random"):
        yield line(f"T = 1: Meerkat is ahead of {METHODS[method]}", reached("meerkat", "T1"), reached(method, "T1"))
    yield line(f"T = 10: Meerkat is ahead of {METHODS['random']}", reached("meerkat", "T10"), reached("random", "T10"))
    masks = (f"mask-{corpus}-60.safetensors" for corpus in (task, "c4"))
    own, c4 = (results.rows("masks", task, budget="T1", inputs__artifact=mask) for mask in masks)
    yield line("T = 1: a mask of the task's own rows does as well as one of C4", own, c4, as_good)
    pieces = ("normalised", "step_policy")
    even, vpcs = (results.rows(piece, task, budget="T10", step_policy="vpcs") for piece in pieces)
    yield line("T = 10: VPCS with shares made even (FedNova's) is ahead of VPCS", even, vpcs)
    for method in ("full", "lora", "magnitude", "random"):
        claim = f"{METHODS[method]} is better off with T = 1 than with T = 10"
        yield line(claim, reached(method, "T1"), reached(method, "T10"))
    often = results.rows("drift", task, budget="T1")
    for piece, steps in (("drift", 50), ("drift_100", 100)):
        claim = f"1,000 steps, each T at its own rate: Meerkat is better off with T = 1 than with T = {steps}"
        yield line(claim, often, results.rows(piece, task, budget=f"T{steps}"))
    if measure is ACCURACY:
        yield _decay(results.grid(task))


def _line(claim: str, ours: Sequence[Row], theirs: Sequence[Row], rule: Rule, measure: Measure) -> Verdict:
    """A method all of whose runs diverge at their rate is not judged: that says something of the rate."""
    found = gains(tested(ours, measure), tested(theirs, measure))
    if len(found) < len(SEEDS):
        return Verdict(claim, "", "not run" if not found else f"{len(found)} of {len(SEEDS)} seeds")
    mean, half = (measure.scale * value for value in interval(found))
    digits, p = 1 if measure.scale > 1 else 3, p_value(found) if rule is ahead else None
    seen = f"{mean:+.{digits}f} +- {half:.{digits}f} {measure.unit}" + ("" if p is None else f", p = {p:.2g}")
    if lost := [which for which, rows in (("first", ours), ("second", theirs)) if all(map(diverged, best_rate(rows)))]:
        return Verdict(claim, f"{seen}; all runs of the {' and the '.join(lost)} diverge", "cannot judge", p)
    return Verdict(claim, seen, rule(found, measure), p)


def _fewer_values(full: Sequence[Row], masked: Sequence[Row]) -> Verdict:
    """By how much fewer values the mask has; of the bytes that travel here, which are scalars, it says nothing."""
    claim = "the clients of Meerkat train over 1,000 times fewer values than those of Full-FedZO"
    if not full or not masked:
        return Verdict(claim, "", "not run")
    times = full[0]["space_size"] / masked[0]["space_size"]
    return Verdict(claim, f"{times:,.0f} times", "confirmed" if times > 1000 else "contradicted")


def _decay(rows: Sequence[Row]) -> Verdict:
    """How much more |GradIP| falls, from the first to the last quarter of the steps, in clients of one label."""
    claim = "(ours) T = 10: |GradIP| falls more over the run in clients of one label than in mixed ones"
    found = []
    for row in rows:
        falls: dict[bool, list[float]] = {True: [], False: []}
        for client in row["clients"]:
            share = max(client["labels"].values()) / sum(client["labels"].values())
            if client["mean_grad_ip"] and all(client["mean_grad_ip"]) and (share == 1 or share < EXTREME):
                first, last = client["mean_grad_ip"]
                falls[share == 1].append(math.log(first / last))
        if all(falls.values()):
            found.append(statistics.fmean(falls[True]) - statistics.fmean(falls[False]))
    if len(found) < len(SEEDS):
        return Verdict(claim, "", "not run" if not found else f"{len(found)} of {len(SEEDS)} seeds")
    mean, half = interval(found)
    low, high = math.exp(mean - half), math.exp(mean + half)
    verdict = "confirmed" if low > 1 else "contradicted" if high < 1 else "cannot judge"
    return Verdict(claim, f"{math.exp(mean):.2f} times as much ({low:.2f} to {high:.2f})", verdict)
