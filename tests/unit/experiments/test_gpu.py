"""The experiment on a GPU, without one: its pieces on tiny models, and what follows from results, or from none."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig

from fedzo.bench.shapes import SHAPES
from fedzo.bench.step import BARE, FIRST_ORDER, OURS, WALK
from fedzo.config.load import load
from fedzo.config.overrides import with_config_dir
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import load_mask, save_mask
from fedzo.testing.tiny_models import save_tiny_model
from fedzo.zo.directions_cuda import CudaDirections

FOLDER = Path(__file__).parents[3] / "experiments" / "gpu"
MODULES = ("card", "kernel_cases", "mask_cases", "step_cases", "limit_cases", "run_cases")
CELL = "SmolLM2, Meerkat, T"
WANTED = {
    "a direction of 2^28 coordinates, gaussian, float32, to nearest / a copy": 1.15,
    "a direction of 2^28 coordinates, rademacher, bfloat16, to nearest / a copy": 1.3,
    "opt-13b-mezo, fedzo step / 2 eager forwards of 64 x 64 tokens": 1.15,
    "opt-1.3b-mezo, fedzo step / 2 eager forwards of 16 x 64 tokens": 1.35,
    "opt-1.3b-mezo-captured, fedzo step / 2 captured forwards of 16 x 64 tokens": 1.55,
    "opt-1.3b-meerkat, fedzo step / 2 eager forwards of 16 x 64 tokens": 1.05,
    "opt-13b-lora, fedzo step / 2 eager forwards of 64 x 64 tokens": 1.05,
    "opt-13b-lora-captured, fedzo step / 2 captured forwards of 64 x 64 tokens": 1.05,
    "opt-1.3b-mezo, fedzo step / MeZO walk": 1.0,
    "opt-13b-lora, fedzo step / first-order step": 1.0,
    "opt-1.3b-mezo, peak memory of a step less that of 2 forwards": 1.0,
    "opt-13b-mezo, peak memory of a step less that of 2 forwards": 1.0,
    "the random mask of OPT-1.3B's shape, a billion eligible weights": 2.0,
    "Meerkat's mask of SmolLM2 on 100 windows of 256 tokens, after loading": 10.0,
    "a sensitivity mask of Llama-2-7B's shape in bfloat16 with 24 GiB, peak memory": 24.0,
    "a sensitivity mask of OPT-13B's shape in bfloat16 with 40 GiB, peak memory": 40.0,
    f"SST-2, {CELL} = 1, 8 clients: 200 rounds without start, mask and scores": 4.0,
    f"SST-2, {CELL} = 50, 8 clients: a round": 4.0,
    "AG News, SmolLM2, all weights, T = 1, 8 clients: a round": 0.3,
}
"""What the first look at a GPU asked for, and its targets for an H200."""


def tiny_opt() -> OPTConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 600}
    return OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)


def tiny_llama() -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 600}
    return LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)


def on_no_clock(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """In the place of ``medians_on_gpu``: all is done once, and takes 2 ms, or 3 ms if it is no copy."""
    for run in work.values():
        run()
    return {name: 2.0 if name == "copy" else 3.0 for name in work}


@pytest.fixture
def gpu(script: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The modules by name, with small shapes on a CPU, and a folder of their own for results and runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded: dict[str, Any] = {name: importlib.import_module(name) for name in MODULES}
    loaded["run"] = script(FOLDER / "run.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loaded["run"], "HERE", tmp_path)
    monkeypatch.setattr(loaded["run"], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(loaded["card"], "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(loaded["kernel_cases"], "COORDINATES", 1 << 12)
    monkeypatch.setattr(loaded["limit_cases"], "SIDE", 8)
    monkeypatch.setattr(loaded["limit_cases"], "COPIED", 1 << 10)
    monkeypatch.setattr(loaded["mask_cases"], "LOTS", 1 << 10)
    for name in ("kernel_cases", "limit_cases"):
        monkeypatch.setattr(loaded[name], "medians_on_gpu", on_no_clock)
    for name, config in (("opt-1.3b", tiny_opt), ("opt-13b", tiny_opt), ("llama-2-7b", tiny_llama)):
        monkeypatch.setitem(SHAPES, name, config)
    monkeypatch.setattr("fedzo.run.peer.choose_product", lambda device: False)  # the same contestants on every machine
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield loaded
    torch.set_float32_matmul_precision(before)


def measured(case: Any) -> Any:
    """What is kept of a case, as it comes out of its file."""
    return json.loads(json.dumps(case.measure()))


def named(figures: Any) -> dict[str, float]:
    return {what: value for what, value, _ in figures}


# --- the script -------------------------------------------------------------------------------------------------------


def test_without_results_every_case_tells_its_goals_and_that_nothing_was_measured(gpu: Any) -> None:
    gpu["run"].main([])

    rows = json.loads(Path("claims.json").read_text())
    told = {row["claim"]: row["target"] for row in rows}
    assert told.items() >= WANTED.items()
    assert {row["command"].split()[2] for row in rows} == set(gpu["run"].CASES)
    assert {(row["value"], row["holds"], len(row["environment"])) for row in rows} == {(None, None, 0)}


def test_on_a_machine_without_a_card_nothing_is_started(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(name: str) -> bool:
        raise AssertionError(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu["run"], "measure", started)

    gpu["run"].main(["captured", "sst2-T1", "directions"])

    assert capsys.readouterr().out == "Nothing is measured: this machine has no CUDA device.\n"
    assert [path.name for path in Path().iterdir()] == ["claims.json"]


def test_a_word_that_names_nothing_is_refused(gpu: Any) -> None:
    with pytest.raises(SystemExit, match=r"PIECE must be one of kernel, masks, .*, and CASE one of .*; got kernels"):
        gpu["run"].main(["kernels"])


def test_a_piece_goes_on_with_what_it_lacks_and_a_case_that_is_named_is_measured_again(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made, calls = gpu["run"], gpu["card"], list[str]()

    def work(name: str, *, fails: list[bool]) -> dict[str, float]:
        calls.append(name)
        if fails and fails.pop():
            raise RuntimeError("no such luck")
        return {"found": len(calls)}

    def case(name: str, *fails: bool) -> Any:
        def figures(result: Any) -> list[tuple[str, float, str]]:
            return [(f"{name} found", result["found"], "")]

        goals = {f"{name} found": made.Goal(1.0, "")}
        return made.Case(partial(work, name, fails=[*fails]), figures, goals)

    pieces = {"first": {"a": case("a", True), "b": case("b")}, "second": {"c": case("c")}}
    monkeypatch.setattr(run, "PIECES", pieces)
    monkeypatch.setattr(run, "CASES", {**pieces["first"], **pieces["second"]})
    monkeypatch.setattr(run, "environment", lambda device: {"git_commit": "d"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")

    def told() -> list[tuple[str, int | None, bool | None]]:
        return [(row["claim"], row["value"], row["holds"]) for row in json.loads(Path("claims.json").read_text())]

    with pytest.raises(SystemExit, match="not measured, see above: a"):
        run.main(["first"])
    assert "no such luck" in capsys.readouterr().err
    assert told() == [("a found", None, None), ("Card: b found", 2, False), ("c found", None, None)]

    run.main(["first"])
    run.main(["b", "first"])
    assert calls == ["a", "b", "a", "b"]
    assert told()[:2] == [("Card: a found", 3, False), ("Card: b found", 4, False)]


# --- pieces on tiny models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["directions", "update"])
def test_kernels_are_compared_with_a_copy_in_the_same_run(gpu: Any, name: str) -> None:
    case = gpu["kernel_cases"].KERNELS[name]

    found = named(case.figures(measured(case)))

    assert set(case.goals) <= set(found)
    assert {value for what, value in found.items() if "/ a copy" in what} == {1.5}
    assert len(found) == (10 if name == "directions" else 4)


def test_directions_with_their_table_in_global_memory_have_the_same_bits(
    gpu: Any, kernels: CudaDirections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu["kernel_cases"], "fused", lambda device: kernels)
    shares = kernels.shares_table
    case = gpu["kernel_cases"].KERNELS["directions-global"]

    found = named(case.figures(measured(case)))

    assert set(found) == set(case.goals)
    assert kernels.shares_table == shares, "the kernels of the process are others"


def test_the_random_mask_is_timed_for_a_billion_weights(gpu: Any) -> None:
    case = gpu["mask_cases"].MASKS["mask"]
    result = measured(case)
    (row,) = result["rows"]

    assert row["eligible"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert set(named(case.figures(result))) == set(case.goals)
    row |= {"eligible": 500_000_000, "seconds": [0.3, 0.1, 0.2]}
    assert list(named(case.figures(result)).values()) == pytest.approx([0.4])


def test_the_studys_mask_is_timed_after_loading_and_kept(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = gpu["mask_cases"]
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(made, "load", lambda words: load([*words, f"model={model}"]))
    monkeypatch.setattr(made, "STUDY_WINDOWS", 2)
    monkeypatch.setattr(made, "WINDOW", 16)
    monkeypatch.setenv("FEDZO_STUDY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="FEDZO_STUDY_DATA must name a folder with sst2, ag_news and c4, got"):
        made.study_mask()
    (tmp_path / "c4").mkdir()
    texts = [f"{number}: a text that is long enough for one window" for number in range(4)]
    (tmp_path / "c4" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    case = made.MASKS["mask-smollm2"]

    result = measured(case)

    manifest = load_mask(made.MASK).manifest
    assert (manifest["calibration_docs"], manifest["calibration_tokens"], manifest["density"]) == ("2", "32", "0.001")
    assert result["size"] == load_mask(made.MASK).size
    assert list(named(case.figures(result)).values()) == [result["seconds"]]


@pytest.mark.parametrize("shape", ["llama-2-7b", "opt-13b"])
def test_a_large_mask_tells_its_peak_and_what_one_pass_would_choose_otherwise(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    def peak(work: Callable[[], object], device: torch.device) -> int:
        work()
        return 3 << 30

    monkeypatch.setattr(gpu["mask_cases"], "measure_peak_bytes", peak)
    case = gpu["mask_cases"].LARGE_MASKS[f"mask-{shape}"]
    result = measured(case)
    compared = shape == "llama-2-7b"

    found = named(case.figures(result))

    assert set(case.goals) <= set(found)
    assert [value for what, value in found.items() if "peak" in what] == [3.0]
    assert [value for what, value in found.items() if "one pass" in what] == ([0.0] if compared else [])
    assert result["groups"] == 1


def test_weights_that_another_mask_has_not_are_counted_over_all_tensors(gpu: Any) -> None:
    def mask(**indices: list[int]) -> Mask:
        tensors = {name: torch.tensor(each) for name, each in indices.items()}
        return Mask(tensors, dict.fromkeys(tensors, (9,)), None, manifest={})

    assert gpu["mask_cases"].share_of_others(mask(a=[1, 2, 3], b=[4]), mask(a=[0, 2, 3], c=[4])) == 0.5


@pytest.mark.parametrize("name", ["opt-1.3b-mezo", "opt-13b-lora"])
def test_steps_are_those_of_the_bench_and_beside_them_stand_their_rivals(gpu: Any, name: str) -> None:
    case = gpu["step_cases"].EAGER[name]
    result = measured(case)

    found = named(case.figures(result))

    assert set(case.goals) <= set(found)
    assert (result["dtype"], result["tokens"], result["repeats"]) == ("bfloat16", 64, 7)
    assert result["rows"] == (16 if "1.3b" in name else 64)


def test_captured_steps_are_told_as_such_where_their_graphs_were_made(gpu: Any, graphs_on_cpu: list[str]) -> None:
    case = gpu["step_cases"].CAPTURED["opt-1.3b-meerkat-captured"]
    result = measured(case)

    assert set(case.goals) <= set(named(case.figures(result)))
    given_up = named(case.figures({**result, "forwards": "eager"}))
    assert not set(case.goals) & set(given_up)
    assert "opt-1.3b-meerkat-captured (eager), fedzo step / 2 eager forwards of 16 x 64 tokens" in given_up


@pytest.mark.slow
def test_compiled_forwards_stand_beside_captured_and_eager_ones(
    gpu: Any, graphs_on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, not translated
    monkeypatch.setitem(SHAPES, "opt-1.3b", tiny_llama)
    case = gpu["step_cases"].COMPILED["opt-1.3b-compiled"]

    result = measured(case)

    assert result["kinds"] == {kind: kind for kind in ("eager", "captured", "compiled")}
    assert set(case.goals) <= set(named(case.figures(result)))
    seconds = {"eager": [2.0, 4.0, 8.0], "captured": [1.0, 1.0, 1.0], "compiled": [0.5, 0.5, 2.0]}
    waits = {"eager": 3.0, "captured": 4.0, "compiled": 63.0}
    found = named(case.figures({**result, "seconds": seconds, "waits": waits}))
    assert list(found.values()) == [0.5, 0.25, 0.25, 1.0, 60.0]
    kinds = {**result["kinds"], "captured": "eager"}
    assert len(named(case.figures({**result, "kinds": kinds}))) == 2, "graphs that were given up are nobody's measure"


def test_memory_is_compared_with_the_estimate_and_counted_in_layers(gpu: Any) -> None:
    case = gpu["limit_cases"].MEMORY["memory-opt-1.3b-mezo"]
    result = measured(case)

    # two matrices and biases of 32 x 64, four of 32 x 32, two norms, in 16 bits
    assert result["layer_bytes"] == 2 * (2 * 32 * 64 + 32 + 64 + 4 * (32 * 32 + 32) + 4 * 32)
    assert result["estimate_bytes"] > 2 * result["layer_bytes"]
    assert result["kind"] == "eager"
    assert sum(result["parts"].values()) == result["estimate_bytes"]
    peaks = {BARE: 4 << 30, OURS: 5 << 30}
    told = {**result, "peak_bytes": peaks, "estimate_bytes": 6 << 30, "layer_bytes": 2 << 30}
    assert list(named(case.figures(told)).values()) == [5.0, 1.2, 0.5]
    assert set(case.goals) <= set(named(case.figures(told)))


def test_the_memory_of_graphs_is_that_of_a_steps_own(gpu: Any, graphs_on_cpu: list[str]) -> None:
    case = gpu["limit_cases"].MEMORY["memory-opt-1.3b-meerkat-captured"]
    result = measured(case)

    assert (result["kind"], set(result["peak_bytes"])) == ("captured", {OURS})
    assert result["parts"]["graphs"] > 0
    told = {**result, "peak_bytes": {OURS: 4 << 30}, "estimate_bytes": 5 << 30}
    assert list(named(case.figures(told)).values()) == [4.0, 1.25]
    assert set(case.goals) <= set(named(case.figures(told)))
    assert named(case.figures({**told, "kind": "eager"})) == {}


def test_the_roofline_is_counted_from_shapes_and_ceilings(gpu: Any) -> None:
    case = gpu["limit_cases"].ROOFLINE["roofline-opt-1.3b-mezo"]
    result = measured(case)

    matrices, attention = 2 * (4 * 32 * 32 + 2 * 32 * 64), 2 * 16 * (2 * 2 * 64 * 64 * 32)
    assert result["operations"] == 2 * matrices * 16 * 64 + attention
    assert result["operations_per_s"] == pytest.approx(2 * 8**3 / 3e-3)
    assert result["bytes_per_s"] == pytest.approx(2 * 2 * (1 << 10) / 2e-3)
    told = {"operations": 10e12, "operations_per_s": 5e12, "block_bytes": 1e12, "weight_bytes": 2e12}
    found = named(case.figures({**result, **told, "bytes_per_s": 1e12, "forwards_s": 6.0, "step_s": 24.0}))
    # 2 s of arithmetic and 1 s of reading a forward; four passes over the blocks and two over all weights
    assert found["opt-1.3b-mezo, 2 forwards / the roofline"] == 6.0 / 4.0
    assert found["opt-1.3b-mezo, fedzo step / the roofline"] == 24.0 / (4.0 + 4.0 + 4.0)
    assert set(case.goals) <= set(found)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_cells_name_settings_that_exist(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = gpu["run_cases"]
    monkeypatch.setenv("FEDZO_STUDY_DATA", str(tmp_path))
    made.RUNS.mkdir(parents=True)
    for name in ("sst2", "ag_news"):
        (tmp_path / name).mkdir()
    save_mask(Mask({"w": torch.tensor([0])}, {"w": (2,)}, None, manifest={}), made.MASK)

    def steps(*words: str) -> tuple[int, int, int]:
        config = load(with_config_dir([*made.STUDY, *words, "seed=0"], str(made.CONF)))
        assert not config.evaluation.central
        return config.fl.num_clients, config.fl.rounds, config.fl.local_steps

    assert {name: steps(*words, *made.GRAPHS) for name, words in made.CELLS.items()} == {
        "sst2-T1": (8, 200, 1),
        "sst2-T50": (8, 3, 50),
        "ag_news-T1": (8, 10, 1),
    }
    assert set(made.TITLES) == set(made.LIMITS) == set(made.CELLS)


def rounds_of(folder: Path, *, ends: list[float]) -> None:
    """Rounds of a second each that ended at these seconds of the run."""
    folder.mkdir(parents=True)
    lines = [{"kind": "round", "seconds": end, "round_seconds": 1.0} for end in ends]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_lies_between_rounds_counts_but_not_the_start_of_a_resumed_run(gpu: Any, tmp_path: Path) -> None:
    made = gpu["run_cases"]
    rounds_of(tmp_path / "run", ends=[10.0, 11.25, 12.5, 40.0, 41.25])

    seconds = made.seconds_of_rounds(tmp_path / "run")

    assert seconds == [1.25] * 5
    for name, expected in (("sst2-T1", 6.25), ("ag_news-T1", 1.25)):
        assert list(named(made.ROUNDS[name].figures({"seconds": seconds})).values()) == [expected]


def test_an_interrupted_run_goes_on_and_a_finished_one_is_made_anew(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, calls = gpu["run_cases"], list[tuple[str, ...]]()
    monkeypatch.setattr(made, "fedzo", lambda *words: calls.append(words))
    folder = tmp_path / "run"

    made.run(folder, ["a=1"])
    rounds_of(folder, ends=[1.0])
    made.run(folder, ["a=1"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "summary"}\n')
    made.run(folder, ["a=1"])

    train = ("train", "a=1", f"hydra.run.dir={folder}")
    assert calls == [train, ("resume", str(folder)), train]
    assert not folder.exists()


@pytest.mark.slow
def test_a_run_is_timed_and_its_log_replayed_without_a_card(gpu: Any, tmp_path: Path) -> None:
    made, folder = gpu["run_cases"], tmp_path / "run"
    model = save_tiny_model(tmp_path / "model")
    words = ["experiment=tiny", "trainer.selector=random", f"model.name={model}", "fl.rounds=3", "device=cpu"]

    made.run(folder, [*words, *made.STUDY[1:]])

    assert made.is_finished(folder)
    assert len(made.seconds_of_rounds(folder)) == 3
    assert min(made.seconds_of_rounds(folder)) > 0
    found = made.replay_on_cpu(folder)
    assert (found["differing"], found["rounds"], len(found["digest"])) == (0, 3, 64)
    lines = [json.loads(line) for line in (folder / "public.jsonl").read_text().splitlines()]
    lines[-1]["check"] ^= 1
    (folder / "public.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert made.replay_on_cpu(folder) == {"differing": 1, "rounds": 3, "digest": None}
    case = made.REPLAY["sst2-T1-replayed"]
    assert set(named(case.figures(found))) == set(case.goals)


# --- rows -------------------------------------------------------------------------------------------------------------


def step_result(name: str, ratios: dict[str, float], *, card: str) -> Any:
    figures = [{"name": BARE, "ratio": 1.0, "median_s": 0.5, "ratio_quartiles": [1.0, 1.0]}]
    figures += [
        {"name": each, "ratio": ratio, "median_s": ratio / 2, "ratio_quartiles": [ratio, ratio]}
        for each, ratio in ratios.items()
    ]
    told = {"figures": figures, "forwards_per_step": 2, "rows": 16 if "1.3b" in name else 64, "tokens": 64}
    return {**told, "device_name": card, "environment": {"threads": 1}}


@pytest.mark.parametrize(("card", "target"), [("NVIDIA H200", 1.15), ("NVIDIA H100 80GB HBM3", 1.25)])
def test_a_step_that_is_behind_a_rival_misses_and_a_slower_card_has_its_own_bound(
    gpu: Any, card: str, target: float
) -> None:
    name = "opt-13b-mezo"
    result = step_result(name, {OURS: 1.2, WALK: 1.6, FIRST_ORDER: 1.0}, card=card)

    rows = gpu["card"].rows_of(name, gpu["step_cases"].EAGER[name], result)

    told = {row["claim"].removeprefix(f"{card}: {name}, "): (row["value"], row["target"], row["holds"]) for row in rows}
    assert told == {
        "fedzo step / 2 eager forwards of 64 x 64 tokens": (1.2, target, target > 1.2),
        "MeZO walk / 2 eager forwards of 64 x 64 tokens": (1.6, None, True),
        "first-order step / 2 eager forwards of 64 x 64 tokens": (1.0, None, True),
        "fedzo step / MeZO walk": (0.75, 1.0, True),
        "fedzo step / first-order step": (1.2, 1.0, False),
        "2 eager forwards of 64 x 64 tokens": (0.5, None, True),
    }


def test_the_committed_results_tell_where_a_step_is_slower_than_backpropagation(gpu: Any) -> None:
    name = "opt-1.3b-mezo"
    result = json.loads((FOLDER / "results" / f"{name}.json").read_text())

    rows = gpu["card"].rows_of(name, gpu["step_cases"].EAGER[name], result)

    (row,) = [row for row in rows if row["claim"] == f"NVIDIA H200: {name}, fedzo step / first-order step"]
    assert (row["value"], row["target"], row["holds"]) == (1.081, 1.0, False)


def test_the_cases_of_a_cpu_are_never_timed_on_a_card(
    script: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: Any = script(FOLDER.parent / "bench" / "run.py")
    commands: list[list[str]] = []
    monkeypatch.setattr(made, "HERE", tmp_path)
    monkeypatch.setattr(made.subprocess, "run", lambda command, check: commands.append(command))

    made.main([])

    assert len(commands) == len(made.CASES)
    assert all("device=cpu" in command for command in commands)
