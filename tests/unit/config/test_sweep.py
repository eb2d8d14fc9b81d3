"""What Hydra is given for a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedzo.config.compose import compose_run, session
from fedzo.config.sweep import is_sweep, plan_sweep
from fedzo.errors import ConfigError

FOLDER = "${fedzo_job_folder:${hydra:job.override_dirname}}"


def test_a_glob_matches_options_and_no_schemas() -> None:
    sweep = plan_sweep(["trainer=glob(mezo*)", "hydra.sweep.dir=all"])

    assert [type(config.trainer).__name__ for config in sweep.configs] == ["MezoConfig"]
    assert sweep.overrides == ["trainer=mezo", "hydra.sweep.dir=all", "hydra.sweep.dir='all'"]


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (["fl.rounds=3", "hydra.run.dir=one"], False),
        (["fl.rounds=3", "hydra.mode=RUN"], False),
        (["fl.rounds=3", "hydra.mode=MULTIRUN"], True),
        (["fl.rounds=3", "hydra={mode:MULTIRUN}"], True),
    ],
)
def test_hydras_mode_asks_for_a_sweep(words: list[str], asks: bool) -> None:
    assert is_sweep(words) == asks


def test_words_that_cannot_ask_for_a_sweep_are_not_composed_to_see_whether_they_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedzo.config.sweep.compose_run", None)

    assert not is_sweep(["trainer=mezo", "fl.rounds=3", "seed=1,2"])


def test_a_typo_that_all_jobs_have_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        composed.append(arguments)
        return compose_run(*arguments, **options)

    for module in ("load", "diagnose"):
        monkeypatch.setattr(f"fedzo.config.{module}.compose_run", counted)
    counts = []
    for seeds in ("0,1", "0,1,2,3,4"):
        composed.clear()
        with pytest.raises(ConfigError) as caught:
            plan_sweep(["trainer.lrr=4", "fl.rounds=2", "fl.batch_size=2", f"seed={seeds}"])
        assert str(caught.value) == "trainer.lrr=4: trainer.lrr is not a setting. Did you mean trainer.lr?"
        counts.append(len(composed))

    assert counts[1] - counts[0] == 3  # one a job, as in a sound sweep


def test_the_other_problems_of_jobs_are_told_beside_a_word_that_is_wrong_in_all() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_sweep(["fl.local_steps=many", "fl.rounds=1,0,some", "fl.batch_size=0"])

    head, *lines = str(caught.value).splitlines()
    assert head == "4 problems in the configuration:"
    starts = [
        "fl.local_steps=many: ",
        "fl.batch_size must be >= 1, got 0.",
        "job 1 (fl.rounds=0): fl.rounds must be >= 1, got 0.",
        "job 2 (fl.rounds=some): fl.rounds=some: ",
    ]
    assert [line[4 : 4 + len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_a_word_that_is_wrong_for_some_choices_is_told_of_their_jobs_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_sweep(["trainer.rank=4", "seed=0,1", "trainer=mezo,lora"])

    told = "job 0 (seed=0 trainer=mezo) and 1 more: trainer.rank=4: trainer.rank is not a setting. It belongs to "
    assert str(caught.value) == f"{told}trainer=lora, and another is chosen."


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer=glob\(zz\*\): it must match one of .*mezo.*, but matches none"):
        plan_sweep(["trainer=glob(zz*)"])


@pytest.mark.parametrize(
    ("words", "subdir"),
    [
        ([], FOLDER),
        (["hydra/launcher=joblib"], f"${{hydra:job.num}}_{FOLDER}"),
        (["hydra/launcher=joblib", "hydra.sweep.subdir=mine"], "mine"),
    ],
)
def test_equal_trials_that_run_at_the_same_time_have_folders_of_their_own(words: list[str], subdir: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

    sweep = plan_sweep(["hydra/sweeper=optuna", "seed=1,2", *words])

    with session():
        shared = [each for each in sweep.overrides if each != "seed=1,2"]
        own = OmegaConf.to_container(compose_run(shared, hydra=True).hydra.sweep)
    assert own == {"dir": str(sweep.folder), "subdir": subdir}


def test_the_folder_of_a_sweep_may_be_named_by_what_its_jobs_share() -> None:
    sweep = plan_sweep(["task=sst2", "data.path=.", "seed=1,2", "hydra.sweep.dir=runs/${task.name}"])

    assert sweep.folder == Path("runs/sst2")
