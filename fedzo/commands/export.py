"""``fedzo export``: what a run made, written as files that plain transformers and PEFT load."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path

from fedzo.commands.run_folder import rebuild
from fedzo.config.plugins import option_of
from fedzo.errors import ConfigError, RunFolderError
from fedzo.models.generate import answer_ends, end_tokens
from fedzo.models.loaded import LoadedModel
from fedzo.models.saved import save_model, whole_folder
from fedzo.models.sketched.folder import write_sketch
from fedzo.models.sketched.layers import make_dense
from fedzo.models.sketched.table_file import write_tables
from fedzo.records.folder import raised_as
from fedzo.sketch import tables_of


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
    peer = rebuild(run_dir, rounds=rounds).process.peer
    loaded = peer.loaded
    save = None if peer.built is None else peer.built.save
    if form is not Form.model and (save is not None or not loaded.is_sketch):
        raise ConfigError(
            f"--{form} must be given for a run that trained the tables of a sketch, got {str(run_dir)!r} with "
            f"{option_of(peer.config, 'trainer')}. Leave it out."
        )
    if form is Form.tables:
        write_tables(out, tables_of(loaded.model), base_digest=loaded.base_digest)
        return out
    if form is Form.dense:
        make_dense(loaded.model)
    remedy = "Make room or choose another folder; nothing was left there."
    with raised_as(RunFolderError, f"OUT {str(out)!r}: it must be writable", remedy), whole_folder(out) as folder:
        if save is not None:
            save(folder)
        else:
            _save_model(loaded, folder, ends=answer_ends(loaded.tokenizer, peer.config.task.kind))
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
