"""Steps beside their bare forwards, as ``fedzo bench step`` measures them: eager, as CUDA graphs, and compiled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import card
from card import Case, Figure, Goal, Result

from fedzo.bench.claims import with_range
from fedzo.bench.measure import free_memory, interleaved
from fedzo.bench.step import BARE, FIRST_ORDER, OURS, WALK, Bench, bench_step, finish, kind_of_forwards, open_bench
from fedzo.config.load import load
from fedzo.models.captured import NUM_EAGER
from fedzo.system import environment_variable, no_progress

TOKENS = 64
REPEATS = 7
BFLOAT16 = ("model.dtype=bfloat16",)
KINDS = {"eager": (), "captured": ("model.cuda_graphs=true",), "compiled": ("model.compile=true",)}
"""What forwards are, and the settings that make them so."""


class Step(NamedTuple):
    """A step of a model on random tokens.

    Attributes:
        trainer: What is trained.
        rows: Of 64 tokens each.
        shape: Of the model, whose weights are random; None for SmolLM2.
        settings: More words of its run.
    """

    trainer: str
    rows: int
    shape: str | None
    settings: tuple[str, ...] = BFLOAT16

    def of_kind(self, kind: str) -> Step:
        """The same with other forwards."""
        return self._replace(settings=(*self.settings, *KINDS[kind]))

    def open(self) -> Bench:
        """Its model and rows, on the card."""
        config = load([f"trainer={self.trainer}", f"device={card.DEVICE.type}", *self.settings])
        return open_bench(config, shape=self.shape, rows=self.rows, tokens=TOKENS)


STEPS = {
    f"{shape}-{trainer}": Step(trainer, rows, shape)
    for shape, rows in (("opt-1.3b", 16), ("opt-13b", 64))
    for trainer in ("mezo", "meerkat", "lora")
}
COMPARED = {"opt-1.3b-compiled": Step("meerkat", 16, "opt-1.3b"), "smollm2-compiled": Step("meerkat", 16, None, ())}


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(step: Step) -> Result:
    """All contestants in turn."""
    return bench_step(step.open(), repeats=REPEATS, on_repeat=no_progress)


def compare(step: Step) -> Result:
    """Two forwards of each kind in turn, each on a model of its own, and the seconds until they ran for themselves.

    These begin with making the model, which takes as long for every kind.
    """
    step.open().contestants()[BARE]()  # what a process does once
    free_memory()
    works: dict[str, Callable[[], object]] = {}
    waits, kinds = {}, {}
    with tempfile.TemporaryDirectory() as folder, environment_variable("TORCHINDUCTOR_CACHE_DIR", folder):
        for kind in KINDS:
            begin = time.perf_counter()
            bench = step.of_kind(kind).open()
            works[kind] = partial(finish, bench.contestants()[BARE], card.DEVICE)
            for _ in range(NUM_EAGER):
                works[kind]()
            waits[kind], kinds[kind] = time.perf_counter() - begin, kind_of_forwards(bench.loaded)
        seconds = interleaved(works, repeats=2 * REPEATS)
    return {"rows": step.rows, "tokens": TOKENS, "kinds": kinds, "seconds": seconds, "waits": waits}


# --- figures ----------------------------------------------------------------------------------------------------------


def forwards_name(rows: int, kind: str, number: int = 2) -> str:
    return f"{number} {kind} forwards of {rows} x {TOKENS} tokens"


def step_figures(name: str, kind: str, result: Result) -> Iterator[Figure]:
    """Where the graphs were given up, the figures are not those of the case, and their names say so."""
    made = result.get("forwards", "eager")  # older results do not say
    name = name if made == kind else f"{name} ({made})"
    forwards = forwards_name(result["rows"], made, result["forwards_per_step"])
    bare, *others = result["figures"]
    ratios = {figure["name"]: figure["ratio"] for figure in others}
    for figure in others:
        unit = with_range("ratio", figure["ratio_quartiles"])
        yield f"{name}, {figure['name']} / {forwards}", figure["ratio"], unit
    for rival in (WALK, FIRST_ORDER):
        yield f"{name}, {OURS} / {rival}", ratios[OURS] / ratios[rival], "ratio"
    yield f"{name}, {forwards}", bare["median_s"], "s"


def step_case(name: str, step: Step, kind: str) -> Case:
    if step.trainer != "mezo":
        goal = Goal(1.05)
    elif step.shape == "opt-13b":
        goal = Goal(1.15, elsewhere=1.25)
    else:
        goal = Goal(1.35 if kind == "eager" else 1.55)
    goals = {f"{name}, {OURS} / {forwards_name(step.rows, kind)}": goal}
    goals |= {f"{name}, {OURS} / {rival}": Goal(1.0) for rival in (WALK, FIRST_ORDER)}
    return Case(partial(measure, step.of_kind(kind)), partial(step_figures, name, kind), goals)


def compared_name(name: str, rows: int, one: str, other: str) -> str:
    return f"{name}, {forwards_name(rows, one)} / {other}"


def waits_name(name: str, kind: str) -> str:
    return f"{name}, what the first {kind} forwards wait for, beside eager ones"


def compared_figures(name: str, result: Result) -> Iterator[Figure]:
    """A ratio is the median over repeats in turn; what came out otherwise than it was asked for is left out."""
    seconds, made = result["seconds"], [kind for kind, found in result["kinds"].items() if kind == found]
    for one, other in (("compiled", "captured"), ("compiled", "eager"), ("captured", "eager")):
        if {one, other} <= {*made}:
            ratios = [mine / theirs for mine, theirs in zip(seconds[one], seconds[other], strict=True)]
            yield compared_name(name, result["rows"], one, other), median(ratios), "ratio"
    for kind in made:
        if kind != "eager":
            yield waits_name(name, kind), result["waits"][kind] - result["waits"]["eager"], "s"


def compared_case(name: str, step: Step) -> Case:
    goals = {compared_name(name, step.rows, "compiled", "captured"): Goal()}
    goals[waits_name(name, "compiled")] = Goal(unit="s")
    return Case(partial(compare, step), partial(compared_figures, name), goals)


EAGER = {name: step_case(name, step, "eager") for name, step in STEPS.items()}
CAPTURED = {f"{name}-captured": step_case(f"{name}-captured", step, "captured") for name, step in STEPS.items()}
COMPILED = {name: compared_case(name, step) for name, step in COMPARED.items()}
