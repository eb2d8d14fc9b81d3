"""Each tracker read back with its own library and compared with the lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from wandb.proto.wandb_internal_pb2 import Record

from fedzo.records.metrics import CentralScore, MetricRecord, Round, Summary
from fedzo.report.trackers import TRACKERS, TrackerSink, missing_libraries
from fedzo.report.trackers.base import flat, numbers_of

MakeRun = Callable[..., Path]
Records = list[MetricRecord]
Points = dict[str, list[tuple[int, float]]]
SETTINGS = {"fl": {"rounds": 10, "label_counts": False}, "trainer": {"plugin": "meerkat", "lr": 0.5}, "faults": ["a"]}
NAMES = ("tensorboard", "wandb", "mlflow")


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty one of MLflow, which takes seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def folder(make_run: MakeRun, request: pytest.FixtureRequest) -> Path:
    """A run folder, with an empty database where the test is about MLflow."""
    made = make_run()
    if "mlflow" in request.node.name:
        (made / "mlflow").mkdir()
        shutil.copy(request.getfixturevalue("database"), made / "mlflow")
    return made


def opened(name: str, folder: Path, *, completed: int = 0, told: list[MetricRecord] | None = None) -> TrackerSink:
    config = dict(TRACKERS)[name]()
    make = partial(TRACKERS.build, config, folder=folder, completed=completed)
    return TrackerSink(name, make, settings=SETTINGS, told=told or [])


def tensorboard(folder: Path) -> tuple[Points, dict[str, Any]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return points, {key: getattr(value, value.WhichOneof("kind")) for key, value in started.items()}


def wandb_records(file: Path) -> Iterator[Record]:
    """The records of a file of W&B: LevelDB's log format, whose blocks have 32 KiB."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return  # it is just being written
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_files(folder: Path) -> list[Path]:
    """Its files, when they are whole: another process writes them, and ends a little after ``finish`` returns."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 30
    for file in files:
        while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(file)):
            assert time.monotonic() < deadline, f"{file} has no end"
            time.sleep(0.05)
    return files


def wandb(folder: Path) -> tuple[Points, dict[str, Any]]:
    points: Points = defaultdict(list)
    settings: dict[str, Any] = {}
    rows: list[int] = []
    for file in wandb_files(folder):
        for record in wandb_records(file):
            assert not record.run.run_id or file.stem == f"run-{record.run.run_id}"
            changes = [*record.run.config.update, *record.config.update]
            settings |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in changes}
            if record.WhichOneof("record_type") != "history":
                continue
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append(row["_step"])
            for tag in row.keys() - {"round", "_step", "_timestamp", "_runtime"}:
                points[tag].append((row["round"], row[tag]))
    assert rows == list(range(len(rows)))  # none twice, none missing
    assert len({file.name for file in (folder / "wandb").glob("offline-run-*/*.wandb")}) == 1
    settings.pop("_wandb", None)
    return points, settings


def mlflow(folder: Path) -> tuple[Points, dict[str, Any]]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "fedzo"]
    (run,) = client.search_runs([experiment.experiment_id])
    points = {
        tag: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag))
        for tag in run.data.metrics
    }
    return points, {"status": run.info.status, **run.data.params}


READ = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


def expected(folder: Path) -> Points:
    """Some of the numbers, from the lines themselves."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points: Points = defaultdict(list)
    for line in lines:
        if line["kind"] == "round":
            for key in ("loss", "mean_abs_g", "payload_up_bytes", "message_down_bytes", "dropped_probes"):
                if line[key] is not None:
                    points[f"round/{key}"].append((line["round"] + 1, line[key]))
            points["round/absent"].append((line["round"] + 1, len(line["absent"])))
        if line["kind"] == "score":
            for key in ("accuracy", "loss", "auc", "best_threshold_accuracy"):
                value = line["value" if key == "accuracy" else key]
                points[f"{line['split']}/answers/{key}"].append((line["round"], value))
        if line["kind"] == "federated_score":
            points["federated/answers/accuracy"].append((line["round"], line["value"]))
            points["federated/answers/worst_client"].append((line["round"], line["worst_client"]))
        if line["kind"] == "summary":
            points["summary/best_round"].append((line["rounds"], line["best_round"]))
            points["summary/test_before"].append((line["rounds"], line["before"]["value"]))
            points["summary/test_after"].append((line["rounds"], line["after"]["value"]))
            dev = [each for each in lines if each.get("split") == "dev"]
            points["summary/dev_loss"].append((line["rounds"], min(each["loss"] for each in dev)))
            points["summary/dev"].append((line["rounds"], max(each["value"] for each in dev)))
            points["summary/payload_up_bytes"].append((line["rounds"], line["payload_up_bytes"]))
    return points


def close_to(points: Points) -> dict[str, Any]:
    """TensorBoard holds float32."""
    return {tag: pytest.approx(dict(each), rel=1e-6) for tag, each in points.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_reads_back_what_a_run_measured_and_its_settings(name: str, folder: Path, records: Records) -> None:
    sink = opened(name, folder)
    for record in records:
        sink.write(record)
    sink.close()

    points, settings = READ[name](folder)

    wanted = expected(folder)
    assert {tag: dict(points[tag]) for tag in wanted} == close_to(wanted)
    assert [len(points[tag]) for tag in wanted] == [len(each) for each in wanted.values()]
    if name == "wandb":
        assert settings == flat(SETTINGS)
    else:
        assert (settings["trainer.plugin"], settings["faults"]) == ("meerkat", '["a"]')
    if name == "mlflow":
        assert (settings["status"], settings["fl.rounds"]) == ("FINISHED", "10")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_in_the_same_run_with_no_step_twice_or_missing(
    name: str, killed: bool, folder: Path, records: Records
) -> None:
    """Stopped after 6 rounds, of which the tracker did not get the last; a kill leaves a round that is done again."""
    rounds = [record for record in records if isinstance(record, Round)]
    sink = opened(name, folder)
    for record in (*records[: records.index(rounds[5])], *([rounds[5], rounds[6]] if killed else [])):
        sink.write(record)
    if not killed:
        sink.close()
    elif name == "wandb":
        sink._tracker._run.finish()  # type: ignore[union-attr]  # this very process still has it
    elif name == "tensorboard":
        sink._tracker._writer.flush()  # type: ignore[union-attr]  # its thread would write on, later

    if name == "wandb":
        wandb_files(folder)  # this very process must have let go of it
    before = records[: records.index(rounds[6])]
    sink = opened(name, folder, completed=6, told=before)
    for record in records[len(before) :]:
        sink.write(record)
    sink.close()

    points, _ = READ[name](folder)
    wanted = expected(folder)
    assert {tag: dict(points[tag]) for tag in wanted} == close_to(wanted)
    assert [len(points[tag]) for tag in wanted] == [len(each) for each in wanted.values()]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(
    name: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, records: Records
) -> None:
    folder = make_run()
    (folder / name).write_text("in the way of the tracker's folder")

    with caplog.at_level(logging.WARNING):
        sink = opened(name, folder)
        for record in records:
            sink.write(record)
        sink.close()

    assert [line.message.partition(" Reason")[0] for line in caplog.records] == [
        f"trackers={name}: it failed and gets no more of this run, which goes on."
    ]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("wandb", {"run": "x/../../../precious", "sessions": [], "rows": 0, "steps": {}}),
        ("wandb", {"run": "*", "sessions": [], "rows": 0, "steps": {}}),
        ("mlflow", {"run": "x/../../../precious"}),
    ],
)
def test_a_note_that_no_tracker_wrote_ends_the_tracker_and_leads_nowhere(
    name: str, note: dict[str, Any], make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run folder may come from somebody else."""
    (tmp_path / "precious").mkdir()
    folder = make_run()
    (folder / name / "offline-run-1-x").mkdir(parents=True)
    (folder / name / "fedzo.json").write_text(json.dumps(note))

    opened(name, folder).close()

    assert (tmp_path / "precious").is_dir()
    assert (folder / name / "offline-run-1-x").is_dir()
    assert f"{name}/fedzo.json: run must be" in caplog.text


def test_a_link_to_another_database_ends_the_tracker_and_leaves_it_alone(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, database = make_run(), tmp_path / "precious.db"
    (folder / "mlflow").mkdir()
    (folder / "mlflow" / "mlflow.db").symlink_to(database)

    opened("mlflow", folder).close()

    assert not database.exists()
    assert "mlflow.db: it must lie in its folder itself" in caplog.text


def test_the_loss_of_a_calibration_is_no_training_loss(records: Records) -> None:
    training = next(record for record in records if isinstance(record, Round))
    step, numbers = numbers_of(replace(training, calibration=True))

    assert (step, numbers["calibration/loss"], numbers["calibration/mean_abs_g"]) == (1, 0.8, 10.0)
    of_training = numbers_of(training)[1]
    assert (of_training["round/loss"], of_training["round/mean_abs_g"]) == (0.8, 10.0)
    assert of_training.keys() - numbers.keys() == {"round/loss", "round/mean_abs_g"}
    assert numbers.keys() - of_training.keys() == {"calibration/loss", "calibration/mean_abs_g"}


def test_a_run_s_dev_score_is_that_of_its_best_round_and_older_runs_have_none(records: Records) -> None:
    summary = records[-1]
    assert isinstance(summary, Summary)
    assert summary.dev is not None
    best = replace(summary.dev, round=4, value=0.875, loss=0.125)

    step, numbers = numbers_of(replace(summary, best_round=4, dev=best))
    lossless = numbers_of(replace(summary, dev=replace(best, loss=None)))[1]
    older = numbers_of(replace(summary, dev=None))[1]

    assert (step, numbers["summary/dev_loss"], numbers["summary/dev"]) == (10, 0.125, 0.875)
    assert numbers.keys() - lossless.keys() == {"summary/dev_loss"}
    assert numbers.keys() - older.keys() == {"summary/dev_loss", "summary/dev"}


def test_the_table_of_runs_in_tensorboard_has_the_dev_loss(make_run: MakeRun, records: Records) -> None:
    folder = make_run()
    sink = opened("tensorboard", folder)
    for record in records:
        sink.write(record)
    sink.close()

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    tags = {each.name.tag for each in shown}
    assert "summary/dev_loss" in tags
    assert tags <= {*events.Tags()["scalars"]}


class Broken:
    """A tracker whose disk is full from the third record on."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed: list[bool] = []

    def last_step(self, tag: str) -> int:
        return -1

    def settings(self, settings: Any) -> None:
        pass

    def write(self, numbers: Any, step: int) -> None:
        if len(self.steps) == 2:
            raise OSError("No space left on device")
        self.steps.append(step)

    def close(self, *, finished: bool) -> None:
        self.closed.append(finished)
        raise OSError("No space left on device")


def test_a_tracker_that_fails_in_mid_run_is_closed_and_gets_no_more(
    caplog: pytest.LogCaptureFixture, records: Records
) -> None:
    tracker = Broken()
    sink = TrackerSink("broken", lambda: tracker, settings={})
    for record in records:
        sink.write(record)
    sink.close()

    assert (len(tracker.steps), tracker.closed) == (2, [False])
    assert [line.levelname for line in caplog.records if line.levelno >= logging.WARNING] == ["WARNING"]
    assert "No space left on device" in caplog.text


def test_a_tracker_without_its_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.report.trackers.base.find_spec", lambda name: None)
    chosen = {name: config() for name, config in TRACKERS}

    texts = [problem.text for problem in missing_libraries(chosen)]

    assert texts == [
        "trackers=mlflow: the package mlflow must be installed, but is not. Install it with: "
        "pip install 'fedzo[mlflow]'",
        "trackers=tensorboard: the package tensorboard must be installed, but is not. Install it with: "
        "pip install 'tensorboard'",
        "trackers=wandb: the package wandb must be installed, but is not. Install it with: pip install 'fedzo[wandb]'",
    ]


def test_a_folder_that_is_called_like_a_library_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlruns_of_mine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    config = dict(TRACKERS)["mlflow"]()
    monkeypatch.setattr(type(config), "library", "mlruns_of_mine")

    assert len(missing_libraries({"mlflow": config})) == 1


def test_a_part_of_a_package_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dict(TRACKERS)["mlflow"]()
    monkeypatch.setattr(type(config), "library", "absent_package.part")

    (problem,) = missing_libraries({"mlflow": config})

    assert "the package absent_package.part must be installed, but is not" in problem.text


def test_mlflow_writes_where_its_own_variable_says_and_a_longer_run_keeps_its_first_settings(
    make_run: MakeRun, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{shutil.copy(database, tmp_path / 'shared.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    folder = make_run()
    opened("mlflow", folder).close()
    make = partial(TRACKERS.build, dict(TRACKERS)["mlflow"](), folder=folder, completed=0)
    TrackerSink("mlflow", make, settings={**SETTINGS, "fl": {"rounds": 20}}).close()

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (folder.name, "KILLED")
    assert (run.data.params["fl.rounds"], run.data.tags["fl.rounds"]) == ("10", "20")
    assert not (folder / "mlflow" / "mlflow.db").exists()


def test_jobs_that_make_the_experiment_of_mlflow_at_the_same_moment_all_have_their_runs_in_it(
    make_run: MakeRun, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{shutil.copy(database, tmp_path / 'shared.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    make = MlflowClient.create_experiment

    def made_by_both(self: MlflowClient, *arguments: Any) -> str:
        make(self, *arguments)  # another job is a little faster
        return make(self, *arguments)

    monkeypatch.setattr(MlflowClient, "create_experiment", made_by_both)
    for name in ("first", "second"):
        opened("mlflow", make_run(name)).close()

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fedzo")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["first", "second"]
    assert "it failed" not in caplog.text


def test_scores_that_a_killed_run_owed_are_written_at_the_step_where_it_stopped(
    make_run: MakeRun, records: Records
) -> None:
    folder = make_run()
    rounds = [record for record in records if isinstance(record, Round)][:6]
    dev = replace(next(r for r in records if isinstance(r, CentralScore) and r.split == "dev"), round=6)
    sink = opened("tensorboard", folder)
    for record in rounds:
        sink.write(record)
    sink.close()

    sink = opened("tensorboard", folder, completed=6, told=list(rounds))
    sink.write(dev)
    sink.close()

    points, _ = tensorboard(folder)
    assert [step for step, _ in points["dev/answers/accuracy"]] == [6]
    assert [step for step, _ in points["round/payload_up_bytes"]] == [1, 2, 3, 4, 5, 6]
