"""What Hydra is given for a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedzo.config.compose import compose_run, session
from fedzo.config.sweep import plan_sweep
from fedzo.errors import ConfigError

FOLDER = "${fedzo_job_folder:${hydra:job.override_dirname}}"


def test_a_glob_matches_options_and_no_schemas() -> None:
    sweep = plan_sweep(["trainer=glob(mezo*)", "hydra.sweep.dir=all"])

    assert [type(config.trainer).__name__ for config in sweep.configs] == ["MezoConfig"]
    assert sweep.overrides == ["trainer=mezo", "hydra.sweep.dir=all", "hydra.sweep.dir='all'"]


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
