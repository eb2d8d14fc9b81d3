"""estimator=backprop: torch's gradient of a loss written once more, FedAvg of a slow twin, and a log of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from fedzo.commands.evaluate import evaluate_run
from fedzo.commands.export import export_run
from fedzo.commands.replay import replay_client, replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.run_folder import rebuild
from fedzo.commands.train import start_run
from fedzo.config.load import load
from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.data.rows import batch_rows
from fedzo.errors import ConfigError, RunFolderError
from fedzo.fl.replica import Workspace
from fedzo.fl.server.rounds import Server
from fedzo.masks.mask_file import load_mask
from fedzo.models.arithmetic import DIFFERENTIABLE
from fedzo.models.forwards import Planning
from fedzo.models.scoring import example_losses, mean_loss
from fedzo.records.log import VectorLine
from fedzo.run.process import Process
from fedzo.run.start import open_run
from fedzo.trainers import TrainerContext

Overrides = Callable[..., list[str]]
Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]
BACKPROP = "estimator=backprop"
GOLDEN = Path(__file__).with_name("first_order.json")
"""What the script that ``estimator=backprop`` replaced gave for SGD on the tiny model."""
FIRST_ORDER: dict[str, Any] = json.loads(GOLDEN.read_text())


def batch_loss(model: nn.Module, examples: Sequence[Example], *, loss: Loss) -> torch.Tensor:
    """fedzo's loss, written once more and plainly: one padded batch, all logits."""
    cells = [
        (example.prompt, answer)
        for example in examples
        for answer in (example.candidates if loss is Loss.candidates else [example.candidates[example.label]])
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in cells)
    ids = torch.zeros(len(cells), width, dtype=torch.int64)
    there = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(cells):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        there[row, : len(prompt) + len(answer)] = 1
    logits = model(input_ids=ids, attention_mask=there, use_cache=False).logits.float()
    scores = []
    for row, (prompt, answer) in enumerate(cells):
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        scores.append(-F.cross_entropy(logits[row, at], torch.tensor(answer)))
    if loss is Loss.lm:
        return -torch.stack(scores).mean()
    losses, first = [], 0
    for example in examples:
        own = torch.stack(scores[first : first + len(example.candidates)])
        first += len(example.candidates)
        losses.append(F.cross_entropy(own[None], torch.tensor([example.label])))
    return torch.stack(losses).mean()


def opened(config: Any, folder: Path) -> tuple[Process, Workspace]:
    """A process and its model with the run's space on it."""
    process = open_run(config, folder)
    texts = list
    context = TrainerContext(folder=folder, seed=config.seed, texts=texts)
    return process, process.peer.workspace(process.peer.trainer.prepare(process.peer.loaded, context).artifact)


def gradient_of(process: Process, workspace: Workspace, rows: list[Example], loss: Loss, tokens: int = 4096) -> Any:
    planning = Planning(tokens, arithmetic=DIFFERENTIABLE)
    return workspace.replica.space.gradient(  # type: ignore[attr-defined]
        lambda: example_losses(process.peer.loaded, rows, planning, loss=loss).mean()
    )


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["single tokens", "several tokens"])
@pytest.mark.parametrize("loss", ["candidates", "lm"])
@pytest.mark.parametrize("trainer", ["meerkat", "mezo"])
def test_the_gradient_is_autograd_s_of_the_loss_written_once_more(
    overrides: Overrides, tmp_path: Path, trainer: str, loss: str, answers: str
) -> None:
    words = ["task.candidates=['a','b']"] if answers == "single tokens" else []
    config = load(overrides(BACKPROP, f"trainer={trainer}", f"task.loss={loss}", *words))
    process, workspace = opened(config, tmp_path)
    rows = process.client.data(0).train[:3]
    assert {len(candidate) == 1 for row in rows for candidate in row.candidates} == {answers == "single tokens"}
    before = workspace.replica.space.digest()

    told, g = gradient_of(process, workspace, rows, config.task.loss)
    split, halves = gradient_of(process, workspace, rows, config.task.loss, tokens=40)

    assert workspace.replica.space.digest() == before
    assert told == pytest.approx(
        mean_loss(process.peer.loaded, rows, loss=config.task.loss, tokens_per_batch=4096), rel=1e-6
    )
    assert (split, halves) == (pytest.approx(told, rel=1e-5), pytest.approx(g, rel=1e-3, abs=1e-6))
    model = process.peer.loaded.model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32).double()
    batch_loss(plain, rows, loss=config.task.loss).backward()
    named = {name: parameter.grad.reshape(-1) for name, parameter in plain.named_parameters()}
    if trainer == "meerkat":
        indices = load_mask(tmp_path / "mask.safetensors").indices
        expected = torch.cat([named[name][flat] for name, flat in indices.items()])
    else:
        expected = torch.cat([named[name] for name, _ in model.named_parameters()])
    assert g.dtype == torch.float32
    assert g.numpy() == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)
    assert np.abs(g.numpy()).max() > 1e-3


@pytest.mark.parametrize("trainer", ["lora", "ia3", "prefix", "prompt", "lora over packed weights", "tables"])
def test_the_gradient_of_a_dense_space_is_the_slope_of_the_loss(
    overrides: Overrides, tmp_path: Path, trainer: str
) -> None:
    """By central differences of the loss as rounds without backpropagation measure it, in float64."""
    packed = [] if trainer != "lora over packed weights" else ["model.quantization=torchao_int8"]
    if packed:
        pytest.importorskip("torchao")
    config = load(overrides(BACKPROP, f"trainer={trainer.split()[0]}", "task.max_length=64", *packed))
    process, workspace = opened(config, tmp_path)
    space, rows = workspace.replica.space, process.client.data(1).train[:3]
    draw = np.random.default_rng(5)
    theta = space.values() + np.float32(0.02) * draw.standard_normal(space.size).astype(np.float32)  # LoRA's B is 0
    space.load(theta)

    _, g = gradient_of(process, workspace, rows, config.task.loss)

    along = g.numpy().astype(np.float64)
    along /= np.linalg.norm(along)
    found = []
    for side in (1, -1):
        space.load((theta + side * 5e-3 * along).astype(np.float32))
        found.append(mean_loss(process.peer.loaded, rows, loss=config.task.loss, tokens_per_batch=4096))
    assert (found[0] - found[1]) / 1e-2 == pytest.approx(float(np.linalg.norm(g.numpy())), rel=5e-3)


def test_a_16_bit_model_with_a_float32_master_gives_about_the_same_gradient(
    overrides: Overrides, tmp_path: Path
) -> None:
    gradients = []
    for dtype in ("float32", "bfloat16"):
        config = load(overrides(BACKPROP, f"model.dtype={dtype}"))
        process, workspace = opened(config, tmp_path)
        gradients.append(gradient_of(process, workspace, process.client.data(0).train[:3], config.task.loss)[1].numpy())

    wide, narrow = gradients
    assert narrow.dtype == np.float32
    assert 0 < np.linalg.norm(narrow - wide) < 0.1 * np.linalg.norm(wide)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_run_gives_the_numbers_that_first_order_py_gave(name: str, run: Run, lines: Lines) -> None:
    golden = FIRST_ORDER[name]

    folder = run("fl.rounds=3", "evaluation.every_rounds=1", "server_optimizer.lr=0.1", BACKPROP, *golden["settings"])

    told = lines(folder, "metrics.jsonl")
    (summary,) = [line for line in told if line["kind"] == "summary"]
    dev = [line["loss"] for line in told if line["kind"] == "score" and line["split"] == "dev"]
    (federated,) = [line for line in told if line["kind"] == "federated_score"]
    values = rebuild(folder, rounds=3).replica.space.values()
    assert dev == pytest.approx(golden["dev_losses"], abs=1e-5)
    assert summary["after"]["loss"] == pytest.approx(golden["after_loss"], abs=1e-5)
    assert summary["best_round"] == golden["best_round"]
    assert [client["loss"] for client in federated["clients"]] == pytest.approx(golden["client_losses"], abs=1e-5)
    assert values.size == golden["size"]
    assert values[:: golden["every"]] == pytest.approx(golden["final_values"], abs=1e-5)
    assert np.linalg.norm(values.astype(np.float64)) == pytest.approx(golden["final_norm"], abs=1e-5)
    assert summary["payload_up_bytes"] == golden["payload_up_bytes"]


@pytest.mark.parametrize("local", ["sgd", "adamw"])
@pytest.mark.parametrize("trainer", ["mezo", "tables"])
def test_a_run_is_fedavg_of_torch_s_own_optimizer_on_the_plain_model(
    trainer: str, local: str, overrides: Overrides, run: Run, tmp_path: Path
) -> None:
    """Two rounds of three steps on all weights or all tables, clients weighted by their rows.

    AdamW starts anew in each round.
    """
    lr = 0.02 if local == "sgd" else 1e-3
    settings = [f"trainer={trainer}", BACKPROP, f"estimator.local_optimizer={local}", f"server_optimizer.lr={lr}"]
    settings += ["fl.rounds=2", "fl.local_steps=3", "fl.num_clients=2", "partition=dirichlet", "partition.alpha=0.5"]
    settings += ["strategy=size", "strategy.size_cap=0"]
    if local == "adamw":
        settings += ["estimator.beta1=0.8", "estimator.beta2=0.9", "estimator.eps=1e-3", "estimator.weight_decay=0.1"]
    config = load(overrides(*settings))
    process = open_run(config, tmp_path)
    rows = [process.client.data(client).train for client in range(2)]
    assert len(rows[0]) != len(rows[1])
    weights = [len(own) / (len(rows[0]) + len(rows[1])) for own in rows]
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    parameters = [each for name, each in model.named_parameters() if trainer == "mezo" or name.endswith(".tables")]
    theta = nn.utils.parameters_to_vector(parameters).detach().double()
    for round_ in range(2):
        ends = torch.zeros_like(theta)
        for client, own in enumerate(rows):
            nn.utils.vector_to_parameters(theta.float(), parameters)
            optimizer = (
                torch.optim.SGD(parameters, lr=lr)
                if local == "sgd"
                else torch.optim.AdamW(parameters, lr=lr, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
            )
            for step in range(3):
                used = 3 * round_ + step
                picked = batch_rows(run_seed=0, client=client, used=used, batch_size=2, num_rows=len(own))
                optimizer.zero_grad()
                batch_loss(model, [own[row] for row in picked], loss=config.task.loss).backward()
                optimizer.step()
            ends += weights[client] * nn.utils.parameters_to_vector(parameters).detach().double()
        theta = ends

    folder = run(*settings)

    values = rebuild(folder, rounds=2).replica.space.values()
    moved = np.abs(theta.numpy() - rebuild(folder, rounds=0).replica.space.values()).max()
    assert np.abs(values - theta.numpy()).max() < 2e-3 * moved
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("extra", "share"),
    [
        (("server_optimizer.lr=0.1",), 0.95),
        (("server_optimizer.lr=0.01", "estimator.local_optimizer=adamw"), 0.6),
        (("trainer=lora", "trainer.rank=4", "server_optimizer.lr=0.2", "strategy.clients_per_round=3"), 0.85),
        (("trainer=mezo", "server_optimizer.lr=0.05", "strategy=median"), 0.7),
        (("trainer=tables", "server_optimizer.lr=1e-3", "estimator.local_optimizer=adamw"), 0.7),
    ],
    ids=["mask sgd", "mask adamw", "lora, sampled", "full, median", "tables adamw"],
)
def test_it_learns_and_counts_its_bytes(run: Run, lines: Lines, extra: tuple[str, ...], share: float) -> None:
    folder = run("fl.rounds=16", "fl.local_steps=4", "fl.batch_size=8", "evaluation.every_rounds=4", BACKPROP, *extra)

    told = lines(folder, "metrics.jsonl")
    (summary,) = [line for line in told if line["kind"] == "summary"]
    (setup,) = [line for line in told if line["kind"] == "setup"]
    rounds = [line for line in told if line["kind"] == "round"]
    assert summary["after"]["loss"] < share * summary["before"]["loss"]
    clients, vector = (3 if "strategy.clients_per_round=3" in extra else 4), 4 * setup["space_size"]
    assert [line["payload_up_bytes"] for line in rounds] == [vector * clients] * 16
    assert all(line["message_up_bytes"] > line["payload_up_bytes"] for line in rounds)
    if clients == 4:  # whoever is there each time gets each round's mean
        assert [line["payload_down_bytes"] for line in rounds] == [vector * 4] * 16
    assert {line["mean_abs_g"] for line in rounds} == {None}
    assert all(len(client["signals"]["loss"]) == 4 for line in rounds for client in line["clients"])


def test_a_step_whose_loss_is_not_finite_is_not_taken_and_a_lost_run_says_so(
    run: Run, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(BACKPROP, "server_optimizer.lr=1e30", "strategy.max_abs_g=1e30", "fl.rounds=3", "fl.local_steps=2")

    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert rounds[0]["dropped_probes"] == 4  # the second step of each client
    assert [line["dropped_probes"] for line in rounds[1:]] == [8, 8]
    assert caplog.text.count("no client had a finite loss") == 1
    digests = [line["check"] for line in lines(folder, "public.jsonl")]
    assert digests[0] == digests[1] == digests[2]


def test_clients_that_stop_early_send_what_their_steps_made(run: Run, lines: Lines) -> None:
    folder = run(BACKPROP, "fl.local_steps=3", "server_optimizer.lr=0.1", "step_policy=random", "fl.rounds=2")

    taken = [[client["steps"] for client in line["clients"]] for line in lines(folder, "audit.jsonl")]
    assert sorted(taken[0]) == [1, 3, 3, 3]
    assert taken[0] == taken[1]
    assert [[len(client["loss"]) for client in line["clients"]] for line in lines(folder, "audit.jsonl")] == taken
    positions = [client["used"] for client in lines(folder, "audit.jsonl")[1]["clients"]]
    assert positions == taken[0]


# --- the log ----------------------------------------------------------------------------------------------------------

SETTINGS = (BACKPROP, "fl.rounds=4", "fl.local_steps=2", "server_optimizer.lr=0.1", "strategy.clients_per_round=3")


def logs(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("public.jsonl", "audit.jsonl")]


def vectors(folder: Path) -> list[Path]:
    lines = [json.loads(line) for line in (folder / "public.jsonl").read_text().splitlines()]
    return [folder / "vectors" / line["vector"] for line in lines]


@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("instant", ["before the round", "after its vector was written"])
def test_a_run_that_stops_in_the_middle_and_is_resumed_ends_as_the_unbroken_one(
    finished: Run, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: str, adamw: bool
) -> None:
    from fedzo.fl import log_files

    settings = [*SETTINGS, *(["estimator.local_optimizer=adamw", "server_optimizer.lr=0.01"] if adamw else [])]
    whole, folder = finished(*settings), tmp_path / "broken"
    owner, name = (Server, "run_round") if instant == "before the round" else (log_files.OpenLog, "append")
    original = getattr(owner, name)

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not (isinstance(args[0], VectorLine) and args[0].round == 2):
            return original(self, *args, **kwargs)
        if not args and self.round != 2:
            return original(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            start_run(load(overrides(*settings)), folder, overrides=[])
    assert len((folder / "public.jsonl").read_text().splitlines()) == 2
    resume_run(folder)

    assert logs(folder) == logs(whole)
    assert [path.read_bytes() for path in vectors(folder)] == [path.read_bytes() for path in vectors(whole)]


@pytest.mark.parametrize("trainer", ["meerkat", "lora", "mezo", "tables"])
def test_replay_export_and_evaluation_rebuild_the_run(run: Run, lines: Lines, tmp_path: Path, trainer: str) -> None:
    folder = run(*SETTINGS, f"trainer={trainer}", "fl.hash_every=1")

    told = replay_run(folder)
    score = evaluate_run(folder, split="test")
    export_run(folder, tmp_path / "out")

    (summary,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "summary"]
    public = lines(folder, "public.jsonl")
    assert (told["digest"], told["chain"]) == (summary["final_digest"], public[-1]["chain"])
    assert score["answers"]["loss"] == summary["after"]["loss"]
    assert any((tmp_path / "out").iterdir())
    assert len({line["vector"] for line in public}) == 4


def test_values_and_shuffled_replies_give_the_same_log(run: Run, finished: Run) -> None:
    plain = finished(*SETTINGS)

    assert logs(run(*SETTINGS, "fl.transport=values")) == logs(plain)
    assert logs(run(*SETTINGS, "faults.shuffle_replies=true")) == logs(plain)


def test_an_absent_client_is_left_out_and_what_it_missed_is_counted_as_values(run: Run, lines: Lines) -> None:
    folder = run(BACKPROP, "fl.rounds=4", "server_optimizer.lr=0.1", "faults.absent=['1@1','1@2']")

    rounds = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    (setup,) = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "setup"]
    vector = 4 * setup["space_size"]
    assert [line["absent"] for line in rounds] == [[], [1], [1], []]
    assert [line["payload_up_bytes"] // vector for line in rounds] == [4, 3, 3, 4]
    assert [line["payload_down_bytes"] // vector for line in rounds] == [4, 3, 3, 4 + 1]  # the values once, not two
    replay_run(folder)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), r"it must hold \d+ bytes, got \d+"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
            "it must have the SHA-256 ",
        ),
    ],
    ids=["missing", "short", "a wrong bit"],
)
@pytest.mark.parametrize("command", [replay_run, resume_run])
def test_a_wrong_or_missing_vector_is_found_and_named(
    finished: Run, command: Callable[[Path], Any], damage: Callable[[Path], Any], what: str
) -> None:
    folder = finished(*SETTINGS)
    path = vectors(folder)[1]
    damage(path)

    with pytest.raises(RunFolderError, match=rf"{path}: the vector of round 1 must be there and whole: {what}"):
        command(folder)


def test_a_vector_of_another_round_does_not_pass(finished: Run) -> None:
    """The line is chained to its digest, so whoever exchanges both is found by the chain."""
    folder = finished(*SETTINGS)
    lines = (folder / "public.jsonl").read_text().splitlines()
    names = [json.loads(line)["vector"] for line in lines]
    lines[1] = lines[1].replace(names[1], names[2])
    (folder / "public.jsonl").write_text("\n".join(lines) + "\n")

    with pytest.raises(Exception, match="log, round 1: chain must be"):
        replay_run(folder)


def test_the_path_of_one_client_cannot_be_replayed(finished: Run) -> None:
    folder = finished(*SETTINGS)

    with pytest.raises(ConfigError, match="--client: the run must have clients that send scalars"):
        replay_client(folder, client=0, round=0)


def test_report_and_terminal_of_a_run_without_scalars(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from fedzo.report.html import write_report

    folder = run(*SETTINGS, "report.progress=true")
    write_report(folder)

    assert "  vectors, all clients, both ways " in capsys.readouterr().out
    drawn = {figure.stem for figure in (folder / "figures").glob("*.png")}
    assert {"loss", "score", "bytes", "local_losses"} <= drawn
    assert not drawn & {"local_steps", "abs_g"}  # they would be empty: there is no g
    text = (folder / "report.html").read_text()
    assert "payload a client, whole run" in text
    assert "Local steps per client" not in text


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["fl.directions=per_client"], r"fl\.directions must be shared for estimator=backprop"),
        (["fl.directions=pool"], r"fl\.directions must be shared for estimator=backprop"),
        (["estimator.num_probes=2"], r"estimator\.num_probes is not a setting.* another is chosen"),
        (["step_policy=cusum"], "step_policy must not read scalars g for estimator=backprop"),
        (["step_policy=vpcs", "step_policy.statistic=gradip"], "step_policy must not read scalars g"),
        (["server_optimizer=scaffold"], "server_optimizer must be one that moves the model by a vector"),
        (["server_optimizer=feddyn"], "server_optimizer must be one that moves the model by a vector"),
        (["server_optimizer=momentum"], "server_optimizer must be one that moves the model by a vector"),
        (["server_optimizer=adam"], "server_optimizer must be one that moves the model by a vector"),
        (["strategy=majority_sign"], r"strategy\.aggregation must be mean, median or trimmed_mean"),
        (["runtime=inline_batched"], r"runtime\.batch_clients must be false for estimator=backprop"),
        (["model.compile=true"], r"model\.compile must be false for estimator=backprop"),
        (["trainer=mezo", "model.dtype=bfloat16"], r"model\.dtype must be float32 for estimator=backprop"),
        (["model.quantization=int8"], r"model\.quantization must be none"),
        (["estimator.beta1=0.5"], r"estimator\.beta1 must be 0\.9 for estimator\.local_optimizer=sgd"),
        (["estimator.weight_decay=0.1"], r"estimator\.weight_decay must be 0\.0 for estimator\.local_optimizer=sgd"),
        (["estimator.local_optimizer=adamw", "estimator.beta2=1.0"], r"estimator\.beta2 must be >= 0 and < 1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(overrides: Overrides, extra: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(overrides(BACKPROP, *extra))


def test_a_space_without_a_gradient_is_refused_before_the_first_round(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedzo.zo.spaces.masked import MaskedSpace

    monkeypatch.delattr(MaskedSpace, "gradient")

    with pytest.raises(ConfigError, match="trainer=meerkat: its space must have a method gradient"):
        start_run(load(overrides(BACKPROP)), tmp_path / "run", overrides=[])
