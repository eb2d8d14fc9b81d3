"""``fedzo bench step``: our step beside its bare forwards (two, by default), MeZO's walk and a first-order step.

On a sketch: beside its bare forwards and those of the dense model that it decodes to. Where states of rows are kept
(``model.lower_layers_cache_mb``): beside its bare forwards, and timed with all of them there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedzo.bench.measure import WARM_UPS, interleaved, measure_peak_bytes, resident_bytes
from fedzo.bench.rivals import first_order_step, mezo_walk_step
from fedzo.bench.shapes import random_model
from fedzo.config.schema import LaunchConfig
from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models.adapters import base_model, has_adapter
from fedzo.models.available import TORCH_DTYPES
from fedzo.models.captured import NUM_EAGER, CapturedDecoder
from fedzo.models.checks import num_positions
from fedzo.models.config import Quantization
from fedzo.models.forwards import Planning
from fedzo.models.load import compile_loaded, load_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.lower_layers import LowerLayers, StepStates
from fedzo.models.memory import num_weights
from fedzo.models.products import default_product, product_is_chosen
from fedzo.models.scoring import example_losses
from fedzo.models.sketched.layers import decoded_layers, layers_replaced, make_dense
from fedzo.models.virtual_tokens import num_virtual_tokens
from fedzo.run.peer import check_format, faster_forwards, set_up_process
from fedzo.system import OnProgress, environment
from fedzo.trainers import TRAINERS, TrainerContext
from fedzo.zo.directions import PURPOSE_DATA, add_direction, permutation, stream_key
from fedzo.zo.estimator import Estimator, ZerothOrderConfig, build_estimator
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.dense import DenseSpace
from fedzo.zo.steps import apply_steps

BARE, BASE, OURS = "bare forwards", "base model's forwards", "fedzo step"
EAGER = "eager forwards"
DENSE = "dense twin's forwards"
DEFAULT = "default products' forwards"
WALK, FIRST_ORDER = "MeZO walk", "first-order step"
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, a space on it, and rows of random tokens to step on.

    Attributes:
        loaded: The model.
        space: What is trained.
        estimator: Turns losses into scalars.
        examples: ``rows`` prompts of ``tokens`` tokens with two single-token candidates.
        eps: Probe size of the walk.
        num_probes: Directions of our step.
        lower: The blocks that our step runs once, where it can.
    """

    loaded: LoadedModel
    space: Space
    estimator: Estimator
    examples: list[Example]
    eps: float
    num_probes: int
    lower: LowerLayers | None = None

    def loss(self, *, lower: StepStates | None = None) -> float:
        """The candidate loss: one forward."""
        tokens = 3 * sum(len(example.prompt) for example in self.examples)  # with room for what a compiled one pads
        planning = Planning(tokens, lower=lower)
        return float(example_losses(self.loaded, self.examples, planning, loss=Loss.candidates).mean())

    def contestants(self) -> dict[str, Work]:
        """Each takes a whole step; all but the forwards have lr = 1e-8, so that the weights stay as they are.

        Bare forwards are those of the model as it is trained; where that holds an adapter, the base model's are beside,
        where it is compiled or captured in graphs, the eager ones, and where ``choose_product`` made a choice, those
        with the products that PyTorch makes by itself. The first-order step is always eager.

        Beside the forwards of a sketch are those of its dense twin, which has the decoded weights. The steps that train
        all weights are left out there, since a sketch has none that could be trained. They are left out, too, where
        states of rows are kept over steps: these hold as long as nobody writes to the blocks that made them.
        """
        model, lr = self.loaded.model, 1e-8
        keys = [stream_key(0, round=0, probe=probe) for probe in range(self.num_probes)]
        ids = torch.tensor([example.prompt for example in self.examples], device=self.loaded.device)
        choices = torch.tensor([candidate[0] for candidate in self.examples[0].candidates], device=ids.device)

        def ours() -> None:
            loss_fn = partial(self.loss, lower=self.lower.of_step() if self.lower else None)
            for key, projection in zip(keys, self.estimator.estimate(self.space, loss_fn, keys), strict=True):
                apply_steps(self.space, [(projection.g, key)], lr=lr)

        def repeat(loss: Callable[[], float]) -> None:
            for _ in range(self.estimator.forwards_per_step(self.num_probes)):
                loss()

        def forwards() -> None:
            repeat(self.loss)

        def base_forwards() -> None:
            with base_model(model):
                repeat(base.loss)

        def eager_forwards() -> None:
            repeat(eager.loss)

        def dense_forwards() -> None:
            if not dense:  # made when they are wanted first, so that no other contestant's memory holds them
                dense.update(decoded_layers(model))
            with layers_replaced(model, dense):
                repeat(twin.loss)

        def default_forwards() -> None:
            with default_product():
                forwards()

        is_sketch, dense, decoder = self.loaded.is_sketch, dict[str, nn.Module](), self.loaded.decoder
        keeps_rows = self.lower is not None and self.lower.rows is not None
        eager = replace(self, loaded=replace(self.loaded, decoder=None))
        base = twin = self  # where the model runs through other modules, which graphs do not notice
        if isinstance(decoder, CapturedDecoder):
            base, twin = (replace(self, loaded=replace(self.loaded, decoder=decoder.anew())) for _ in range(2))
        train_all_weights: dict[str, Work] = {
            WALK: lambda: mezo_walk_step(model, self.loss, eps=self.eps, lr=lr, seed=0),
            FIRST_ORDER: lambda: first_order_step(model, ids, choices, lr=lr),
        }
        return {
            BARE: forwards,
            **({DENSE: dense_forwards} if is_sketch else {}),
            **({BASE: base_forwards} if has_adapter(model) else {}),
            **({EAGER: eager_forwards} if decoder else {}),
            **({DEFAULT: default_forwards} if product_is_chosen() else {}),
            OURS: ours,
            **({} if is_sketch or keeps_rows else train_all_weights),
        }


def open_bench(config: LaunchConfig, *, shape: str | None, rows: int, tokens: int) -> Bench:
    """Load the model (or make one of a published ``shape``), build the trainer's space and the rows.

    A mask that would be chosen by gradients is drawn at random instead: a step costs the same.
    """
    if config.model.quantization is not Quantization.none:
        raise ConfigError(
            f"fedzo bench step: model.quantization must be none, got {config.model.quantization}: the steps "
            "that fedzo is compared with train all weights. Write model.quantization=none."
        )
    estimator = config.estimator
    if not isinstance(estimator, ZerothOrderConfig):
        raise ConfigError(
            "fedzo bench step: estimator must make scalars, got one that computes gradients. A first-order step is "
            "measured beside ours in any case. Write estimator=two_point."
        )
    set_up_process(config.threads, config.device)
    loaded = (
        load_model(config.model, device=config.device, max_length=config.task.max_length)
        if shape is None
        else random_model(shape, device=config.device, dtype=TORCH_DTYPES[config.model.dtype])
    )
    if shape is not None and config.model.compile:
        loaded = compile_loaded(loaded, longest=config.task.max_length)
    check_format(config, loaded)
    if loaded.packed_as is not None:
        raise ConfigError(
            f"fedzo bench step: model.name must be a model of dense weights or a sketch, got {loaded.source!r}, whose "
            f"weights are stored packed (quant_method={loaded.packed_as}): the steps that fedzo is compared with train "
            "all weights. Name the model that it was packed from."
        )
    trainer = TRAINERS.build(config.trainer if config.inputs.artifact else config.trainer.for_timing())
    with tempfile.TemporaryDirectory() as folder:
        context = TrainerContext(folder=Path(folder), seed=0, texts=list, inputs=config.inputs)
        artifact = trainer.prepare(loaded, context).artifact
        built = trainer.build(loaded, artifact, distribution=estimator.distribution)
    longest, virtual = num_positions(loaded.model), num_virtual_tokens(loaded.model)
    if longest is not None and tokens + virtual > longest:
        most = longest - virtual
        raise ConfigError(f"--tokens must be at most {most} for {loaded.source!r}, got {tokens}. Lower it.")
    vocabulary = len(loaded.tokenizer)
    order = permutation(stream_key(0, round=0), vocabulary, purpose=PURPOSE_DATA).tolist()
    prompts = [tuple(order[(row * tokens + i) % vocabulary] for i in range(tokens)) for row in range(rows)]
    candidates = ((order[0],), (order[1],))
    examples = [Example(prompt=prompt, candidates=candidates, label=0) for prompt in prompts]
    loaded, lower = faster_forwards(
        loaded, built.space, config.model, estimator, longest=max(tokens, config.task.max_length)
    )
    return Bench(
        loaded=loaded,
        space=built.space,
        estimator=build_estimator(estimator),
        examples=examples,
        eps=estimator.float32_eps,
        num_probes=estimator.num_probes,
        lower=lower,
    )


def bench_step(bench: Bench, *, repeats: int, on_repeat: OnProgress) -> dict[str, Any]:
    """Time all contestants in turn, ``repeats`` times over, after rounds of warming up.

    Args:
        bench: What to step on.
        repeats: Timed rounds.
        on_repeat: Progress: (done, total).

    Returns:
        Plain JSON values: what was measured, the figures of each contestant, the environment. No memory is measured
        here, where a model and all contestants are: ``peak_bytes`` of each figure is None.
    """
    contestants = bench.contestants()
    timed = {name: partial(finish, work, bench.loaded.device) for name, work in contestants.items()}
    # what runs once a step is recorded and compared in so many, or compiled, which takes no more
    warm_ups = NUM_EAGER if bench.loaded.decoder else WARM_UPS
    seconds = interleaved(timed, repeats=repeats, warm_ups=warm_ups, on_repeat=on_repeat)
    model, rows = bench.loaded.model, len(bench.examples)
    return {
        "model": bench.loaded.source,
        "num_params": num_weights(model),
        "space_size": bench.space.size,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": bench.loaded.device.type,
        "device_name": _device_name(bench.loaded.device),
        "forwards": kind_of_forwards(bench.loaded),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "tokens": len(bench.examples[0].prompt),
        "repeats": repeats,
        "first_layer": len(bench.lower.blocks) if bench.lower else 0,
        "forwards_per_step": bench.estimator.forwards_per_step(bench.num_probes),
        "figures": [_figure(name, spent, seconds[BARE]) for name, spent in seconds.items()],
        "environment": environment(bench.loaded.device),
    }


def peak_bytes(config: LaunchConfig, name: str, *, shape: str | None, rows: int, tokens: int) -> int | None:
    """Most memory of one step of a contestant, weights included and what the process held before them left out.

    Forwards of a sketch and of its dense twin are measured as inference, without the space that steps move in. Call it
    in a fresh process: what earlier work left in the allocator would hide the peak.
    """
    before = resident_bytes()
    bench = open_bench(config, shape=shape, rows=rows, tokens=tokens)
    if bench.loaded.is_sketch and name in (BARE, DENSE):  # a space holds vectors, and all layers with their codes
        bench = replace(bench, space=DenseSpace([nn.Parameter(torch.zeros(1), requires_grad=False)]))
    if name == DENSE:
        make_dense(bench.loaded.model)
        name = BARE
    contestants = bench.contestants()
    if bench.loaded.decoder:  # its graphs keep memory, so there must be those of this contestant and no others
        for _ in range(NUM_EAGER):
            contestants[name]()
    else:
        contestants[BARE]()
    add_direction(torch.zeros(8), 0, scale=1.0)  # loads or compiles the CPU kernel, which is no step's memory
    peak = measure_peak_bytes(contestants[name], bench.loaded.device)
    return peak if peak is None or bench.loaded.device.type != "cpu" else peak - before


def finish(work: Work, device: torch.device) -> None:
    """Do work, and wait until its device has done it."""
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def kind_of_forwards(loaded: LoadedModel) -> str:
    """What a model's forwards are by now: eager, too, where its CUDA graphs were given up."""
    if isinstance(loaded.decoder, CapturedDecoder):
        return "eager" if loaded.decoder.captures.gave_up else "captured"
    return "compiled" if loaded.decoder else "eager"


def _figure(name: str, spent: list[float], bare: list[float]) -> dict[str, Any]:
    """One contestant's figures; the ratio is to the bare forwards of the same repeat."""
    ratios = [own / other for own, other in zip(spent, bare, strict=True)]
    return {
        "name": name,
        "median_s": statistics.median(spent),
        "quartiles_s": _quartiles(spent),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": _quartiles(ratios),
        "peak_bytes": None,
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
