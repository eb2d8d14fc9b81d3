"""TensorBoard, Weights & Biases and MLflow as trackers, each by its own library.

A library is imported when a run opens its tracker. Nothing is sent to another machine unless the library's own
environment variable asks for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from fedzo.errors import RunFolderError
from fedzo.records.decode import read_record, to_json
from fedzo.records.fields import Count, Length, Matching, RoundNumber, Words
from fedzo.records.folder import refuse_link, replace_file
from fedzo.report.trackers.base import TRACKERS, TrackerConfig

NOTE = "fedzo.json"
"""In a tracker's folder: which of its runs this is."""
T = TypeVar("T")


def _read_note(kind: type[T], run_dir: Path, tracker: str) -> T | None:
    """What a tracker noted in its folder; None for a new run.

    Raises:
        RunFolderError: The note is a link, or none that the tracker writes: the folder may come from somebody else.
    """
    remedy = "Restore the file from a copy, or delete it for a new run of the tracker."
    return read_record(kind, run_dir, f"{tracker}/{NOTE}", error=RunFolderError, remedy=remedy)


@dataclass(kw_only=True, slots=True)
class TensorBoardConfig(TrackerConfig):
    """TensorBoard: scalars and hyperparameters as event files in ``RUN/tensorboard``."""

    library: ClassVar[str] = "tensorboard"


@TRACKERS.register("tensorboard", TensorBoardConfig)
class TensorBoard:
    """Event files, of which TensorBoard forgets the steps after the committed rounds when a run is resumed."""

    def __init__(self, config: TensorBoardConfig, *, folder: Path, completed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._completed = folder / "tensorboard", completed
        self._before = self._last_steps() if any(self._folder.glob("events.*")) else {}
        self._writer: Any = SummaryWriter(str(self._folder), purge_step=completed + 1)

    def _last_steps(self) -> dict[str, int]:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

        events = EventAccumulator(str(self._folder), size_guidance={SCALARS: 1}).Reload()  # the last one is kept
        return {tag: min(events.Scalars(tag)[-1].step, self._completed) for tag in events.Tags()[SCALARS]}

    def last_step(self, tag: str) -> int:
        return self._before.get(tag, -1)

    def settings(self, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import summary

        plain = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in settings.items()
        }
        shown = dict.fromkeys(f"summary/{name}" for name in ("dev_loss", "dev", "test_after", "best_round"))
        hparams: Any = summary.hparams
        for each in hparams(plain, shown):
            self._writer.file_writer.add_summary(each)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, step)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


@dataclass(kw_only=True, slots=True)
class WandbConfig(TrackerConfig):
    """Weights & Biases: offline in ``RUN/wandb``, unless ``WANDB_MODE`` says otherwise."""

    library: ClassVar[str] = "wandb"
    extra: ClassVar[str | None] = "wandb"


@dataclass(kw_only=True, slots=True)
class WandbNote:
    """What whole sessions of W&B wrote.

    Attributes:
        run: Id of the run there.
        sessions: Names of their folders.
        rows: How many rows they wrote.
        steps: Of the last number under each tag.
    """

    run: Annotated[str, Matching(re.compile("[0-9a-f]{16}"), "16 hexadecimal digits")]
    sessions: Annotated[tuple[Words, ...], Length(0, 1 << 16)] = ()
    rows: Count = 0
    steps: Annotated[dict[Words, RoundNumber], Length(0, 1 << 16)] = field(default_factory=dict)


@TRACKERS.register("wandb", WandbConfig)
class Wandb:
    """A run of W&B with a row for each record, over the axis ``round``.

    W&B writes its files late, so a killed process leaves an unknown part of them. The note in ``RUN/wandb`` knows what
    whole sessions wrote. What another session left is removed, and its rows are written again.
    """

    def __init__(self, config: WandbConfig, *, folder: Path, completed: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._folder = folder / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._note = _read_note(WandbNote, folder, "wandb") or WandbNote(run=uuid.uuid4().hex[:16])
        replace_file(self._folder / NOTE, to_json(self._note))
        for session in self._folder.glob(f"offline-run-*-{self._note.run}"):
            if session.name not in self._note.sessions:
                shutil.rmtree(session)
        init: Any = wandb.init  # mypy knows its modes, the variable is the user's
        self._run: Any = init(
            project=os.environ.get("WANDB_PROJECT") or "fedzo",
            id=self._note.run,
            name=os.environ.get("WANDB_NAME") or folder.name,
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE") or "offline",
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", symlink=False),
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def last_step(self, tag: str) -> int:
        return self._note.steps.get(tag, -1)

    def settings(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({"round": step, **numbers}, step=self._note.rows, commit=True)
        self._note.rows += 1
        self._note.steps |= dict.fromkeys(numbers, step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
        self._note.sessions = tuple(sorted({*self._note.sessions, Path(self._run.dir).parent.name}))
        replace_file(self._folder / NOTE, to_json(self._note))


@dataclass(kw_only=True, slots=True)
class MlflowConfig(TrackerConfig):
    """MLflow: in the database ``RUN/mlflow/mlflow.db``, unless ``MLFLOW_TRACKING_URI`` is set."""

    library: ClassVar[str] = "mlflow"
    extra: ClassVar[str | None] = "mlflow"


@dataclass(kw_only=True, slots=True)
class MlflowNote:
    """Which run of MLflow this is.

    Attributes:
        run: Its id, by MLflow's own rule: a server of another maker may write others than 32 hexadecimal digits.
    """

    run: Annotated[str, Matching(re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,255}"), "an id of a run of MLflow")]


@TRACKERS.register("mlflow", MlflowConfig)
class Mlflow:
    """A run of MLflow: settings as parameters, numbers as metrics."""

    def __init__(self, config: MlflowConfig, *, folder: Path, completed: int) -> None:
        for variable, value in (
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
            ("MLFLOW_LOGGING_LEVEL", "ERROR"),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),  # a server that is away must not hold up the rounds
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ):
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        own = folder / "mlflow"
        own.mkdir(exist_ok=True)
        for each in own.iterdir():  # a run folder may be somebody else's
            refuse_link(each)
        note = _read_note(MlflowNote, folder, "mlflow")
        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=elsewhere or f"sqlite:///{own.resolve() / 'mlflow.db'}")
        try:
            self._run: Any = self._client.get_run(note.run) if note else None
        except MlflowException:  # it is not in the place that the variable names now
            self._run = None
        if self._run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedzo"
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                artifacts = None if elsewhere else (own.resolve() / "artifacts").as_uri()
                try:
                    experiment = self._client.get_experiment(self._client.create_experiment(name, artifacts))
                except MlflowException:  # another job of a sweep may have made it at this very moment
                    if (experiment := self._client.get_experiment_by_name(name)) is None:
                        raise
            self._run = self._client.create_run(experiment.experiment_id, run_name=folder.name)
            replace_file(own / NOTE, to_json(MlflowNote(run=self._run.info.run_id)))
        self._id = self._run.info.run_id
        self._client.update_run(self._id, status="RUNNING")

    def last_step(self, tag: str) -> int:
        if tag not in self._run.data.metrics:
            return -1
        return max(int(metric.step) for metric in self._client.get_metric_history(self._id, tag))

    def settings(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
        texts = {key: text[:6000] for key, text in texts.items()}  # the longest that MLflow takes
        before = self._run.data.params
        new = [Param(key, text) for key, text in texts.items() if key not in before]
        for start in range(0, len(new), 100):  # as many as it takes at once
            self._client.log_batch(self._id, params=new[start : start + 100])
        # a parameter cannot be changed: of a run that was made longer, a tag has the new rounds
        self._client.log_batch(
            self._id, tags=[RunTag(key, text) for key, text in texts.items() if before.get(key, text) != text]
        )

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(tag, value, now_ms, step) for tag, value in numbers.items()])

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")
