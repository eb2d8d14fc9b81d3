"""``fedzo evaluate``: the model of a run, scored on dev or test rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedzo.commands.run_folder import read_run, rebuild
from fedzo.config.plugins import option_of
from fedzo.data.kept_digests import KEPT_ROWS
from fedzo.errors import ConfigError
from fedzo.evaluate import evaluate
from fedzo.records.decode import encode


def evaluate_run(run_dir: Path, *, split: str, rounds: int | None = None) -> dict[str, Any]:
    """Score the run's model on the dev or test rows, by each evaluator of the run, in forwards like the run's own.

    Args:
        run_dir: The run folder.
        split: Which rows.
        rounds: After which to score it; None for the best round.

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
    built = rebuild(run_dir, rounds=rounds)
    process, workspace = built.process, built.workspace
    if (run_dir / KEPT_ROWS).exists():
        process.server.check_rows(begun=True)
    peer, examples = process.peer, process.server.examples(split)
    loaded, task, most = workspace.loaded, peer.config.task, workspace.tokens_per_batch
    return {
        name: encode(evaluate(name, evaluator, loaded, examples, task, tokens_per_batch=most))
        for name, evaluator in peer.evaluators.items()
    }
