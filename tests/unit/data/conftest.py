"""What the data tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from omegaconf import DictConfig, OmegaConf

from fedzo.config.plugins import conf_dir
from fedzo.data.config import TaskConfig


@pytest.fixture(scope="session")
def shipped_task() -> Callable[[str], TaskConfig]:
    """Reads ``conf/task/NAME.yaml`` without Hydra, checked against the dataclass."""

    def read(name: str) -> TaskConfig:
        values = OmegaConf.load(conf_dir() / "task" / f"{name}.yaml")
        assert isinstance(values, DictConfig)
        assert values.pop("defaults") == ["task_schema", "_self_"]
        task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), values))
        assert isinstance(task, TaskConfig)
        return task

    return read
