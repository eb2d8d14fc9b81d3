"""Whole runs: cells of the study of ``experiments/meerkat`` on SmolLM2, and the replay of one on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from card import Case, Figure, Goal, Result
from mask_cases import MASK, RUNS, study_data, study_mask

from fedzo.bench.claims import metric_lines, ran_with
from fedzo.cli import RUN_FAILED
from fedzo.fl.log_store import has_begun

CONF = Path(__file__).parents[1] / "meerkat" / "conf"
STUDY = ["experiment=study", "evaluation.central=false", "evaluation.federated_every_rounds=-1"]
MEERKAT = ["+cell=sst2-meerkat", f"inputs.artifact={MASK}"]
GRAPHS = ["model.cuda_graphs=true"]
CELLS = {
    "sst2-T1": [*MEERKAT, "+budget=T1"],
    "sst2-T50": [*MEERKAT, "+budget=T50", "fl.rounds=3"],
    "ag_news-T1": ["+cell=ag_news-full", "+budget=T1", "fl.rounds=10"],
}
TITLES = {
    "sst2-T1": "SST-2, SmolLM2, Meerkat, T = 1, 8 clients: 200 rounds without start, mask and scores",
    "sst2-T50": "SST-2, SmolLM2, Meerkat, T = 50, 8 clients: a round",
    "ag_news-T1": "AG News, SmolLM2, all weights, T = 1, 8 clients: a round",
}
WITH_GRAPHS = ", with CUDA graphs"
LIMITS = {"sst2-T1": 4.0, "sst2-T50": 4.0, "ag_news-T1": 0.3}
REPLAYED = "SST-2, Meerkat, T = 1, 200 rounds: models that a replay on the CPU finds otherwise"


# --- measuring --------------------------------------------------------------------------------------------------------


def cell(name: str, words: list[str]) -> Result:
    """A run of the study alone on the card: seconds of each round."""
    study_run(RUNS / name, words)
    return {"seconds": seconds_of_rounds(RUNS / name), "environment": ran_with(RUNS / name)}


def study_run(folder: Path, words: list[str]) -> None:
    """A run of seed 0 in its folder."""
    make_mask()
    run(folder, ["--config-dir", str(CONF), *STUDY, *words, "seed=0"])


def make_mask() -> None:
    """As the study's runs share it, if it is not there."""
    study_data()  # which says what is missing
    if not MASK.exists():
        study_mask()


def run(folder: Path, words: list[str]) -> None:
    """A new run in a folder, or the rest of one that was interrupted."""
    if is_finished(folder):
        shutil.rmtree(folder)
    if has_begun(folder):
        fedzo("resume", str(folder))
    else:
        fedzo("train", *words, f"hydra.run.dir={folder}")


def is_finished(folder: Path) -> bool:
    return has_begun(folder) and bool(metric_lines(folder, "summary"))


def seconds_of_rounds(folder: Path) -> list[float]:
    """Of each round, with what the server does between two of them: its median, for a resumed run has a long one."""
    rounds = metric_lines(folder, "round")
    gaps = [later["seconds"] - earlier["seconds"] - later["round_seconds"] for earlier, later in pairwise(rounds)]
    return [each["round_seconds"] + median(gaps) for each in rounds]


def replayed() -> Result:
    """The log of a run on the card, replayed by a process that sees no card: whether it ends at the same model."""
    folder = RUNS / "sst2-T1"
    if not is_finished(folder):
        study_run(folder, CELLS["sst2-T1"])
    return {**replay_on_cpu(folder), "environment": ran_with(folder)}


def replay_on_cpu(folder: Path) -> Result:
    """A replay fails at the first round whose state has another hash than the log says."""
    (summary,) = metric_lines(folder, "summary")
    found = None
    try:
        found = json.loads(fedzo("replay", str(folder), variables={"CUDA_VISIBLE_DEVICES": ""}).stdout)["digest"]
    except subprocess.CalledProcessError as error:
        if error.returncode != RUN_FAILED:
            raise
    return {"differing": int(found != summary["final_digest"]), "rounds": summary["rounds"], "digest": found}


def fedzo(*words: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command of fedzo that succeeds, in a process of its own, with environment variables of its own."""
    environment = {**os.environ, **(variables or {})}
    command = [sys.executable, "-m", "fedzo", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)


# --- figures ----------------------------------------------------------------------------------------------------------


def cell_figures(title: str, whole: bool, result: Result) -> Iterator[Figure]:
    """All rounds together, or the median: the first ones warm up."""
    yield title, (sum if whole else median)(result["seconds"]), "s"


def cell_case(name: str, *, graphs: bool) -> tuple[str, Case]:
    """The name of its results, and the case."""
    title, own = (TITLES[name] + WITH_GRAPHS, f"{name}-captured") if graphs else (TITLES[name], name)
    words = [*CELLS[name], *GRAPHS] if graphs else CELLS[name]
    figures = partial(cell_figures, title, name == "sst2-T1")
    return own, Case(partial(cell, own, words), figures, {title: Goal(LIMITS[name], "s")})


def replay_figures(result: Result) -> Iterator[Figure]:
    yield REPLAYED, result["differing"], ""


ROUNDS = dict(cell_case(name, graphs=graphs) for name in ("sst2-T1", "ag_news-T1") for graphs in (False, True))
LOCAL_STEPS = dict(cell_case("sst2-T50", graphs=graphs) for graphs in (False, True))
REPLAY = {"sst2-T1-replayed": Case(replayed, replay_figures, {REPLAYED: Goal(0.0, "")})}
