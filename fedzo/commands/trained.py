"""What a run's folder is good for after it: verify the log, export the model, score it, let it write."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedzo.commands.answer import prompt_ids
from fedzo.commands.run_folder import read_run, rebuild
from fedzo.config.plugins import option_of
from fedzo.config.travel import config_hash
from fedzo.data.chat import chat_end
from fedzo.data.config import TaskKind
from fedzo.data.kept_digests import KEPT_ROWS
from fedzo.errors import ConfigError, RunFolderError
from fedzo.evaluate import evaluate
from fedzo.fl.log_store import RunLog
from fedzo.models.generate import end_tokens, generate
from fedzo.models.loaded import LoadedModel
from fedzo.models.saved import save_model, whole_folder
from fedzo.models.sketched.folder import write_sketch
from fedzo.models.sketched.layers import make_dense
from fedzo.models.sketched.table_file import write_tables
from fedzo.records.decode import encode
from fedzo.records.folder import METRICS, told_as
from fedzo.records.metrics import Extension
from fedzo.sketch import tables_of


def replay_run(run_dir: Path, *, rounds: int | None = None) -> dict[str, object]:
    """Verify a log: rebuild every state from the base weights and compare it with the log's own hashes.

    Returns:
        What was found; ``extended`` says where the run was made longer, as far as the metrics are there to tell.
    """
    config, log = read_run(run_dir), RunLog(run_dir)
    longer = log.metrics_of(Extension) if (run_dir / METRICS).exists() else []
    extended = [{"round": each.round, "before": each.before, "rounds": each.rounds} for each in longer]
    rebuilt = rebuild(run_dir, rounds=len(log.records) if rounds is None else rounds)
    return {
        "rounds": rebuilt.replica.position,
        "space_size": rebuilt.replica.space.size,
        "digest": rebuilt.replica.digest(),
        "chain": rebuilt.replica.chain.hex(),
        "config_hash": config_hash(config),
        **({"extended": extended} if extended else {}),
    }


class Form(StrEnum):
    """What is written of a run whose model is a sketch."""

    model = "model"
    """The model as it is: a sketch with the trained tables. Of other runs an ordinary model, or an adapter."""
    tables = "tables"
    """The trained tables alone, in one file."""
    dense = "dense"
    """An ordinary model of dense layers that computes the same."""


def export_run(run_dir: Path, out: Path, *, rounds: int | None = None, form: str = Form.model) -> Path:
    """Write what a run made: a folder that plain transformers loads, or an adapter folder that plain PEFT loads.

    Args:
        run_dir: The run.
        out: What is written: a new or empty folder, for tables alone a new file.
        rounds: Rounds to apply, by default those up to the best one.
        form: A ``Form``, for a sketch.

    Raises:
        ConfigError: There is something at ``out``, or another form is asked of a run that trained no sketch.
        RunFolderError: It cannot be written.
    """
    form = Form(form)
    if out.exists() and (form is Form.tables or not (out.is_dir() and not any(out.iterdir()))):
        new = "file" if form is Form.tables else "or empty folder"
        raise ConfigError(f"OUT must be a new {new}, got {str(out)!r}. Choose another.")
    rebuilt = rebuild(run_dir, rounds=rounds)
    loaded, built = rebuilt.process.peer.loaded, rebuilt.process.peer.built
    save = None if built is None else built.save
    if form is not Form.model and (save is not None or not loaded.is_sketch):
        raise ConfigError(
            f"--{form} must be given for a run that trained the tables of a sketch, got {str(run_dir)!r} with "
            f"{option_of(rebuilt.process.peer.config, 'trainer')}. Leave it out."
        )
    if form is Form.tables:
        write_tables(out, tables_of(loaded.model), base_digest=loaded.base_digest)
        return out
    if form is Form.dense:
        make_dense(loaded.model)
    remedy = "Make room or choose another folder; nothing was left there."
    with told_as(RunFolderError, f"OUT {str(out)!r}: it must be writable", remedy), whole_folder(out) as folder:
        if save is not None:
            save(folder)
        else:
            is_chat = rebuilt.process.peer.config.task.kind is TaskKind.instruction
            _save_model(loaded, folder, ends=chat_end(loaded.tokenizer) if is_chat else set())
    return out


def _save_model(loaded: LoadedModel, folder: Path, *, ends: set[int]) -> None:
    """``ends`` are tokens that end an answer beside the checkpoint's own: whoever loads the folder stops there, too."""
    if loaded.is_sketch:
        write_sketch(loaded.model, loaded.tokenizer, None, {}, folder, source_digest=loaded.base_digest)
    else:
        save_model(loaded.model, loaded.tokenizer, folder)
    if ends:  # in the file: transformers saves odd settings as they were loaded, but none that were changed
        file = folder / "generation_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["eos_token_id"] = sorted(end_tokens(loaded) | ends)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def evaluate_run(run_dir: Path, *, split: str) -> dict[str, Any]:
    """Score the run's model (its best round) on the dev or test rows, by each evaluator of the run.

    Returns:
        The scores by the evaluators' names.

    Raises:
        ConfigError: The run has no such rows.
        RowsChangedError: The rows are not those that the run began with.
    """
    config, lacks = read_run(run_dir), ""
    if config.partition.traits.own_rows:
        lacks = f"all rows of {option_of(config, 'partition')} are its clients'"
    elif getattr(config.split, f"num_{split}") == 0:
        lacks = f"it began with split.num_{split}=0"
    if lacks:
        raise ConfigError(
            f"{run_dir}: it must have {split} rows to score, but {lacks}. `fedzo export` writes its model, which other "
            "programs can score."
        )
    process = rebuild(run_dir).process
    if (run_dir / KEPT_ROWS).exists():
        process.server.check_rows(begun=True)
    peer, examples = process.peer, process.server.examples(split)
    task, tokens_per_batch = peer.config.task, peer.site.model.tokens_per_batch
    return {
        name: encode(evaluate(name, evaluator, peer.loaded, examples, task, tokens_per_batch=tokens_per_batch))
        for name, evaluator in peer.evaluators.items()
    }


def generate_run(run_dir: Path, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """Greedy continuations by the run's model (its best round), which end where the score of its task reads to.

    Of an instruction run they are answers to a chat's user, of a run of ``kind=generation`` one line.
    """
    peer = rebuild(run_dir).process.peer
    kind = peer.config.task.kind
    ids, ends = prompt_ids(peer.loaded, prompts, chat=kind is TaskKind.instruction)
    return generate(
        peer.loaded,
        ids,
        max_new_tokens=max_new_tokens,
        tokens_per_batch=peer.site.model.tokens_per_batch,
        ends=ends,
        stop_at_newline=kind is TaskKind.generation,
    )
