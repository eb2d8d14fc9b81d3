"""The jobs of a sweep in one process: a model that they share is loaded once, and each is the run that it is alone."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig

from fedzo.cli import main
from fedzo.errors import NumericsError
from fedzo.models import auto_dtype
from fedzo.models.config import ModelConfig
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.run import peer, process
from fedzo.run.peer import Peer
from fedzo.zo.spaces.full import FullSpace

Run = Callable[..., Path]
Overrides = Callable[..., list[str]]
Sweep = Callable[..., list[Path]]
MOVES = ("server_optimizer.lr=1e-3", "fl.rounds=2")
SHORT = "task.max_length=64"  # virtual tokens take positions, too


@pytest.fixture
def sweep(overrides: Overrides, tmp_path: Path) -> Sweep:
    """Run a sweep in this process; returns the folders of its jobs."""

    def start(*words: str, code: int = 0) -> list[Path]:
        folder = tmp_path / "sweep"
        where = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=job${hydra:job.num}"]
        assert main(["train", "-m", *overrides(*words, *where)]) == code
        assert process._model._held is None  # nobody needs it any more
        return sorted(folder.glob("job*"))

    process.forget_process()  # what another test has left
    return start


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtype of each model that is loaded, in order."""
    made: list[str] = []

    def counted(config: ModelConfig, **how: Any) -> LoadedModel:
        made.append(str(config.dtype))
        return load_model(config, **how)

    monkeypatch.setattr(peer, "load_model", counted)
    return made


@contextmanager
def a_job_fails(number: int, error: BaseException | type[BaseException]) -> Iterator[None]:
    """Half-way in the first step that its server takes with all weights."""
    step = FullSpace.step

    def breaks(self: FullSpace, s: float, key: int) -> None:
        if HydraConfig.get().job.num == number:
            self.parameters[0].data.mul_(2)
            raise error
        step(self, s, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullSpace, "step", breaks)
        yield


def told(folder: Path) -> tuple[bytes, bytes, Any]:
    """A run's log, what its peers agreed on, and what of its metrics a repeated run tells alike."""
    metrics = [repeatable(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (folder / "public.jsonl").read_bytes(), (folder / "run.json").read_bytes(), metrics


def repeatable(value: Any) -> Any:
    """Without times, salted messages, digests keyed by the folder's secret, and what memory was free."""
    if isinstance(value, dict):
        left_out = {key for key in value if key.endswith("seconds") or key.startswith("message_")}
        left_out |= {"rows_digest", "free_bytes"}
        return {key: repeatable(inner) for key, inner in value.items() if key not in left_out}
    return [repeatable(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("trainer", ["meerkat", "mezo", "norms", "lora", "prefix", "tables"])
def test_jobs_of_one_model_load_it_once_and_each_is_the_run_that_it_is_alone(
    trainer: str, sweep: Sweep, run: Run, loads: list[str]
) -> None:
    words = (f"trainer={trainer}", "fl.local_steps=2", SHORT, *MOVES)

    jobs = sweep(*words, "seed=0,1")

    assert loads == ["float32"]
    assert [told(job) for job in jobs] == [told(run(*words, f"seed={seed}")) for seed in (0, 1)]


def test_jobs_of_one_model_hash_its_files_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedzo.models import load

    hashed, entries = [], load.stored_entries

    def counted(files: Any) -> Any:
        hashed.append(files)
        return entries(files)

    monkeypatch.setattr(load, "stored_entries", counted)

    sweep("fl.rounds=1", "seed=0,1,2")

    assert len(hashed) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_one_job_has_trained_is_not_the_next_ones(dtype: str, sweep: Sweep, run: Run, loads: list[str]) -> None:
    """All weights, an adapter, virtual tokens, norms: each on the model that the one before had."""
    trainers = ("mezo", "lora", "prompt", "norms")
    words = (f"model.dtype={dtype}", SHORT, *MOVES)

    jobs = sweep(f"trainer={','.join(trainers)}", *words)

    assert loads == [dtype]
    assert [told(job) for job in jobs] == [told(run(f"trainer={each}", *words)) for each in trainers]


@pytest.mark.parametrize("error", [NumericsError("not finite"), MemoryError("DefaultCPUAllocator: not enough memory")])
def test_a_job_that_fails_amid_a_step_leaves_the_next_one_right(
    error: Exception, sweep: Sweep, run: Run, loads: list[str]
) -> None:
    words = ("trainer=mezo", *MOVES)

    with a_job_fails(1, error):
        jobs = sweep(*words, "seed=0,1,2", code=1)

    assert len(loads) == 2  # the model of the job that failed is nobody's
    assert (jobs[1] / "failed.json").exists()
    assert [told(jobs[seed]) for seed in (0, 2)] == [told(run(*words, f"seed={seed}")) for seed in (0, 2)]


def test_a_sweep_that_is_interrupted_amid_a_step_goes_on_as_if_it_had_not_been(sweep: Sweep, run: Run) -> None:
    words = ("trainer=mezo", *MOVES)

    with a_job_fails(1, KeyboardInterrupt):
        sweep(*words, "seed=0,1,2", code=130)
    jobs = sweep(*words, "seed=0,1,2")

    alone = [run(*words, f"seed={seed}") for seed in range(3)]
    logs = [[(folder / "public.jsonl").read_bytes() for folder in folders] for folders in (jobs, alone)]
    assert logs[0] == logs[1]


def test_a_model_that_cannot_be_given_back_as_it_was_is_loaded_anew(
    sweep: Sweep, run: Run, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a trainer whose reset forgets a weight."""
    reset = Peer.reset

    def forgetful(self: Peer) -> None:
        reset(self)
        self.loaded.model.get_input_embeddings().weight.data.mul_(1.5)

    monkeypatch.setattr(Peer, "reset", forgetful)

    jobs = sweep(*MOVES, "seed=0,1")

    assert len(loads) == 2
    assert [told(job) for job in jobs] == [told(run(*MOVES, f"seed={seed}")) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("slowest", "loaded"), [(math.inf, ["auto", "bfloat16"] * 2), (0.0, ["auto", "bfloat16", "bfloat16"])]
)
def test_each_job_chooses_its_dtype_by_itself(
    slowest: float, loaded: list[str], sweep: Sweep, run: Run, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it takes bfloat16, the float32 model is gone; where it does not, the next one has it."""
    monkeypatch.setattr(auto_dtype, "_LARGEST_ERROR", math.inf)
    monkeypatch.setattr(auto_dtype, "_LARGEST_TIME", slowest)
    monkeypatch.setattr(peer, "rounded_products", lambda device: None)
    words = ("model.dtype=auto", "server_optimizer.lr=1e-4", "fl.rounds=2")

    jobs = sweep(*words, "seed=0,1")

    assert loads == loaded
    assert [told(job) for job in jobs] == [told(run(*words, f"seed={seed}")) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("words", "fails"), [(("model.dtype=float32,bfloat16", "seed=0,1"), False), (("seed=0,1",), True)]
)
def test_a_model_that_is_let_go_is_gone_before_the_next_is_read(
    words: tuple[str, ...], fails: bool, sweep: Sweep, weights_at_reads: list[int]
) -> None:
    """Jobs of another model, and the one after a job that failed: memory holds one model at a time."""
    with a_job_fails(0 if fails else -1, NumericsError("not finite")):
        sweep("trainer=mezo", "fl.rounds=1", *words, code=int(fails))

    assert weights_at_reads == [0, 0]


def test_what_a_job_took_beside_the_model_is_gone_when_the_next_one_begins(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It measures what is free, and Python seeks cycles now and then only."""
    make, spaces, alive = Peer.workspace, [], []

    def made(self: Peer, *given: Any, **how: Any) -> Any:
        if self._workspace is None:
            alive.append(sum(space() is not None for space in spaces))
        workspace = make(self, *given, **how)
        spaces.append(weakref.ref(workspace.replica.space))
        return workspace

    monkeypatch.setattr(Peer, "workspace", made)
    gc.disable()
    try:
        sweep("fl.rounds=1", "seed=0,1,2")
    finally:
        gc.enable()

    assert alive == [0, 0, 0]
