"""Sites with files of their own in one federation: what each refuses, and what does not leave it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

import fedzo.run.federation
from fedzo.config.schema import RunConfig
from fedzo.config.travel import from_json, load_site
from fedzo.errors import ConfigError
from fedzo.fl.exchange import Outbox
from fedzo.run import apps
from fedzo.run.process import Process, open_process
from fedzo.run.staging import Staging

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
SETTINGS = ("partition=own", "trainer.calibration=imdb", "evaluation.central=false", "fl.rounds=1")


class Sites:
    """Clients of an inline run that each open it from a folder of their own, as a site's process does.

    Attributes:
        answers: What the server received of each client, as text.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.answers: dict[int, list[str]] = {}
        self.before: dict[int, Callable[[Process], object]] = {}
        self.grid: Any = None
        self._limits: dict[int, str] = {}
        self._open: dict[int, Process] = {}
        self._run = ""

    def add(self, client: int, limits: str, *, rows: int = 8, top: str = "") -> None:
        place = self.folder / f"site{client}"
        place.mkdir(parents=True)
        lines = [{"text": f"{client} says {['bad', 'good'][i % 2]} {i}", "label": i % 2} for i in range(rows)]
        (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = f"device: cpu\nthreads: 1\nmodel: {{name: {self.model}}}\ndata: {{path: ./rows.jsonl}}\n{top}\n"
        (place / "site.yaml").write_text(f"{text}limits: {{{limits}}}\n")
        self.answers[client] = []

    @property
    def path(self) -> str:
        return f"data.path='{self.folder}/site{{client}}/rows.jsonl'"

    def worker(self, context: Context) -> Any:
        client, run = self.grid.client_of(context.node_id), str(context.run_config[apps.CONFIG_KEY])
        if run != self._run:
            self._open, self._run = {}, run
        if client not in self._open:
            place = self.folder / f"site{client}"
            agreed, site = from_json(run, RunConfig), load_site(place / "site.yaml")
            self._open[client] = open_process(
                agreed, site, site_folder=place, artifacts=place / "artifacts", plays_clients=True
            )
            self.before.get(client, bool)(self._open[client])
        return self._open[client].client.worker

    def heard(self, message: Message) -> None:
        content = message.error.reason if message.has_error() else repr(dict(message.content["fedzo"]))
        self.answers[self.grid.client_of(message.metadata.src_node_id)].append(str(content))


@pytest.fixture
def sites(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Sites:
    made, pull = Sites(tmp_path / "sites", tiny_model_dir), Outbox.pull

    def hear(self: Any, grid: Any) -> Any:
        made.grid = grid
        got = pull(self, grid)
        for _, message in got:
            made.heard(message)
        return got

    assert fedzo.run.federation  # the server keeps its own way to its process
    monkeypatch.setattr(apps, "_worker", made.worker)
    monkeypatch.setattr(Outbox, "pull", hear)
    return made


def test_each_site_refuses_by_its_own_limit_and_the_server_learns_a_number(
    run: Run, sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    cases = {
        11: "tasks: [secret_task]",
        12: "trainers: [mezo, lora]",
        14: "max_steps: 3",
        15: "max_rows: 7",
        16: f"base_digest: {'a5' * 32}",
        17: "",
        18: "min_rows: 8",
        19: "answers: [loss, per_class]",
        23: "max_probes: 1",
        24: "estimators: [fzoo]",
        20: "",
    }
    numbers = list(cases)  # 13 is left to a unit test, as the package has one stage; 22 is of runs without scalars
    for client, (number, limits) in enumerate(cases.items()):
        sites.add(client, limits, top="artifact_max_bytes: 4321" if number == 17 else "")
    last = len(cases) - 1
    sites.before[last] = lambda process: process.kept.claim(3)

    settings = ("fl.local_steps=4", "fl.batch_size=2", "fl.label_counts=true", "estimator.num_probes=2")
    clients = f"fl.num_clients={len(cases)}"
    with pytest.raises(ConfigError, match="client 0 cannot take part: refusal 11, its site does not take part in this"):
        run(*SETTINGS, *settings, clients, sites.path, "strategy.startup_s=5")

    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    own = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    for client, number in enumerate(numbers):
        assert any(text.startswith(f"client {client} cannot take part: refusal {number}, ") for text in told), number
        assert any(text.startswith(f"client {client}: refusal {number}, ") for text in own), number
    what = "\n".join(text for texts in sites.answers.values() for text in texts)
    assert str(sites.folder) not in what
    for kept_back in ("secret_task", "lora", "fzoo", "a5a5", "4321", "limits"):
        assert kept_back in "\n".join(own), kept_back
        assert kept_back not in what, kept_back
        assert kept_back not in "\n".join(told), kept_back


def test_rows_that_are_too_few_for_the_site_are_refused_before_any_stage_works_on_them(
    run: Run, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows a stage works on would tell their number."""
    sites.add(0, "min_rows: 10")
    begun: list[int] = []
    monkeypatch.setattr(Staging, "look", lambda self, client: begun.append(client))

    with pytest.raises(ConfigError, match="client 0 cannot take part: refusal 18, "):
        run(*SETTINGS, "preprocess=[identity]", "fl.num_clients=1", sites.path, "strategy.startup_s=5")

    assert begun == []


def test_the_numbers_that_a_site_keeps_are_in_no_message_and_the_others_are_the_mean(
    run: Run, sites: Sites, lines: Lines
) -> None:
    limits = ["answers: [loss, accuracy]", "answers: [loss]", "answers: [none]", "min_rows: 10"]
    settings = (*SETTINGS, "fl.num_clients=4", "partition.holdout=0.25", "fl.batch_size=2")
    for client in range(4):
        sites.add(client, "", rows=24)
    open_run = run(*settings, sites.path)
    (whole,) = (line for line in lines(open_run, "metrics.jsonl") if line["kind"] == "federated_score")
    for client, text in enumerate(limits):
        file = sites.folder / f"site{client}" / "site.yaml"
        file.write_text(file.read_text().replace("limits: {}", f"limits: {{{text}}}"))
        sites.answers[client].clear()
    sites._run = ""

    folder = run(*settings, sites.path)

    assert lines(folder, "public.jsonl") == lines(open_run, "public.jsonl")  # what a site tells trains nothing
    (score,) = (line for line in lines(folder, "metrics.jsonl") if line["kind"] == "federated_score")
    all_of = {entry["client"]: entry for entry in whole["clients"]}
    assert [*all_of] == [0, 1, 2, 3]
    assert {entry["client"]: (entry["value"], entry["loss"]) for entry in score["clients"]} == {
        0: (all_of[0]["value"], all_of[0]["loss"]),
        1: (None, all_of[1]["loss"]),
    }
    assert (score["value"], score["worst_client"]) == (all_of[0]["value"], all_of[0]["value"])
    assert score["loss"] == pytest.approx((all_of[0]["loss"] + all_of[1]["loss"]) / 2)  # of six rows each
    for client, entry in all_of.items():
        said = "\n".join(sites.answers[client])
        assert (str(entry["loss"]) in said) is (client in (0, 1))
        assert "per_class" not in said or '"per_class": {}' in said
        assert ('"value"' in said) is (client in (0, 1))
    assert '"value": null' in "\n".join(sites.answers[1])
    assert "'num_heldout': 6" in "\n".join(sites.answers[0])
    assert "'num_heldout'" not in "\n".join(sites.answers[3])  # six rows, of which the site tells no count
    told = {client["client"]: client["num_heldout"] for client in lines(folder, "metrics.jsonl")[0]["clients"]}
    assert told == {0: 6, 1: 6, 2: 6, 3: 0}
