"""What the study runs: tasks, methods, masks, and its pieces as words of ``fedzo train -m``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from collect import Row, known

RUNS = Path("runs/meerkat")
CORE_TASKS = {"sst2": "SST-2", "ag_news": "AG News"}
TASKS = {**CORE_TASKS, "rte": "RTE", "boolq": "BoolQ"}
METHODS = {
    "meerkat": "Meerkat",
    "full": "Full-FedZO",
    "lora": "LoRA-FedZO",
    "magnitude": "Weight magnitude",
    "random": "Random mask",
}
BUDGETS = {"T1": 1, "T10": 10, "T50": 50, "T100": 100}
SEEDS = (0, 1, 2)


class Part(NamedTuple):
    """Runs of one piece; ``{task}`` in a word stands for the task."""

    method: str
    """Or ``all``."""
    words: list[str]
    rates: tuple[float, ...] = (1.0,)
    """Times the learning rate that was tuned for the method; of several the one of the best dev loss is reported."""


def _thousand_steps(every: int) -> Part:
    """1,000 steps, averaged after every so many, with five models to choose from."""
    length = [f"fl.rounds={1000 // every}", f"evaluation.every_rounds={200 // every}"]
    return Part("meerkat", [f"+budget=T{every}", _SEEDS, *length])


_SEEDS = "seed=" + ",".join(map(str, SEEDS))
_IID = ["partition.alpha=1000", "partition.num_extreme=0"]
PIECES: dict[str, list[Part]] = {
    "core": [Part("all", ["+budget=T1,T10", _SEEDS])],
    "step_policy": [
        # the oracle stops clients of a single label: at 0.9 of one label SST-2's third seed has six of eight
        Part("meerkat", ["+budget=T10", _SEEDS, "step_policy=oracle", "step_policy.label_share=0.999"]),
        # round 0 calibrates; four models to choose from, as the others have: after 50, 110, 170 and 200 steps
        Part("meerkat", ["+budget=T10", _SEEDS, "step_policy=vpcs", "fl.rounds=21", "evaluation.every_rounds=6"]),
    ],
    # the same two, with shares that make up for the fewer steps
    "normalised": [
        Part("meerkat", ["+budget=T10", _SEEDS, *words, "step_policy.normalise=True"])  # as Hydra writes it
        for words in (
            ["step_policy=oracle", "step_policy.label_share=0.999"],
            ["step_policy=vpcs", "fl.rounds=21", "evaluation.every_rounds=6"],
        )
    ],
    "random_step_policy": [],  # for each run of VPCS one that stops as many clients, by lot
    "iid": [Part("meerkat", ["+budget=T1,T10", _SEEDS, *_IID])],
    "masks": [
        Part("meerkat", ["+budget=T1", _SEEDS, f"inputs.artifact={RUNS}/mask-{name}.safetensors"], rates)
        for name, rates in (
            ("c4-1e-4", (1.0, 2.0, 4.0)),
            ("c4-1e-2", (0.25, 0.5, 1.0)),
            *((f"{corpus}-60", (1.0,)) for corpus in ("c4", "wikitext2", "{task}")),
        )
    ],
    "servers": [
        Part(
            "meerkat", ["+budget=T10", _SEEDS, "server_optimizer=momentum"], (0.1, 0.3, 1.0)
        ),  # 0.9 makes a step ten times as long
        Part("meerkat", ["+budget=T10", _SEEDS, "server_optimizer=scaffold"]),
        Part(
            "meerkat", ["+budget=T10", _SEEDS, "server_optimizer=feddyn"], (0.5, 1.0, 2.0)
        ),  # its alpha goes with the rate
        Part("meerkat", ["+budget=T10", _SEEDS, "strategy.aggregation=median,trimmed_mean"]),
    ],
    "protocols": [
        Part("full", ["+budget=T1", _SEEDS, "fl.directions=pool", "runtime=inline"]),
        Part(
            "full", ["+budget=T1", _SEEDS, "estimator=one_sided", "estimator.num_probes=1", "estimator.baseline=center"]
        ),
        # a step of one bit has the length of the learning rate: those of plain SGD were lr times a |g| of 5 to 10
        Part("full", ["+budget=T1", _SEEDS, "strategy.aggregation=majority_sign"], (2.5, 5.0, 10.0)),
    ],
    # the upper bound by backpropagation; exact gradients bear longer steps
    "first_order": [
        Part(method, ["+budget=T1,T10", _SEEDS, "estimator=backprop", "runtime=inline"], (1.0, 3.0, 10.0))
        for method in ("meerkat", "lora")
    ],
    "T50": [Part("all", ["+budget=T50", _SEEDS])],
    "long": [Part("all", ["+budget=T10", _SEEDS, "fl.rounds=100", "evaluation.every_rounds=25"])],
    # where drift would show: T = 50 first
    "drift": [_thousand_steps(1), _thousand_steps(50)],
    "drift_100": [_thousand_steps(100)],
}
OWN_RATES = ("drift", "drift_100")
"""Pieces that do not run at the cell's learning rate: each combination climbs a ladder of its own, on seed 0."""


class Corpus(NamedTuple):
    """What a mask is chosen on."""

    file: str
    density: float
    docs: int
    """Windows of 256 tokens, one a document."""


def corpus_of(mask: str) -> Corpus:
    """The corpus of a mask of ``RUNS``, by its name."""
    name, _, rest = mask.removeprefix("mask-").partition("-")
    if rest in ("", "1e-4", "1e-2"):
        return Corpus(f"{name}/train.jsonl", float(rest or 1e-3), 100)
    return Corpus(f"{name}/{'test' if name == 'wikitext2' else 'train'}.jsonl", 1e-3, int(rest))


def jobs_of(piece: str, cell: str, *, lr: float) -> list[list[str]]:
    """The runs of a piece for a cell, each as words.

    Args:
        piece: A key of ``PIECES``.
        cell: Task and method, as in ``sst2-full``.
        lr: The cell's tuned learning rate.
    """
    task, _, method = cell.partition("-")
    parts = [part for part in PIECES[piece] if part.method in ("all", method)]
    if piece == "random_step_policy" and method == "meerkat":
        parts = [_as_many(row) for row in known("step_policy") if row["task"] == task and stops_by_vpcs(row)]
    return [job for part in parts for job in _jobs(cell, part, lr=lr)]


def stops_by_vpcs(row: Row) -> bool:
    """Whether it is a run of VPCS that stopped somebody."""
    return row["changed"].get("step_policy") == "vpcs" and bool(row["flagged"])


def _as_many(row: Row) -> Part:
    words = [f"seed={row['seed']}", "step_policy=random", f"step_policy.num_flagged={len(row['flagged'])}"]
    return Part("meerkat", ["+budget=T10", *words])


def _jobs(cell: str, part: Part, *, lr: float) -> list[list[str]]:
    words = [word.format(task=cell.partition("-")[0]) for word in part.words]
    if part.rates != (1.0,):
        words.append("trainer.lr=" + ",".join(f"{rate * lr:.4g}" for rate in part.rates))
    return [[f"+cell={cell}", *job] for job in combinations(words)]


def combinations(varied: list[str]) -> list[list[str]]:
    """Every combination of what varies, as Hydra's sweeper would make them."""
    choices = [
        [f"{key}={value}" for value in values.split(",")] for key, _, values in (word.partition("=") for word in varied)
    ]
    return [list(words) for words in itertools.product(*choices)]
