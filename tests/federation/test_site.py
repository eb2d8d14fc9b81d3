"""A machine's own configuration beside the run's: what may differ between peers, and what may not."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file, save_file

import fedzo.models.adapters  # noqa: F401  (its libraries log an error when imported, whose frames caplog would keep)
from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.export import export_run
from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.config.schema import LaunchConfig, SiteConfig
from fedzo.data.partition import partition
from fedzo.errors import ConfigError, PluginError, RunFolderError
from fedzo.fl.config import SiteLimitsConfig
from fedzo.fl.log_store import RunLog
from fedzo.fl.messages import EvaluateReply, Hello, HelloReply, Refusal, ScalarReply, TrainRequest, decode, encode
from fedzo.fl.server.registration import registration_problem
from fedzo.fl.server.step_policy.statistics import Statistic
from fedzo.fl.site_limits import SiteError
from fedzo.models.config import ModelConfig
from fedzo.models.digest import parameters_digest
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.records.texts import write_whole
from fedzo.run import apps, site_model
from fedzo.run.peer import Peer, open_model
from fedzo.run.process import Process, forget_process, keep_process, leave_other, read_anew, this_process
from fedzo.run.site_model import SiteModel
from fedzo.run.start import open_run
from fedzo.system import SITE_ARTIFACTS_ENV
from fedzo.testing.tiny_models import save_tiny_model, tiny_model
from fedzo.trainers.adapters import LoraTrainerConfig
from fedzo.trainers.artifacts import ARTIFACTS, ArtifactStore
from fedzo.trainers.mezo import MezoConfig
from fedzo.zo.log import EMPTY_CHAIN

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
Overrides = Callable[..., list[str]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], Process]]:
    """Open the run of a folder as a client process does that has a site file with this text."""

    def open_at(folder: Path, site: str) -> Process:
        (tmp_path / "site.yaml").write_text(site)
        monkeypatch.setenv("FEDZO_SITE", str(tmp_path / "site.yaml"))
        return this_process((folder / "run.json").read_text())

    forget_process()
    yield open_at
    forget_process()


def test_what_a_server_sends_is_kept_beside_the_sites_file_where_no_folder_is_named(
    finished: Run, opened: Callable[[Path, str], Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SITE_ARTIFACTS_ENV, raising=False)
    folder = finished("fl.rounds=1")
    (tmp_path / ARTIFACTS).mkdir()
    (tmp_path / ARTIFACTS / ("a" * 64)).write_text("of another run, or somebody else's")

    process = opened(folder, (folder / "site.json").read_text())

    assert process.client.worker._artifacts.folder == tmp_path / ARTIFACTS
    assert [*(tmp_path / ARTIFACTS).iterdir()] == [tmp_path / ARTIFACTS / ("a" * 64)]


def test_a_site_holds_model_and_rows_where_and_how_it_likes(
    finished: Run, opened: Callable[[Path, str], Process], tiny_model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = finished("fl.rounds=1")
    shutil.copytree(tiny_model_dir, tmp_path / "elsewhere")
    shutil.copytree(data_dir, tmp_path / "rows")

    site = "device: cpu\nthreads: 1\nmodel: {name: ./elsewhere, dtype: bfloat16}\ndata: {path: ./rows}\n"
    process = opened(folder, site)

    assert process.peer.loaded.model.dtype.itemsize == 2
    assert process.identity.config_hash == replay_run(folder)["config_hash"]
    assert process.identity.base_digest == process.peer.config.base.weights_digest
    assert len(this_process((folder / "run.json").read_text()).client.data(0).train) > 0


def test_a_client_that_deals_the_rows_otherwise_than_the_server_is_refused(
    finished: Run, opened: Callable[[Path, str], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another numpy, or a plugin that draws by no seed: it has as many rows, and some are another client's."""
    folder = finished("fl.rounds=1")
    site = (folder / "site.json").read_text()
    server = opened(folder, site).identity

    def refused() -> str:
        forget_process()
        reply = opened(folder, site).client.worker.hello(Hello(client=0))
        assert reply.num_train > 0
        return registration_problem(0, reply, identity=server, num_labels=0, first=None)

    def turned(rows: Any, config: Any, **run: Any) -> list[list[int]]:
        first, *others = partition(rows, config, **run)
        return [*others, first]

    assert refused() == ""
    monkeypatch.setattr("fedzo.data.rows.partition", turned)
    assert refused().startswith("its partition of the rows must be the server's")


@pytest.mark.parametrize(
    "error", [ConfigError("it deals no row twice"), PluginError("it deals no lists"), OSError("its file is on no disk")]
)
def test_a_client_that_cannot_deal_the_rows_refuses_for_its_rows_whatever_the_error(
    finished: Run,
    opened: Callable[[Path, str], Process],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """The server then ends the start at once, and no client is waited for that no retry mends."""
    folder = finished("fl.rounds=1")
    config_hash = replay_run(folder)["config_hash"]

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("fedzo.data.rows.partition", fails)
    reply = opened(folder, (folder / "site.json").read_text()).client.worker.hello(Hello(client=0))

    assert reply == HelloReply(config_hash=config_hash, refusal=Refusal.rows)
    assert str(error) in caplog.text


def test_another_start_of_the_same_run_reads_the_sites_file_and_rows_anew(
    finished: Run, opened: Callable[[Path, str], Process]
) -> None:
    """Monthly training has the same settings, and so the same agreement; rows and limits have changed since."""
    folder = finished("fl.rounds=1")
    text, site = (folder / "run.json").read_text(), (folder / "site.json").read_text()
    opened(folder, site)
    forget_process()

    first = this_process(text, flower_run=1)
    leave_other(1)
    assert this_process(text, flower_run=1) is first
    assert this_process(text, flower_run=2) is first  # of a run that goes on
    leave_other(3)
    second = this_process(text, flower_run=3)

    assert second is not first
    assert second.peer.loaded.model is first.peer.loaded.model


@pytest.mark.usefixtures("flower_task")
def test_a_site_that_was_refused_before_the_run_begins_reads_its_file_anew(
    finished: Run, opened: Callable[[Path, str], Process], tmp_path: Path
) -> None:
    """Through the app, as the server greets it; what stages have spent of a budget is kept while the file stays."""
    folder = finished("fl.rounds=1")
    site = json.loads((folder / "site.json").read_text())
    limited = {**site, "limits": {**site["limits"], "min_rows": 10_000}}
    process = opened(folder, json.dumps(limited))
    context = Context(1, 1, {}, RecordDict(), {"config": (folder / "run.json").read_text()})

    def greet(*, begun: bool = False) -> HelloReply:
        request = Message(encode(Hello(client=0, begun=begun)), dst_node_id=1, message_type="query.hello")
        return decode(HelloReply, apps.client_app(request, context).content)

    assert greet().refusal is Refusal.few_rows
    assert this_process(context.run_config["config"]) is process
    (tmp_path / "site.yaml").write_text(json.dumps(site))
    assert greet(begun=True).refusal is Refusal.few_rows
    assert greet().refusal is Refusal.few_rows  # and reads the file
    assert greet().refusal is Refusal.none
    assert this_process(context.run_config["config"]) is not process


@pytest.mark.usefixtures("flower_task")
@pytest.mark.parametrize("in_place", [False, True], ids=["another folder", "other files"])
def test_a_site_with_another_model_than_the_servers_looks_at_it_anew_when_it_is_told_so(
    in_place: bool, finished: Run, opened: Callable[[Path, str], Process], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Only the server sees it: the site itself has refused nothing."""
    folder, other = finished("fl.rounds=1"), save_tiny_model(tmp_path / "other", "llama", seed=1)
    site = json.loads((folder / "site.json").read_text())
    opened(folder, json.dumps({**site, "model": {**site["model"], "name": str(other)}}))
    text = (folder / "run.json").read_text()
    context = Context(1, 1, {}, RecordDict(), {"config": text})

    def digest(why: str, *, begun: bool = False) -> str:
        request = Message(encode(Hello(client=0, begun=begun, why=why)), dst_node_id=1, message_type="query.hello")
        return decode(HelloReply, apps.client_app(request, context).content).base_digest

    agreed = json.loads(text)["base"]["weights_digest"]
    wrong = digest("")
    assert wrong != agreed
    if in_place:
        shutil.rmtree(other)
        shutil.copytree(tiny_model_dir, other)
    else:
        (tmp_path / "site.yaml").write_text(json.dumps(site))

    assert digest("") == digest("its base weights must be the server's", begun=True) == wrong
    assert digest("its base weights must be the server's") == agreed


def test_a_run_that_was_launched_in_this_process_stays_open(overrides: Overrides, tmp_path: Path) -> None:
    process = open_run(load(overrides("fl.rounds=1")), tmp_path)
    text = keep_process(process)

    read_anew()

    assert this_process(text, flower_run=7) is process
    forget_process()


@pytest.mark.parametrize(
    ("trainer", "site", "message"),
    [
        ("meerkat", "model: {quantization: int8}", r"model\.quantization must be none where the model's own weights"),
        ("mezo", "model: {dtype: bfloat16}", r"model\.dtype must be float32 in this run of trainer=mezo"),
        ("meerkat", "model: {tokens_per_batch: 8}", r"model\.tokens_per_batch must be >= task\.max_length"),
        ("meerkat", "device: gpu", r"device must be auto, cpu, cuda"),
    ],
)
def test_a_site_that_cannot_take_part_is_refused_by_the_rule(
    trainer: str, site: str, message: str, finished: Run, opened: Callable[[Path, str], Process], data_dir: Path
) -> None:
    folder = finished("fl.rounds=1", f"trainer={trainer}")

    with pytest.raises(ConfigError, match=message):
        opened(folder, f"data: {{path: {data_dir}}}\n{site}\n")


def test_a_process_without_a_site_file_says_what_is_missing(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished("fl.rounds=1")
    forget_process()  # what another test has left
    monkeypatch.delenv("FEDZO_SITE", raising=False)

    with pytest.raises(ConfigError, match="FEDZO_SITE must name the file with this site's configuration"):
        this_process((folder / "run.json").read_text())


def test_a_run_does_not_go_on_with_another_model(overrides: Overrides, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    config = load([*overrides("fl.rounds=1"), f"model.name={tmp_path / 'model'}"])
    start_run(config, tmp_path / "run", overrides=[])
    shutil.rmtree(tmp_path / "model")
    save_tiny_model(tmp_path / "model", "llama", seed=1)

    with pytest.raises(ConfigError, match=r"the model's weights must have the SHA-256 .* with which the run began"):
        resume_run(tmp_path / "run")


def test_a_run_does_not_go_on_with_weights_that_are_computed_with_in_another_way(
    overrides: Overrides, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    start_run(load([*overrides("fl.rounds=1"), f"model.name={model}"]), tmp_path / "run", overrides=[])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))

    with pytest.raises(ConfigError, match=r"the model's config\.json must have the SHA-256"):
        resume_run(tmp_path / "run")


def test_a_run_that_was_killed_before_its_agreement_begins_with_resume(
    finished: Run, tmp_path: Path, lines: Lines
) -> None:
    whole = finished("fl.rounds=1")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(whole / "config.json", begun)

    with pytest.raises(RunFolderError, match=r"no run\.json.*`fedzo resume .*begun` begins it"):
        replay_run(begun)
    resume_run(begun)

    assert lines(begun, "public.jsonl") == lines(whole, "public.jsonl")


def test_a_start_that_came_to_nothing_leaves_nothing_to_the_next(
    overrides: Overrides, run: Run, tmp_path: Path, lines: Lines
) -> None:
    """The first start chooses a random mask and is refused then, since that has no gradient for GradIP."""
    folder, settings = tmp_path / "again", ["step_policy=vpcs", "fl.local_steps=2", "fl.rounds=1"]
    folder.mkdir()
    config = load(overrides("trainer.selector=random", *settings))
    config.step_policy.statistic = Statistic.gradip  # past the rules, as a plugin's trait may be wrong
    with pytest.raises(ConfigError, match="gradient"):
        start_run(config, folder, overrides=[])
    assert (folder / "mask.safetensors").exists()

    start_run(load(overrides(*settings)), folder, overrides=[])

    assert lines(folder, "public.jsonl") == lines(run(*settings), "public.jsonl")


def test_a_folder_of_an_older_version_is_refused_for_its_version(finished: Run) -> None:
    folder = finished("fl.rounds=1")
    plain = json.loads((folder / "config.json").read_text())
    del plain["version"]
    (folder / "config.json").write_text(json.dumps(plain))
    (folder / "run.json").unlink()

    for use in (replay_run, resume_run):
        with pytest.raises(ConfigError, match=r"must be of version 2, got none, so that"):
            use(folder)


@pytest.mark.parametrize(
    ("trainer", "changed"),
    [
        ("lora", "model.norm.weight"),
        ("meerkat", "model.norm.weight"),
        ("tables", "model.norm.weight"),
        ("tables", "model.layers.1.mlp.down_proj.codes"),
    ],
)
def test_no_model_is_rebuilt_on_another_base(
    trainer: str, changed: str, overrides: Overrides, save_model_for: Callable[..., Path], tmp_path: Path
) -> None:
    """An adapter's values have the digest of the log on every base, and so has what differs elsewhere alone."""
    save_model_for(trainer, tmp_path / "model")
    config = load([*overrides("fl.rounds=1", f"trainer={trainer}"), f"model.name={tmp_path / 'model'}"])
    start_run(config, tmp_path / "run", overrides=[])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[changed][0] += 1  # not trained
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})

    for use in (replay_run, partial(export_run, out=tmp_path / "out"), partial(evaluate_run, split="test")):
        with pytest.raises(ConfigError, match=r"the model's weights must have the SHA-256 .* with which the run began"):
            use(tmp_path / "run")


def test_a_folder_that_cannot_be_written_says_so(finished: Run) -> None:
    folder = finished("fl.rounds=1")
    (folder / "site.json").unlink()
    (folder / "site.json").mkdir()

    with pytest.raises(RunFolderError, match=r"site\.json: it must be a regular file, but is none\. Restore"):
        resume_run(folder)


def test_a_file_that_cannot_be_written_is_named_and_a_link_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("{}")
    (tmp_path / "site.json").symlink_to(tmp_path / "outside")

    with pytest.raises(RunFolderError, match=r"/site\.json: it must lie in its folder itself, got a link to"):
        write_whole(tmp_path / "site.json", "[]")
    with pytest.raises(RunFolderError, match=r"outside: site\.json must be writable, got 'Not a directory'\. Choose"):
        write_whole(tmp_path / "outside" / "site.json", "[]")

    assert (tmp_path / "outside").read_text() == "{}"


@pytest.mark.parametrize("steps", [1, 2])
def test_losses_that_a_site_keeps_are_in_no_reply_and_the_run_is_the_same(
    run: Run, lines: Lines, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of every reply are searched for the losses that the same run tells without the limit."""
    replies: list[Any] = []
    monkeypatch.setattr(apps, "encode", lambda message: [replies.append(message), encode(message)][1])
    settings = (f"fl.local_steps={steps}", "fl.rounds=2", "partition.holdout=0.25")
    told = run(*settings)
    of_steps = [reply.loss for reply in replies if isinstance(reply, ScalarReply)]
    losses = [data[at : at + 4] for data in of_steps for at in range(0, len(data), 4)]
    scores = [json.loads(reply.scores)["answers"] for reply in replies if isinstance(reply, EvaluateReply)]
    replies.clear()
    limits, site = SiteLimitsConfig(answers=["accuracy"], several_clients=True), LaunchConfig.site
    monkeypatch.setattr(LaunchConfig, "site", lambda self: replace(site(self), limits=limits))

    kept = run(*settings)

    sent = [value for reply in replies for value in vars_of(reply) if isinstance(value, str | bytes)]
    sent_bytes = b"\n".join(value.encode() if isinstance(value, str) else value for value in sent)
    assert (len(losses), len(scores)) == (4 * 2 * steps, 4)
    assert any(str(score["value"]).encode() in sent_bytes for score in scores)  # the search finds what did leave
    assert [loss for loss in losses if loss in sent_bytes] == []
    assert [score["loss"] for score in scores if str(score["loss"]).encode() in sent_bytes] == []
    chains = [[line["chain"] for line in lines(folder, "public.jsonl")] for folder in (told, kept)]
    assert chains[0] == chains[1]
    metrics = lines(kept, "metrics.jsonl")
    assert [line["loss"] for line in metrics if line["kind"] == "round"] == [None, None]
    (score,) = [line for line in metrics if line["kind"] == "federated_score"]
    assert score["loss"] is None
    assert score["value"] == pytest.approx(np.mean([each["value"] for each in scores]))  # of 4 rows each


def vars_of(message: Any) -> list[Any]:
    return [getattr(message, field.name) for field in fields(message)]


def test_a_site_sends_vectors_and_the_losses_with_them_only_where_its_file_allows_both(
    run: Run, opened: Callable[[Path, str], Process], tiny_model_dir: Path, data_dir: Path
) -> None:
    folder = run("fl.rounds=1", "estimator=backprop", "trainer=lora")
    site = f"device: cpu\nthreads: 1\nmodel: {{name: {tiny_model_dir}}}\ndata: {{path: {data_dir}}}\n"

    with pytest.raises(SiteError, match="refusal 22, "):
        opened(folder, site)
    with pytest.raises(SiteError, match="refusal 21, "):
        opened(folder, f"{site}limits: {{vectors: true, answers: [accuracy]}}\n")
    assert opened(folder, f"{site}limits: {{vectors: true}}\n").peer.site.limits.vectors


def test_clients_in_processes_of_their_own_find_a_folder_for_their_log(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def build(config: object, *, num_clients: int, run_dir: Path, run_json: str) -> None:
        seen.append(Path(os.environ["FEDZO_SITE_LOG"]))
        assert seen[0].parent.is_dir()

    monkeypatch.setattr("fedzo.commands.train.RUNTIMES.build", build)
    folder = run("runtime=ray")

    assert seen == [folder / "logs" / "clients.log"]


def test_what_clients_in_processes_of_their_own_failed_at_is_told_once_and_without_its_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["registering as client 0", "client 0: its disk is full", "client 1: no rows", "client 0: its disk is full"]

    def build(config: object, *, num_clients: int, run_dir: Path, run_json: str) -> None:
        dated = [f"2026-01-01 09:00:0{second},125 {line}\n" for second, line in enumerate(lines)]
        Path(os.environ["FEDZO_SITE_LOG"]).write_text("".join([*dated, "Traceback (most recent call last):\n"]))

    monkeypatch.setattr("fedzo.commands.train.RUNTIMES.build", build)
    log = run("runtime=ray") / "logs" / "clients.log"

    told = [record.getMessage() for record in caplog.records if str(log) in record.getMessage()]
    assert told == [f"client 0: its disk is full ({log})", f"client 1: no rows ({log})"]


@pytest.mark.parametrize(
    "trainers",
    [("mezo", "meerkat", "lora", "prompt", "meerkat"), ("tables", "prompt", "tables", "prompt")],
    ids=" ".join,
)
def test_a_site_loads_its_model_once_and_each_run_begins_with_the_base(
    trainers: tuple[str, ...],
    run: Run,
    opened: Callable[[Path, str], Process],
    save_model_for: Callable[..., Path],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are trained, a mask, an adapter, tables, virtual tokens: what one run left is not the next one's."""
    loads = []

    def counted(*of: Any) -> LoadedModel:
        loads.append(of)
        return open_model(*of)

    monkeypatch.setattr(site_model, "open_model", counted)
    model = save_model_for(trainers[0], tmp_path / "model")
    folders = [run(f"model={model}", "fl.rounds=2", "task.max_length=64", f"trainer={each}") for each in trainers]
    site = f"device: cpu\nthreads: 1\nmodel: {{name: {tmp_path / 'model'}}}\ndata: {{path: {data_dir}}}\n"
    base = parameters_digest(load_model(ModelConfig(name=str(model))).model.named_parameters())

    for folder in folders:
        peer = opened(folder, site).peer
        assert parameters_digest(peer.loaded.model.named_parameters()) == base
        log, artifact = RunLog(folder), ArtifactStore(folder / ARTIFACTS).find(peer.config.artifact)
        assert artifact is not None
        replica = peer.workspace(artifact).replica
        replica.advance(log.records)
        replica.verify(log.public[-1])  # it has the trained values of the run
    assert len(loads) == 1

    save_model_for(trainers[0], model)  # the same once more, but who knows
    opened(folders[0], site)
    assert len(loads) == 2


def test_where_memory_is_short_a_model_that_was_let_go_is_gone_before_the_next_is_read(
    run: Run, weights_at_reads: list[int]
) -> None:
    """Between two runs: a run and its model are in reference cycles, which Python seeks now and then."""
    for seed in (1, 2):
        run("trainer=mezo", "fl.rounds=1", f"seed={seed}")

    assert weights_at_reads == [0, 0]


@pytest.mark.parametrize("trainer", ["meerkat", "mezo", "lora"])
def test_what_a_run_took_beside_the_model_is_gone_when_the_next_one_begins(
    trainer: str,
    run: Run,
    opened: Callable[[Path, str], Process],
    tiny_model_dir: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A warm site keeps its model. It measures what is free, and Python seeks cycles now and then only."""
    folders = [run("fl.rounds=1", f"trainer={trainer}", f"seed={seed}") for seed in (1, 2)]
    site = f"device: cpu\nthreads: 1\nmodel: {{name: {tiny_model_dir}}}\ndata: {{path: {data_dir}}}\n"
    monkeypatch.setenv(SITE_ARTIFACTS_ENV, str(folders[0] / ARTIFACTS))
    gc.disable()
    try:
        process = opened(folders[0], site)
        worker, artifact = process.client.worker, process.peer.config.artifact
        asked = TrainRequest(
            client=0, config_hash=worker.config_hash, space_id=artifact, chain=EMPTY_CHAIN.hex(), steps=1
        )
        worker.train(asked)
        assert process.peer.built is not None
        space, model = weakref.ref(process.peer.built.space), process.peer.loaded.model
        del process, worker

        assert opened(folders[1], site).peer.loaded.model is model
        assert space() is None
    finally:
        gc.enable()


def test_what_a_run_took_is_gone_when_it_is_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the jobs of a sweep."""
    make, spaces = Peer.workspace, []

    def made(self: Peer, *given: Any, **how: Any) -> Any:
        workspace = make(self, *given, **how)
        spaces.append(weakref.ref(workspace.replica.space))
        return workspace

    monkeypatch.setattr(Peer, "workspace", made)
    gc.disable()
    try:
        run("fl.rounds=1")
        assert {space() for space in spaces} == {None}
    finally:
        gc.enable()


def test_a_site_loads_its_model_anew_where_a_file_beside_the_weights_has_changed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    site, model = SiteConfig(model=ModelConfig(name=str(folder)), device="cpu", threads=1), SiteModel()
    first = model.open(site, 16)
    assert model.open(site, 16).model is first.model

    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    second = model.open(site, 16)

    assert second.model is not first.model
    assert second.tokenizer_digest != first.tokenizer_digest


def test_a_site_whose_gpu_is_busy_when_it_starts_tells_the_run_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever keeps its process would start it again and again, and the server would not hear why it says nothing."""
    busy = "CUDA error: all CUDA-capable devices are busy or unavailable"

    def refused(site: SiteConfig, max_length: int) -> LoadedModel:
        raise RuntimeError(busy)

    folder = save_tiny_model(tmp_path / "model")
    site, model = SiteConfig(model=ModelConfig(name=str(folder)), device="cpu", threads=1), SiteModel()
    with monkeypatch.context() as patch:
        patch.setattr(site_model, "open_model", refused)

        model.load_ahead(site)

        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("ERROR", busy)]
        with pytest.raises(RuntimeError, match=busy):
            model.open(site, 16)
    assert model.open(site, 16).base_digest  # it is free again


def unlike(model: Any) -> dict[str, Callable[[], object]]:
    """Ways to make another model of one, by what is changed."""
    norm, layer = model.model.norm, model.model.layers[0]
    wide = layer.mlp.up_proj.weight
    return {
        "nothing": lambda: None,
        "a bit of a weight": lambda: norm.weight.data[:1].add_(1e-6),
        "a buffer": lambda: model.model.rotary_emb.inv_freq.mul_(0.5),
        "what a layer remembers": lambda: setattr(model.model.rotary_emb, "max_seq_len_cached", 7),
        "what a layer has": lambda: setattr(layer, "found", object()),
        "a hook": lambda: norm.register_forward_hook(lambda *_: None),
        "how a weight lies": lambda: setattr(wide, "data", wide.data.t().contiguous().t()),
        "its files": lambda: Path("/no/such/file").read_bytes(),
    }


@pytest.mark.parametrize("changed", [*unlike(tiny_model())])
def test_a_site_keeps_its_model_where_a_run_has_left_it_as_it_was(changed: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    site, model = SiteConfig(model=ModelConfig(name=str(folder)), device="cpu", threads=1), SiteModel()
    first = model.open(site, 16)
    model.lend()
    peer: Any = SimpleNamespace(loaded=first, reset=unlike(first.model)[changed])

    model.take_back(peer)

    assert (model.open(site, 16).model is first.model) == (changed == "nothing")


@pytest.mark.parametrize(("trainer", "resets"), [(MezoConfig(), []), (LoraTrainerConfig(), ["reset"])])
def test_no_second_model_is_read_to_undo_what_a_run_has_made_of_the_first(
    trainer: Any, resets: list[str], tmp_path: Path
) -> None:
    """Of files that cannot be read weight by weight, such as GGUF: the next run reads them in place of the model."""
    folder = save_tiny_model(tmp_path / "model")
    site, model = SiteConfig(model=ModelConfig(name=str(folder)), device="cpu", threads=1), SiteModel()
    loaded, seen = replace(model.open(site, 16), reads_whole=True), list[str]()
    model.lend()
    peer: Any = SimpleNamespace(
        loaded=loaded, reset=lambda: seen.append("reset"), config=SimpleNamespace(trainer=trainer)
    )

    model.take_back(peer)

    assert seen == resets
    assert (model.open(site, 16).model is loaded.model) == bool(resets)


def test_each_run_on_a_kept_model_has_in_its_log_what_was_said_when_it_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But what is said of the run's own texts, each time anew."""
    log = logging.getLogger("fedzo.models.load")

    def check_length(model: object, max_length: int, *, name: str) -> None:
        log.warning("texts of %d tokens", max_length)

    def opened(site: SiteConfig, max_length: int) -> LoadedModel:
        log.warning("its %s is odd", "head")
        check_length(None, max_length, name="")
        return open_model(site, max_length)

    monkeypatch.setattr(site_model, "open_model", opened)
    monkeypatch.setattr(site_model, "check_length", check_length)
    folder = save_tiny_model(tmp_path / "model")
    site, model = SiteConfig(model=ModelConfig(name=str(folder)), device="cpu", threads=1), SiteModel()
    for max_length in (16, 8):
        caplog.clear()
        model.open(site, max_length)
        said = sorted(record.getMessage() for record in caplog.records if record.name == log.name)
        assert said == ["its head is odd", f"texts of {max_length} tokens"]
