"""How often the tests of a client step policy are right, in a model of the mechanism; no language model is involved.

    python experiments/vpcs/simulate.py          # about a minute on one core

A client's scalar is g[t] = s[t] N(0, 1), with s constant (stationary) or falling, and GradIP is |g[t] xi[t]| with a
standard normal xi that all clients of a federation share. Writes simulation.json, and its rows of claims.json, beside
this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.bench.claims import Claims
from fedzo.evaluate.metrics import auc
from fedzo.fl.server.step_policy.cusum import CusumConfig
from fedzo.fl.server.step_policy.statistics import cusum, ratio, shortfall
from fedzo.fl.server.step_policy.vpcs import Combine, VpcsConfig, VpcsTest, judge

HERE = Path(__file__).parent
COMMAND = "python experiments/vpcs/simulate.py"
SEED = 20261121
Numbers = npt.NDArray[np.float64]

# steps, decay, initial and later steps, and the AUC of |GradIP| and |g| that an earlier, separate simulation gave;
# it states the phases of T = 100, 30 and 10, those of 50 and 20 are ours
AUCS = [
    (100, 10, 20, 80, 1.000, 1.000),
    (50, 10, 10, 40, 0.996, 1.000),
    (30, 10, 10, 20, 0.965, 0.998),
    (20, 10, 5, 15, 0.822, 0.932),
    (10, 10, 3, 7, 0.630, 0.720),
    (50, 40, 10, 40, 0.815, 0.926),
]
ALARMS = [(100, 20, 80), (100, 20, 20), (50, 10, 10), (30, 10, 20), (10, 3, 7)]
STATISTICS = ("GradIP", "|g|")

# steps, initial and later steps, decay (None: stationary), statistic and threshold: the share that an earlier, separate
# simulation found above the threshold, half of its last printed digit, and the trials behind it
SHARES = {
    (100, 20, 80, None, "GradIP", 2.0): (0.007, 5e-4, 4_000),
    (100, 20, 80, None, "|g|", 2.0): (0.0, 5e-4, 4_000),
    (30, 10, 20, None, "GradIP", 2.0): (0.056, 5e-4, 4_000),
    (30, 10, 20, None, "|g|", 2.0): (0.007, 5e-4, 4_000),
    (10, 3, 7, None, "GradIP", 2.0): (0.17, 5e-3, 4_000),
    (10, 3, 7, None, "|g|", 2.0): (0.074, 5e-4, 4_000),
    (100, 20, 20, None, "GradIP", 2.0): (0.037, 5e-4, 200_000),
    (100, 20, 20, None, "GradIP", 3.0): (0.0023, 5e-5, 200_000),
    (100, 20, 20, None, "|g|", 3.0): (1e-5, 5e-6, 200_000),
    (100, 20, 20, 20, "GradIP", 3.0): (1.0, 5e-3, 20_000),
    (100, 20, 20, 20, "|g|", 3.0): (1.0, 5e-3, 20_000),
    (100, 20, 20, 40, "GradIP", 3.0): (0.988, 5e-4, 20_000),
    (100, 20, 20, 40, "|g|", 3.0): (0.9998, 5e-5, 20_000),
}
QUIET = (0.16, 0.005)
"""Share of a stationary client's |GradIP| below a tenth of its mean, and half of its last printed digit."""


def main() -> None:
    results: dict[str, Any] = {"auc": aucs(20_000), "ratio": ratios(200_000), "federations": federations(4_000)}
    results["cusum"] = cusums(4_000)
    results["quiet"] = [quiet(1_000_000)]
    (HERE / "simulation.json").write_text(json.dumps(results, indent=1) + "\n")
    claims(results).write(HERE / "claims.json")
    for kind, found in results.items():
        for entry in found:
            print(kind, json.dumps(entry))


def paths(rng: np.random.Generator, trials: int, scale: Numbers) -> dict[str, Numbers]:
    """|g| and |g xi| of ``trials`` clients, [trials, T]; each has directions of its own."""
    g = np.abs(rng.standard_normal((trials, len(scale)))) * scale
    return {"GradIP": g * np.abs(rng.standard_normal(g.shape)), "|g|": g}


def falling(steps: int, tau: float) -> Numbers:
    return np.exp(-np.arange(steps) / tau)


# --- the ratio test alone


def aucs(trials: int) -> list[dict[str, Any]]:
    """Area under the ROC curve of the ratio of means: falling clients against stationary ones."""
    found = []
    for steps, tau, initial, later, *expected in AUCS:
        rng = np.random.default_rng(SEED)
        quiet, loud = paths(rng, trials, falling(steps, tau)), paths(rng, trials, np.ones(steps))
        for name, target in zip(STATISTICS, expected, strict=True):
            scores = [ratio(part[name], initial=initial, later=later) for part in (quiet, loud)]
            area = auc(np.concatenate(scores), np.repeat([1, 0], trials))
            entry = {"steps": steps, "tau": tau, "initial": initial, "later": later, "statistic": name}
            found.append({**entry, "auc": area, "expected": target, "trials": trials})
    return found


def ratios(trials: int) -> list[dict[str, Any]]:
    """How often a threshold is exceeded: by stationary clients, and, for the default phases, by falling ones."""
    found = []
    for steps, initial, later in ALARMS:
        for tau in (None, 10, 20, 40) if (initial, later) == (20, 20) else (None,):
            rng = np.random.default_rng(SEED + 1)
            hits: dict[tuple[str, float], int] = dict.fromkeys([(n, h) for n in STATISTICS for h in (2.0, 3.0)], 0)
            for _ in range(trials // 20_000):
                part = paths(rng, 20_000, np.ones(steps) if tau is None else falling(steps, tau))
                for name, threshold in hits:
                    values = ratio(part[name], initial=initial, later=later)
                    hits[name, threshold] += int((values > threshold).sum())
            for (name, threshold), count in hits.items():
                entry = {"steps": steps, "initial": initial, "later": later, "tau": tau, "statistic": name}
                entry |= {"threshold": threshold, **share(count, trials)}
                found.append(entry | expectation(tuple(entry.values())[:6], count, trials))
    return found


def expectation(key: tuple[Any, ...], hits: int, trials: int) -> dict[str, float]:
    """What the other simulation found, and how far off chance lets two such shares be.

    That is the 99 % interval of a difference of two binomial shares (13 of them are compared), and the rounding of the
    printed one.
    """
    if key not in SHARES:
        return {}
    expected, rounding, others = SHARES[key]
    pooled = (hits + expected * others) / (trials + others)
    return {
        "expected": expected,
        "tolerance": 2.576 * float(np.sqrt(pooled * (1 - pooled) * (1 / trials + 1 / others))) + rounding,
    }


def quiet(trials: int) -> dict[str, Any]:
    """How often a stationary client's step is quiet: below a tenth of its mean."""
    steps = paths(np.random.default_rng(SEED + 4), trials, np.ones(1))["GradIP"]
    return {"statistic": "GradIP", **share(int((steps < 0.1 * steps.mean()).sum()), trials), "expected": QUIET[0]}


# --- all tests, in a federation


KINDS: dict[str, Callable[[int], Numbers]] = {
    "stationary": np.ones,
    "falls (tau 20)": lambda steps: falling(steps, 20),
    "falls (tau 20) to 15 %": lambda steps: 0.15 + 0.85 * falling(steps, 20),
    "a quarter from the start": lambda steps: np.full(steps, 0.25),
}
"""Clients 8 to 11 of a federation of 12 are of one of the other kinds."""
RULES = {
    "both": VpcsConfig(tests=[VpcsTest.ratio, VpcsTest.quiet]),
    "either": VpcsConfig(tests=[VpcsTest.ratio, VpcsTest.quiet], combine=Combine.either),
    "level": VpcsConfig(tests=[VpcsTest.level]),
    "both, or level": VpcsConfig(),
    "ratio, or level": VpcsConfig(tests=[VpcsTest.ratio, VpcsTest.level]),
}


def federations(trials: int) -> list[dict[str, Any]]:
    """The default thresholds on twelve clients that share directions; how loud a client is, spreads."""
    found = []
    for spread in (0.0, 0.3):
        for kind, scale_of in KINDS.items():
            rng = np.random.default_rng(SEED + 2)
            count: dict[tuple[str, str], list[list[bool]]] = {(name, rule): [] for name in STATISTICS for rule in RULES}
            for _ in range(trials // 12 if kind == "stationary" else trials // 4):
                scale = np.ones((12, 100))
                scale[8:] = scale_of(100)
                g = np.abs(rng.standard_normal(scale.shape)) * scale * np.exp(spread * rng.standard_normal((12, 1)))
                xi = np.abs(rng.standard_normal(100))
                for (name, rule), judged in count.items():
                    verdicts = judge(dict(enumerate(g * xi if name == "GradIP" else g)), RULES[rule])
                    judged.append([verdicts[client].flagged for client in range(0 if kind == "stationary" else 8, 12)])
            for (name, rule), judged in count.items():
                found.append({"spread": spread, "kind": kind, "statistic": name, "rule": rule, **clustered(judged)})
    return found


# --- CUSUM


def cusums(trials: int) -> list[dict[str, Any]]:
    """The default CUSUM of one client among stationary others: by what step how many are flagged."""
    config, found = CusumConfig(), []
    quieter = {f"{factor:g} times as quiet": np.full(1000, 1 / factor) for factor in (1, 1.5, 2, 3, 4, 8)}
    for clients in (4, 12):
        for kind, scale in {**quieter, **{f"falls (tau {tau})": falling(1000, tau) for tau in (20, 40)}}.items():
            rng = np.random.default_rng(SEED + 3)
            sums, first = np.zeros((trials, clients)), np.full(trials, np.inf)
            for step in range(1000):
                g = np.abs(rng.standard_normal((trials, clients)))
                g[:, 0] *= scale[step]
                sums = cusum(sums, shortfall(g), drift=config.drift)
                first[(sums[:, 0] > config.threshold) & np.isinf(first)] = step + 1
            entry = {"clients": clients, "kind": kind, "drift": config.drift, "threshold": config.threshold}
            by = {f"by_{step}": share(int((first <= step).sum()), trials) for step in (100, 1000)}
            half = float(np.median(first))
            found.append({**entry, "median_step": half if np.isfinite(half) else None, **by})
    return found


# --- what is claimed


def wilson(hits: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, JASA 22, 1927)."""
    z, share = 1.959964, hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: int, trials: int) -> dict[str, Any]:
    low, high = wilson(hits, trials)
    return {"share": hits / trials, "interval": [round(low, 7), round(high, 7)], "trials": trials}


def clustered(judged: list[list[bool]]) -> dict[str, Any]:
    """The share of clients that are flagged, where those of one federation are judged by one another.

    Their verdicts are not independent. The interval is Wilson's for as many trials as they are worth: their number over
    Kish's design effect, which the spread between federations tells; the number of federations where all verdicts are
    alike.
    """
    verdicts = np.array(judged, dtype=np.float64)
    federations, clients = verdicts.shape
    of_all = float(verdicts.mean())
    independent = of_all * (1 - of_all) / clients
    effect = float(verdicts.mean(1).var(ddof=1)) / independent if independent else float(clients)
    worth = verdicts.size / max(1.0, effect)
    low, high = wilson(of_all * worth, worth)
    told = {"share": of_all, "interval": [round(low, 7), round(high, 7)], "trials": verdicts.size}
    return {**told, "federations": federations, "design_effect": round(effect, 3)}


def within(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"95 % interval {100 * low:.3g} to {100 * high:.4g} %"


def claims(results: dict[str, Any]) -> Claims:
    claims = Claims(command=COMMAND, seeds=[SEED])
    add = claims.add
    for entry in results["auc"]:
        phases = f"T = {entry['steps']} ({entry['initial']} / {entry['later']}), tau = {entry['tau']}"
        text = f"AUC of the ratio of means of {entry['statistic']}, {phases}; to be met within 0.03"
        add(text, entry["auc"], "area", near=(entry["expected"], 0.03))
    for entry in results["ratio"]:
        phases = f"T = {entry['steps']} ({entry['initial']} / {entry['later']})"
        who = "stationary client" if entry["tau"] is None else f"client that falls with tau = {entry['tau']}"
        text = f"ratio of {entry['statistic']} > {entry['threshold']:g}, {phases}, {who} ({within(entry)})"
        near = (100 * entry["expected"], 100 * entry["tolerance"]) if "expected" in entry else None
        add(text, 100 * entry["share"], "% flagged", near=near)
    for entry in results["quiet"]:
        text = f"steps of a stationary client below a tenth of its mean {entry['statistic']} ({within(entry)})"
        add(text, 100 * entry["share"], "% of steps", near=(100 * QUIET[0], 100 * QUIET[1]))
    for entry in (each for each in results["federations"] if each["statistic"] == "|g|"):
        who = f"{entry['kind']}, loudness spread by {entry['spread']:g}"
        text = f"VPCS on {entry['statistic']}, {entry['rule']}: {who} ({within(entry)})"
        add(text, 100 * entry["share"], "% flagged")
    for entry in results["cusum"]:
        for step in (100, 1000):
            part = entry[f"by_{step}"]
            text = f"CUSUM, one of {entry['clients']} clients, {entry['kind']}: by step {step} ({within(part)})"
            most = 1.0 if entry["kind"].startswith("1 times") else None
            add(text, 100 * part["share"], "% flagged", at_most=most)
    return claims


if __name__ == "__main__":
    main()
