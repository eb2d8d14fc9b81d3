"""Masks: the random one of a large model, the study's on SmolLM2, and sensitivity within the memory of a small card."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import card
import torch
from card import Case, Figure, Goal, Result

from fedzo.bench.measure import measure_peak_bytes
from fedzo.bench.shapes import random_model
from fedzo.config.load import load
from fedzo.masks.eligible import eligible_parameters
from fedzo.masks.grouped import plan_groups
from fedzo.masks.mask import Mask
from fedzo.masks.mask_file import save_mask
from fedzo.masks.select import Selector, select_mask
from fedzo.models.memory import calibration_memory_bytes, weights_bytes
from fedzo.run.peer import open_model
from fedzo.trainers import TrainerContext
from fedzo.trainers.meerkat import choose_mask
from fedzo.zo.directions import PURPOSE_DATA, lots, permutation, stream_key

RUNS = Path("runs/gpu")
MASK = RUNS / "mask-c4.safetensors"
"""The study's, for the runs of ``run_cases``."""
DENSITY = 1e-3
LOTS = 1 << 24
STUDY_WINDOWS, WINDOWS, WINDOW = 100, 8, 256
"""How many windows of text the study's mask takes, how many a large one does here, and the tokens of each."""
LARGE = {"llama-2-7b": ("Llama-2-7B's shape", 24), "opt-13b": ("OPT-13B's shape", 40)}
"""Title, and GiB of the card that the mask is to fit on."""
RANDOM = "the random mask of OPT-1.3B's shape, a billion eligible weights"
STUDY = f"Meerkat's mask of SmolLM2 on {STUDY_WINDOWS} windows of {WINDOW} tokens, after loading"


# --- measuring --------------------------------------------------------------------------------------------------------


def random_mask() -> Result:
    """As `fedzo mask` draws it; the CPU draws the same words."""
    model = random_model("opt-1.3b", device=card.DEVICE.type, dtype=torch.bfloat16).model
    seconds = []
    for _ in range(3):
        card.finish()
        begin = time.perf_counter()
        found = select_mask(model, density=DENSITY, selector=Selector.random, seed=3)  # the mask is on the CPU
        seconds.append(time.perf_counter() - begin)
    key, cpu = stream_key(3, round=0), torch.device("cpu")
    lots(key, 1, cpu)  # compiles the CPU's kernel
    begin = time.perf_counter()
    here = lots(key, LOTS, cpu)
    on_cpu = time.perf_counter() - begin
    assert torch.equal(lots(key, LOTS, card.DEVICE).cpu(), here)
    eligible = int(found.manifest["num_eligible"])
    return {"rows": [{"eligible": eligible, "seconds": seconds, "cpu_seconds_of_lots": on_cpu * eligible / LOTS}]}


def study_mask() -> Result:
    """From the text to the chosen weights; the mask is kept for runs of the study."""
    text = study_data() / "c4" / "train.jsonl"
    calibration = ["trainer.calibration=file", f"inputs.calibration={text}"]
    size = [f"trainer.calibration_docs={STUDY_WINDOWS}", f"trainer.calibration_tokens={WINDOW}"]
    words = ["trainer=meerkat", f"trainer.density={DENSITY}", *calibration, *size, f"device={card.DEVICE.type}"]
    config = load(words)
    loaded = open_model(config.site(), config.task.max_length)
    RUNS.mkdir(parents=True, exist_ok=True)
    context = TrainerContext(folder=RUNS, seed=config.seed, texts=list, inputs=config.inputs)
    card.finish()
    begin = time.perf_counter()
    mask = choose_mask(config.trainer, loaded, context)
    seconds = time.perf_counter() - begin
    save_mask(mask, MASK)
    return {"seconds": seconds, "size": mask.size}


def study_data() -> Path:
    """The folder of the data sets of ``experiments/meerkat``."""
    folder = Path(os.environ.get("FEDZO_STUDY_DATA", "data"))
    if not (folder / "c4" / "train.jsonl").is_file():
        raise FileNotFoundError(f"FEDZO_STUDY_DATA must name a folder with sst2, ag_news and c4, got {str(folder)!r}")
    return folder.resolve()


def large_mask(shape: str, *, in_one_pass: bool) -> Result:
    """A mask by sensitivity, on a card that has no more than the GiB of ``LARGE``.

    Args:
        shape: A key of ``LARGE``.
        in_one_pass: Whether the mask is also made with all sums at once, beyond these GiB, and compared.
    """
    model: Any = random_model(shape, device=card.DEVICE.type, dtype=torch.bfloat16).model
    room = LARGE[shape][1] << 30
    windows = [window_of(model.config.vocab_size, number) for number in range(WINDOWS)]
    made: list[Mask] = []

    def choose(memory_bytes: float) -> None:
        made.append(select_mask(model, density=DENSITY, windows=windows, memory_bytes=memory_bytes))

    with limited(room):
        left = room - (card.held_bytes() or weights_bytes(model))
        memory_bytes = calibration_memory_bytes(model, num_tokens=WINDOW, available_bytes=left)
        begin = time.perf_counter()
        peak = measure_peak_bytes(partial(choose, memory_bytes), card.DEVICE)
        seconds = time.perf_counter() - begin
    sizes = {name: each.numel() for name, each in eligible_parameters(model).items()}
    if in_one_pass:
        choose(float("inf"))
    return {
        "peak_bytes": peak,
        "seconds": seconds,
        "windows": WINDOWS,
        "sums_bytes": memory_bytes,
        "groups": len(plan_groups(sizes, memory_bytes)),
        **({"others": share_of_others(*made)} if in_one_pass else {}),
    }


def window_of(vocabulary: int, number: int) -> torch.Tensor:
    """A text of random tokens, int64 [WINDOW]: neither memory nor time depends on what it says."""
    return torch.from_numpy(permutation(stream_key(0, round=number), vocabulary, purpose=PURPOSE_DATA)[:WINDOW].copy())


@contextmanager
def limited(room: int) -> Iterator[None]:
    """Let torch take no more of the card than so many bytes."""
    if card.DEVICE.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(card.DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / whole), card.DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card.DEVICE)


def share_of_others(found: Mask, other: Mask) -> float:
    """The share of a mask's weights that the other has not."""
    none = torch.empty(0, dtype=torch.int64)
    common = sum(int(torch.isin(flat, other.indices.get(name, none)).sum()) for name, flat in found.indices.items())
    return 1 - common / found.size


# --- figures ----------------------------------------------------------------------------------------------------------


def random_figures(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        yield RANDOM, statistics.median(row["seconds"]) / (row["eligible"] / 1e9), "s"


def study_figures(result: Result) -> Iterator[Figure]:
    yield STUDY, result["seconds"], "s"


def large_name(shape: str) -> str:
    title, gib = LARGE[shape]
    return f"a sensitivity mask of {title} in bfloat16 with {gib} GiB"


def large_figures(shape: str, result: Result) -> Iterator[Figure]:
    if result["peak_bytes"] is not None:
        yield f"{large_name(shape)}, peak memory", result["peak_bytes"] / 2**30, "GiB"
    yield f"{large_name(shape)}, groups", result["groups"], ""
    if "others" in result:
        yield f"{large_name(shape)}, weights that one pass would not choose", result["others"], "share"


def large_case(shape: str, *, in_one_pass: bool) -> Case:
    goals = {f"{large_name(shape)}, peak memory": Goal(LARGE[shape][1], "GiB")}
    if in_one_pass:
        goals[f"{large_name(shape)}, weights that one pass would not choose"] = Goal(0.0, "share")
    return Case(partial(large_mask, shape, in_one_pass=in_one_pass), partial(large_figures, shape), goals)


MASKS = {
    "mask": Case(random_mask, random_figures, {RANDOM: Goal(2.0, "s")}),
    "mask-smollm2": Case(study_mask, study_figures, {STUDY: Goal(10.0, "s")}),
}
LARGE_MASKS = {
    f"mask-{shape}": large_case(shape, in_one_pass=shape == "llama-2-7b")
    for shape in LARGE  # sums at once: 65 GB
}
