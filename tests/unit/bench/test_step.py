"""``fedzo bench step`` on a tiny model: what is measured is what is said."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedzo.bench.step
from fedzo.bench.measure import measure_peak_bytes, resident_bytes
from fedzo.bench.shapes import SHAPES, random_model
from fedzo.bench.step import (
    BARE,
    BASE,
    DEFAULT,
    DENSE,
    EAGER,
    FIRST_ORDER,
    OURS,
    WALK,
    Bench,
    _device_name,
    bench_step,
    finish,
    open_bench,
    peak_bytes,
)
from fedzo.cli import main
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.models.adapters import base_model
from fedzo.models.lower_layers import LowerLayers
from fedzo.models.scoring import example_losses
from fedzo.models.sketched.layers import make_dense
from fedzo.sketch import SketchLinear
from fedzo.testing.tiny_models import save_tiny_model, save_tiny_sketch


@pytest.fixture(autouse=True)
def default_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same contestants on every machine."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr("fedzo.run.peer.choose_product", lambda device: False)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("trainer", ["meerkat", "mezo"])
def test_every_contestant_is_timed_and_leaves_the_model_as_it_was(folder: Path, trainer: str) -> None:
    config = load([f"model={folder}", f"trainer={trainer}", "device=cpu"])
    bench = open_bench(config, shape=None, rows=3, tokens=5)
    before = bench.space.values()
    counter = bench.loaded.counter
    spent = {}
    for name, work in bench.contestants().items():
        start = counter.num_forwards
        work()
        spent[name] = counter.num_forwards - start

    result = bench_step(bench, repeats=2, on_repeat=lambda done, total: None)

    assert spent == {BARE: 2, OURS: 2, WALK: 2, FIRST_ORDER: 0}
    assert [figure["name"] for figure in result["figures"]] == [BARE, OURS, WALK, FIRST_ORDER]
    assert all(figure["median_s"] > 0 for figure in result["figures"])
    assert result["figures"][0]["ratio"] == 1
    assert (result["rows"], result["tokens"], result["space_size"]) == (3, 5, bench.space.size)
    assert result["environment"]["device"] == "cpu"
    assert np.abs(bench.space.values() - before).max() < 1e-6  # the walk does not come back to the same bits


def test_rows_that_are_kept_are_there_in_every_timed_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that trains all weights would have them run anew each time."""
    words = ["trainer=lora", "trainer.first_layer=1", "model.lower_layers_cache_mb=1", "device=cpu"]
    bench = open_bench(load([f"model={folder}", *words]), shape=None, rows=2, tokens=4)
    rows: list[int] = []
    run = LowerLayers.run

    def counted(lower: LowerLayers, ids: torch.Tensor) -> Any:
        rows.append(len(ids))
        return run(lower, ids)

    monkeypatch.setattr(LowerLayers, "run", counted)

    result = bench_step(bench, repeats=2, on_repeat=lambda done, total: None)

    assert [figure["name"] for figure in result["figures"]] == [BARE, BASE, OURS]
    assert rows == [2]


def test_beside_a_sketch_stand_a_dense_model_that_computes_the_same_and_no_dense_step(tmp_path: Path) -> None:
    config = load([f"model={save_tiny_sketch(tmp_path / 'sketch')}", "trainer=tables", "device=cpu"])
    bench = open_bench(config, shape=None, rows=3, tokens=5)
    before, counter, loss = bench.space.values(), bench.loaded.counter, bench.loss()
    contestants, spent = bench.contestants(), {}
    layers: list[list[type]] = []
    for name, work in contestants.items():
        start = counter.num_forwards
        work()
        spent[name] = counter.num_forwards - start
        layers.append([type(each) for each in bench.loaded.model.modules()])

    assert spent == {BARE: 2, DENSE: 2, OURS: 2}
    assert layers[0] == layers[1] == layers[2]
    assert SketchLinear in layers[0]
    assert np.abs(bench.space.values() - before).max() < 1e-6
    bench.space.load(before)
    make_dense(bench.loaded.model)
    assert bench.loss() == loss


@pytest.mark.slow
def test_with_a_compiled_model_the_same_forwards_without_the_compiler_are_timed_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, not translated
    config = load([f"model={folder}", "trainer=lora", "model.compile=true", "device=cpu"])
    bench = open_bench(config, shape=None, rows=3, tokens=5)
    counter = bench.loaded.counter
    contestants, spent = bench.contestants(), {}
    for name in (BARE, BASE, EAGER, OURS):
        before = counter.num_forwards, counter.num_tokens
        contestants[name]()
        spent[name] = counter.num_forwards - before[0], counter.num_tokens - before[1]

    assert list(contestants) == [BARE, BASE, EAGER, OURS, WALK, FIRST_ORDER]
    assert spent == {BARE: (2, 2 * 3 * 6), BASE: (2, 2 * 3 * 6), EAGER: (2, 2 * 3 * 5), OURS: (2, 2 * 3 * 6)}


@pytest.mark.parametrize("trainer", ["lora", "prefix", "prompt"])
def test_with_an_adapter_the_base_models_forwards_are_timed_beside_it(folder: Path, trainer: str) -> None:
    bench = open_bench(load([f"model={folder}", f"trainer={trainer}", "device=cpu"]), shape=None, rows=2, tokens=4)
    plain = open_bench(load([f"model={folder}", "trainer=meerkat", "device=cpu"]), shape=None, rows=2, tokens=4)
    bench.space.load(bench.space.values() + np.float32(0.5))
    wrapped, requires = bench.loss(), [p.requires_grad for p in bench.loaded.model.parameters()]

    with base_model(bench.loaded.model):
        base = bench.loss()
    bench.contestants()[BASE]()

    assert base == plain.loss() != wrapped == bench.loss()
    assert [p.requires_grad for p in bench.loaded.model.parameters()] == requires
    assert BASE not in plain.contestants()


def test_beside_a_sketch_are_the_forwards_of_the_dense_model_that_it_decodes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no step that trains dense weights."""
    config = load([f"model={save_tiny_sketch(tmp_path, 'gpt2')}", "trainer=prompt", "device=cpu"])
    bench = open_bench(config, shape=None, rows=3, tokens=5)
    model, counter = bench.loaded.model, bench.loaded.counter
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SketchLinear)}
    losses: list[float] = []

    def told(*args: Any, **options: Any) -> Any:
        found = example_losses(*args, **options)
        losses.append(float(found.mean()))
        return found

    monkeypatch.setattr("fedzo.bench.step.example_losses", told)
    contestants, before = bench.contestants(), counter.num_forwards
    contestants[BARE]()
    contestants[DENSE]()
    spent = counter.num_forwards - before
    for layer in layers.values():
        layer.tables.zero_()  # of which the twin knows nothing any more
    contestants[DENSE]()
    contestants[BARE]()

    assert list(contestants) == [BARE, DENSE, BASE, OURS]
    assert spent == 4
    assert len(layers) == 8
    assert losses[:2] * 3 == losses[:6]
    assert losses[6] == losses[7] != losses[0]
    assert {name: model.get_submodule(name) for name in layers} == layers


@pytest.mark.parametrize("trainer", ["prompt", "tables"])
def test_forwards_of_a_sketch_and_of_its_dense_twin_are_weighed_without_a_space_and_without_codes(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load([f"model={save_tiny_sketch(tmp_path)}", f"trainer={trainer}", "device=cpu"])
    layers: list[weakref.ref[torch.nn.Module]] = []
    spaces: list[weakref.ref[Any]] = []
    held: list[tuple[int, int]] = []

    def opened(*args: Any, **options: Any) -> Bench:
        bench = open_bench(*args, **options)
        layers[:] = [weakref.ref(each) for each in bench.loaded.model.modules() if isinstance(each, SketchLinear)]
        spaces[:] = [weakref.ref(bench.space)]
        return bench

    def measure(work: Callable[[], object], device: torch.device) -> int:
        work()
        held.append((sum(layer() is not None for layer in layers), sum(space() is not None for space in spaces)))
        return resident_bytes()

    monkeypatch.setattr("fedzo.bench.step.open_bench", opened)
    monkeypatch.setattr("fedzo.bench.step.measure_peak_bytes", measure)
    peaks = [peak_bytes(config, name, shape=None, rows=2, tokens=4) for name in (BARE, DENSE, OURS)]

    assert held == [(14, 0), (0, 0), (14, 1)]
    assert None not in peaks


def test_forwards_with_pytorchs_default_products_are_timed_beside_those_with_chosen_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(load([f"model={folder}", "device=cpu"]), shape=None, rows=2, tokens=4)
    torch.set_float32_matmul_precision("medium")
    contestants, seen, counter = bench.contestants(), [], bench.loaded.counter
    run, before = fedzo.bench.step.example_losses, counter.num_forwards

    def told(*args: Any, **options: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return run(*args, **options)

    monkeypatch.setattr("fedzo.bench.step.example_losses", told)
    contestants[DEFAULT]()
    contestants[BARE]()

    assert seen == ["highest", "highest", "medium", "medium"]
    assert counter.num_forwards - before == 4


def test_bare_forwards_are_as_many_as_the_estimator_takes(folder: Path) -> None:
    config = load([f"model={folder}", "device=cpu", "estimator=one_sided", "estimator.num_probes=3"])
    bench = open_bench(config, shape=None, rows=2, tokens=4)
    before = bench.loaded.counter.num_forwards

    bench.contestants()[BARE]()

    assert bench.loaded.counter.num_forwards - before == 4


def test_forwards_through_graphs_are_timed_and_weighed_when_their_graphs_run_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, graphs_on_cpu: list[str]
) -> None:
    """The lower blocks' graph, which runs once a step, is the last to get there."""
    compared: list[int] = []
    done: dict[int, int] = {}
    weighed: list[int] = []

    def measure(work: Callable[[], object], device: torch.device) -> int:
        before = len(compared)
        work()
        weighed.append(len(compared) - before)
        return resident_bytes()

    monkeypatch.setattr("fedzo.models.captured._compare", lambda ours, own: compared.append(1))
    monkeypatch.setattr("fedzo.bench.step.measure_peak_bytes", measure)
    config = load([f"model={folder}", "trainer=lora", "trainer.first_layer=1", "model.cuda_graphs=true", "device=cpu"])

    bench = open_bench(config, shape=None, rows=2, tokens=4)
    bench_step(
        bench,
        repeats=2,
        on_repeat=lambda number, total: done.update({number: len(compared)}),
    )
    assert done[0] == done[2] > 0
    for name in (BARE, OURS):
        peak_bytes(config, name, shape=None, rows=2, tokens=4)
    assert weighed == [0, 0]
    graphs_on_cpu.clear()
    peak_bytes(config, FIRST_ORDER, shape=None, rows=2, tokens=4)
    assert not graphs_on_cpu, "others' graphs take memory that the step does not"


def test_work_ends_when_its_device_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = [torch.device(name) for name in ("cpu", "mps", "cuda:1")]

    for device in devices:
        finish(lambda: None, device)

    assert waited == devices[1:]
    assert [_device_name(device) for device in devices[:2]] == [torch.backends.cpu.get_cpu_capability(), "mps"]


def test_peak_sees_a_tensor_that_is_gone_again() -> None:
    before = resident_bytes()

    peak = measure_peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8).sum(), torch.device("cpu"))

    if peak is None:
        pytest.skip("this machine does not tell a process's peak memory")
    assert peak - before > 60 << 20


def test_shapes_are_those_that_were_published() -> None:
    """Counts of the models' cards; on the meta device, so that nothing is allocated."""
    counts = {
        "opt-125m": 125_239_296,
        "opt-1.3b": 1_315_758_080,
        "llama-3.2-1b": 1_235_814_400,
        "llama-2-7b": 6_738_415_616,
    }
    from transformers import AutoModelForCausalLM

    for name, count in counts.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(SHAPES[name]())
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--shape must be one of .*opt-125m.*, got 'opt'"):
        random_model("opt", device="cpu", dtype=torch.float32)


def test_the_command_prints_a_table_and_writes_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bench.json"
    argv = ["bench", "step", f"model={folder}", "--rows", "2", "--tokens", "4", "--repeats", "1", "--no-memory"]
    monkeypatch.setattr("sys.argv", ["fedzo", *argv])

    assert main([*argv, "--out", str(out)]) == 0

    assert "MeZO walk" in capsys.readouterr().out
    assert json.loads(out.read_text())["repeats"] == 1


def test_a_model_that_is_weighed_is_the_only_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the child's may not fit beside the one that was timed."""
    out, models, alive, emptied = tmp_path / "bench.json", [], [], []

    def opened(*args: Any, **options: Any) -> Bench:
        bench = open_bench(*args, **options)
        models.append(weakref.ref(bench.loaded.model))
        return bench

    def peak(name: str) -> int:
        alive.append(models[0]() is not None)
        assert emptied == [False], "torch keeps the memory of a GPU"
        return len(name)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(models[0]() is not None))
    monkeypatch.setattr("fedzo.cli.bench.open_bench", opened)
    monkeypatch.setattr("fedzo.cli.bench._peak_in_child", peak)
    argv = ["bench", "step", f"model={folder}", "device=cpu", "--rows", "2", "--tokens", "4", "--repeats", "1"]

    assert main([*argv, "--out", str(out)]) == 0

    names = [BARE, OURS, WALK, FIRST_ORDER]
    figures = [(figure["name"], figure["peak_bytes"]) for figure in json.loads(out.read_text())["figures"]]
    assert figures == [(name, len(name)) for name in names]
    assert alive == [False] * len(names)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "nowhere/bench.json"], "--out must lie in an existing folder"),
        (["--tokens", "513"], "--tokens must be at most 512"),
        (["estimator=backprop"], "estimator must make scalars"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["bench", "step", f"model={folder}", "device=cpu", *more]) == 2
    assert message in capsys.readouterr().err
