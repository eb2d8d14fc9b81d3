"""What a user does with runs: start, resume, replay, export, evaluate, generate; and mask and doctor beside them."""

from __future__ import annotations

import json
import platform
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedzo.config.plugins import chosen_plugins
from fedzo.config.schema import RunConfig
from fedzo.config.travel import config_hash, from_json, is_same_run, save_yaml, to_json
from fedzo.errors import ConfigError, RunFolderError
from fedzo.evaluate.answers import evaluate
from fedzo.fl.log_store import PUBLIC, RunStore, best_round
from fedzo.fl.replica import Replica
from fedzo.models.generate import generate
from fedzo.records.decode import encode
from fedzo.records.log import CommittedLine
from fedzo.records.metrics import Summary
from fedzo.run.process import Process, forget_process, open_process
from fedzo.runtime.launch import launch
from fedzo.system import PACKAGES, default_threads, environment, package_version
from fedzo.trainers import Workplace

CONFIG, OVERRIDES, ENVIRONMENT = "config.json", "overrides.yaml", "environment.json"


def start_run(config: RunConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """Run a federation from its first round; everything it leaves is in ``run_dir``.

    Raises:
        RunFolderError: The folder holds a run already, or cannot be written.
    """
    if (run_dir / PUBLIC).exists():
        begun = (run_dir / PUBLIC).stat().st_size > 0
        start_again = "" if begun else "; the run has no round yet, so you may also remove the folder and start again"
        raise RunFolderError(
            f"run folder {run_dir}: it already holds a run. `fedzo resume {run_dir}`, or choose another{start_again}."
        )
    config = _with_absolute_paths(config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG).write_text(to_json(config), encoding="utf-8")
        save_yaml(config, run_dir / "config.yaml")
        (run_dir / OVERRIDES).write_text("".join(f"- {json.dumps(item)}\n" for item in overrides), encoding="utf-8")
        (run_dir / ENVIRONMENT).write_text(json.dumps(_environment(config), indent=2), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"run folder {run_dir}: cannot write ({error.strerror}). Choose another with hydra.run.dir=..."
        ) from error
    _launch(config, run_dir)


def start_or_resume_run(config: RunConfig, run_dir: Path, *, overrides: list[str]) -> None:
    """A sweep's job: run it, or go on with what an interrupted sweep left of it; a finished run is left alone.

    Raises:
        RunFolderError: The folder holds a run of other settings.
    """
    if not (run_dir / PUBLIC).exists():
        return start_run(config, run_dir, overrides=overrides)
    if not is_same_run(read_config(run_dir), _with_absolute_paths(config)):
        raise RunFolderError(
            f"run folder {run_dir}: it holds a run of other settings. Choose another with hydra.sweep.dir=..."
        )
    with RunStore(run_dir) as store:
        finished = bool(store.told(Summary))
    if not finished:
        resume_run(run_dir)


def resume_run(run_dir: Path) -> None:
    """Go on with a run that was stopped; it ends as if it had never been."""
    _launch(read_config(run_dir), run_dir)


def _launch(config: RunConfig, run_dir: Path) -> None:
    try:
        launch(config, run_dir.resolve(), config_json=to_json(config))
    finally:
        forget_process()


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of a run folder."""
    try:
        return from_json((run_dir / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"{run_dir}: not a run folder (no {CONFIG}). Give the folder that `fedzo train` printed."
        ) from error


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A run's model after some of its rounds, rebuilt from base weights and log alone."""

    process: Process
    replica: Replica
    rounds: list[CommittedLine]


def rebuild(run_dir: Path, *, rounds: int | None = None) -> Rebuilt:
    """Rebuild the model after ``rounds`` rounds (by default the best round, or the last of an unfinished run).

    Raises:
        ProtocolError: The log does not lead to the states that it claims.
    """
    config = read_config(run_dir)
    with RunStore(run_dir) as store:
        wanted = best_round(store, by=config.evaluation.best_by) if rounds is None else rounds
        if not 0 <= wanted <= len(store.records):
            raise ConfigError(f"rounds must be in 0..{len(store.records)} (the log's length), got {wanted}.")
        process = open_process(_uncompiled(config))
        peer = process.peer  # without rows to measure on: a rebuilt model is held in float32 where the choice was open
        artifact = peer.trainer.prepare(peer.loaded, _quiet_workplace(run_dir, config)).artifact
        replica = peer.workspace(artifact).replica
        for done in range(wanted):
            replica.advance([store.records[done]])
            replica.verify(store.rounds[done])
        return Rebuilt(process, replica, store.rounds[:wanted])


def replay_run(run_dir: Path, *, rounds: int | None = None) -> dict[str, object]:
    """Verify a log: rebuild every state from the base weights and compare it with the log's own hashes."""
    config = read_config(run_dir)
    if rounds is None:
        with RunStore(run_dir) as store:
            rounds = len(store.records)
    rebuilt = rebuild(run_dir, rounds=rounds)
    return {
        "rounds": len(rebuilt.rounds),
        "space_size": rebuilt.replica.space.size,
        "digest": rebuilt.replica.space.digest(),
        "chain": rebuilt.replica.chain.hex(),
        "config_hash": config_hash(config),
    }


def export_run(run_dir: Path, out_dir: Path, *, rounds: int | None = None) -> Path:
    """Write what a run made: a folder that plain transformers loads, or an adapter folder that plain PEFT loads."""
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ConfigError(f"OUT must be a new or empty folder, got {str(out_dir)!r}. Choose another.")
    rebuilt = rebuild(run_dir, rounds=rounds)
    loaded, built = rebuilt.process.peer.loaded, rebuilt.process.peer.built
    if built is not None and built.save is not None:
        built.save(out_dir)
        return out_dir
    model: Any = loaded.model
    model.save_pretrained(out_dir)
    loaded.tokenizer.save_pretrained(out_dir)
    return out_dir


def evaluate_run(run_dir: Path, *, split: str) -> dict[str, Any]:
    """Score the run's model (its best round) on the dev or test rows."""
    process = rebuild(run_dir).process
    peer, config = process.peer, process.peer.config
    score = evaluate(
        peer.loaded,
        process.server.examples(split),
        config.task,
        tokens_per_batch=config.model.tokens_per_batch,
    )
    return dict(encode(score))


def generate_run(run_dir: Path, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """Greedy continuations by the run's model (its best round)."""
    peer = rebuild(run_dir).process.peer
    ids = [tuple(peer.loaded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return generate(
        peer.loaded, ids, max_new_tokens=max_new_tokens, tokens_per_batch=peer.config.model.tokens_per_batch
    )


def _uncompiled(config: RunConfig) -> RunConfig:
    """The same run for work that does not repay a compiler's minutes."""
    return replace(config, model=replace(config.model, compile=False))


def make_mask(config: RunConfig, out: Path) -> dict[str, Any]:
    """Choose a mask as ``trainer=meerkat`` would and write it to a file."""
    from fedzo.masks.mask_file import save_mask
    from fedzo.trainers.meerkat import MeerkatConfig, choose_mask

    if not isinstance(config.trainer, MeerkatConfig):
        raise ConfigError("fedzo mask: trainer must be meerkat. Only a masked trainer has a mask.")
    process = open_process(_uncompiled(config))
    mask = choose_mask(config.trainer, process.peer.loaded, _quiet_workplace(out.parent, config, process))
    save_mask(mask, out)
    return {"path": str(out), "size": mask.size, "digest": mask.digest(), **mask.manifest}


def doctor() -> list[tuple[str, bool, str]]:
    """Whether this machine can take part: versions, devices, and directions against their golden key."""
    import torch

    from fedzo.zo.directions import direction, stream_key

    checks = [("python", sys.version_info >= (3, 11), platform.python_version())]
    for name in PACKAGES:
        found = package_version(name)
        checks.append((name, found is not None, found or "not installed"))
    checks.append(
        ("flwr is 1.41", (package_version("flwr") or "").startswith("1.41."), "the runtimes use private names of it")
    )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    checks.append(("device", True, f"{device}, {default_threads()} CPU threads"))
    bits = [f"{word:08x}" for word in direction(stream_key(0, round=0), 4).view("uint32")]
    golden = bits == ["bea7d6d0", "3e5d41d9", "3fd9904a", "401c6450"]
    checks.append(("directions", golden, "golden vector " + ("matches" if golden else f"differs: {bits}")))
    return checks


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Paths that every process of the run, and a later resume, can follow from anywhere."""
    config = deepcopy(config)
    for section, keys in [(config.data, ["path"]), *((plugin, plugin.paths) for _, plugin in chosen_plugins(config))]:
        for key in keys:
            if path := getattr(section, key):
                setattr(section, key, str(Path(path).expanduser().resolve()))
    if Path(config.model.name).expanduser().is_dir():
        config.model.name = str(Path(config.model.name).expanduser().resolve())
    return config


def _quiet_workplace(folder: Path, config: RunConfig, process: Process | None = None) -> Workplace:
    return Workplace(
        folder=folder,
        seed=config.seed,
        texts=process.server.training_prompts if process else partial(_no_texts, folder),
        advance=lambda done, total: None,
    )


def _no_texts(folder: Path) -> list[str]:
    raise RunFolderError(
        f"run folder {folder}: mask.safetensors must exist. The mask "
        "was chosen on the clients' texts and cannot be made again. Restore the file from a copy."
    )


def _environment(config: RunConfig) -> dict[str, Any]:
    return {**environment(), "config_hash": config_hash(config), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
