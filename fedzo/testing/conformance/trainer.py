"""What every trainer must do: lead all peers to the same space, from the model and the artifact alone, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedzo.errors import FedzoError
from fedzo.testing.conformance.bits import global_generators, model_bits, must, must_be_same_model
from fedzo.testing.conformance.space import check_space
from fedzo.trainers import Built, InputsConfig, Prepared, Trainer, TrainerContext
from fedzo.trainers.artifacts import Artifact, ArtifactStore
from fedzo.zo.config import Distribution

if TYPE_CHECKING:
    from fedzo.models.loaded import LoadedModel

_IDS = torch.arange(24).reshape(2, 12) * 7 % 256
_TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs and looks back at them." * 2 for i in range(40)]
_FOREIGN = b"an artifact that no trainer made"
_RUN_SEED = 7


def check_trainer(
    make: Callable[[], Trainer],
    load: Callable[[], LoadedModel] | None = None,
    *,
    held_in: torch.dtype = torch.float32,
    inputs: InputsConfig | None = None,
) -> None:
    """Check that a trainer keeps the contract of ``fedzo.trainers.Trainer``.

    - ``prepare`` leaves the model as it was, and gives the same artifact when it is called again in its folder. A
      gradient is float32 [n].
    - ``build`` leads peers that load the model anew to the same space, from the artifact alone.
    - That space passes ``check_space``, for both laws of z.
    - ``reset`` brings the base back after any moves.
    - An artifact that is cut short, longer or made by someone else is refused by a ``FedzoError``, and the model is as
      before. A trainer whose artifact is empty may ignore it instead.
    - ``save``, where there is one, writes a folder and moves nothing.
    - The global random generators are neither used nor needed.

    Args:
        make: Makes the trainer, for example ``lambda: TRAINERS.build(LoraTrainerConfig())``.
        load: Loads a causal language model that takes token ids below 256, always the same one. By default the tiny
            llama of ``fedzo.testing.tiny_models``, in float32.
        held_in: The dtype that holds the trained values: float32 where there is a master, else that of the weights.
        inputs: Files that the user gave, for a trainer that needs one (``TrainerContext.inputs``). By default none.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """
    load = load or _tiny_llama
    with tempfile.TemporaryDirectory() as temporary:
        prepared = _check_prepare(make, load, Path(temporary), inputs or InputsConfig())
        _check_peers(make, load, prepared)
        for law in Distribution:
            _check_built_space(make, load, prepared.artifact, law, held_in)
        _check_reset_and_save(make, load, prepared.artifact, Path(temporary) / "saved")
        _check_refusals(make, load, prepared.artifact, ArtifactStore(Path(temporary) / "wrong"))


def _tiny_llama() -> LoadedModel:
    from fedzo.testing.tiny_models import tiny_loaded  # transformers, which the other checks do not need

    return tiny_loaded()


def _build(trainer: Trainer, loaded: LoadedModel, artifact: Artifact) -> Built:
    return trainer.build(loaded, artifact, distribution=Distribution.gaussian)


def _check_prepare(
    make: Callable[[], Trainer], load: Callable[[], LoadedModel], folder: Path, inputs: InputsConfig
) -> Prepared:
    loaded = load()
    before = model_bits(loaded.model)
    place = TrainerContext(folder=folder, seed=_RUN_SEED, texts=lambda: list(_TEXTS), inputs=inputs)
    with global_generators(1):
        first = make().prepare(loaded, place)
    must_be_same_model(model_bits(loaded.model), before, "prepare must leave the model as it was")
    with global_generators(2):
        again = make().prepare(load(), place)
    must(
        again.artifact.digest == first.artifact.digest,
        f"prepare called again in its folder must give the same artifact; it gave {first.artifact.size} bytes, then "
        f"{again.artifact.size} bytes, which differ",
    )
    same = (first.gradient is None and again.gradient is None) or (
        first.gradient is not None and again.gradient is not None and torch.equal(first.gradient, again.gradient)
    )
    must(same, "prepare called again in its folder must give the same gradient")
    for file in folder.iterdir():
        if file.is_file():
            file.write_bytes(b"of a start with other settings")
    anew = make().prepare(load(), replace(place, resumed=False))
    must(
        anew.artifact.digest == first.artifact.digest,
        "prepare must read no file of its folder where context.resumed is false, and then give the same artifact",
    )
    return first


def _check_peers(make: Callable[[], Trainer], load: Callable[[], LoadedModel], prepared: Prepared) -> None:
    spaces = []
    for seed in (1, 2):
        with global_generators(seed):
            spaces.append(_build(make(), load(), prepared.artifact).space)
    sizes = [space.size for space in spaces]
    must(sizes[0] == sizes[1], f"two peers must build the same space from one artifact, they have sizes {sizes}")
    digests = [space.digest() for space in spaces]
    must(digests[0] == digests[1], f"two peers must build the same values from one artifact, digests are {digests}")
    if (gradient := prepared.gradient) is not None:
        good = gradient.dtype == torch.float32 and gradient.shape == (sizes[0],) and gradient.device.type == "cpu"
        seen = f"{gradient.dtype} {list(gradient.shape)} on {gradient.device}"
        must(good, f"prepare's gradient must be float32 [{sizes[0]}] on the CPU, got {seen}")


def _check_built_space(
    make: Callable[[], Trainer],
    load: Callable[[], LoadedModel],
    artifact: Artifact,
    law: Distribution,
    held_in: torch.dtype,
) -> None:
    loads: dict[nn.Module, LoadedModel] = {}

    def make_model() -> nn.Module:
        loaded = load()
        loads[loaded.model] = loaded
        return loaded.model

    check_space(
        lambda model: make().build(loads[model], artifact, distribution=law).space,
        make_model,
        outputs=_logits,
        held_in=held_in,
        distribution=law,
    )


def _logits(model: nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=_IDS.to(device)).logits
    return logits


def _check_reset_and_save(
    make: Callable[[], Trainer], load: Callable[[], LoadedModel], artifact: Artifact, folder: Path
) -> None:
    loaded = load()
    built = _build(make(), loaded, artifact)
    base, bits = built.space.digest(), model_bits(loaded.model)
    for _ in range(2):
        built.space.step(0.25, 3)
        built.space.scale_by(0.5)
        if built.save is not None and not folder.exists():
            moved = built.space.digest()
            built.save(folder)
            written = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
            must(bool(written), f"save must write what was trained into the folder it is given, {folder} holds nothing")
            must(built.space.digest() == moved, "save must leave the trained values as they are")
        built.reset()
        found = built.space.digest()
        must(found == base, f"reset must bring the base values back, whose digest is {base}; it is {found}")
        must_be_same_model(model_bits(loaded.model), bits, "reset must bring the base model back")


def _check_refusals(
    make: Callable[[], Trainer], load: Callable[[], LoadedModel], artifact: Artifact, store: ArtifactStore
) -> None:
    loaded = load()
    bits = model_bits(loaded.model)
    if content := artifact.read():
        wrong = {
            "empty": b"",
            "cut short by a byte": content[:-1],
            "cut in half": content[: len(content) // 2],
            "longer by a byte": content + b"\0",
            "foreign": _FOREIGN,
        }
        for what, data in wrong.items():
            with _only_fedzo_errors(what) as refused:
                _build(make(), loaded, store.put(data))
            must(bool(refused), f"build must refuse an artifact that is {what} by a FedzoError, but it took it")
            must_be_same_model(
                model_bits(loaded.model), bits, f"after an artifact that is {what} was refused, the model"
            )
    else:
        with _only_fedzo_errors("foreign"):
            _build(make(), loaded, store.put(_FOREIGN))
    expected = _build(make(), load(), artifact).space.digest()
    found = _build(make(), loaded, artifact).space.digest()
    must(found == expected, f"after wrong artifacts the right one must build the same space, {expected}, got {found}")


@contextmanager
def _only_fedzo_errors(what: str) -> Iterator[list[FedzoError]]:
    """Collects the error by which an artifact is refused."""
    refused: list[FedzoError] = []
    try:
        yield refused
    except FedzoError as error:
        refused.append(error)
    except Exception as error:
        raise AssertionError(
            f"build must refuse an artifact that is {what} by a FedzoError that says what is wrong, it raised {error!r}"
        ) from error
