"""What a run's folder is good for after it: verify the log, export the model, score it, let it write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedzo.commands.run_folder import read_run, rebuild
from fedzo.config.travel import config_hash
from fedzo.data.encode import encode_prompts
from fedzo.errors import ConfigError
from fedzo.evaluate import evaluate
from fedzo.fl.log_store import METRICS, RunLog
from fedzo.models.checks import check_ids
from fedzo.models.generate import generate
from fedzo.records.decode import encode
from fedzo.records.metrics import Extension


def replay_run(run_dir: Path, *, rounds: int | None = None) -> dict[str, object]:
    """Verify a log: rebuild every state from the base weights and compare it with the log's own hashes.

    Returns:
        What was found; ``extended`` says where the run was made longer, as far as the metrics are there to tell.
    """
    config, log = read_run(run_dir), RunLog(run_dir)
    longer = log.told(Extension) if (run_dir / METRICS).exists() else []
    extended = [{"round": each.round, "before": each.before, "rounds": each.rounds} for each in longer]
    rebuilt = rebuild(run_dir, rounds=len(log.records) if rounds is None else rounds)
    return {
        "rounds": len(rebuilt.rounds),
        "space_size": rebuilt.replica.space.size,
        "digest": rebuilt.replica.space.digest(),
        "chain": rebuilt.replica.chain.hex(),
        "config_hash": config_hash(config),
        **({"extended": extended} if extended else {}),
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
    """Score the run's model (its best round) on the dev or test rows, by each evaluator of the run.

    Returns:
        The scores by the evaluators' names.
    """
    process = rebuild(run_dir).process
    peer, examples = process.peer, process.server.examples(split)
    task, tokens_per_batch = peer.config.task, peer.site.model.tokens_per_batch
    return {
        name: encode(evaluate(name, evaluator, peer.loaded, examples, task, tokens_per_batch=tokens_per_batch))
        for name, evaluator in peer.evaluators.items()
    }


def generate_run(run_dir: Path, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """Greedy continuations by the run's model (its best round)."""
    peer = rebuild(run_dir).process.peer
    ids = encode_prompts(prompts, peer.loaded.tokenizer)
    for number, tokens in enumerate(ids):
        check_ids(peer.loaded.model, tokens, where=f"prompt {number}")
    return generate(peer.loaded, ids, max_new_tokens=max_new_tokens, tokens_per_batch=peer.site.model.tokens_per_batch)
