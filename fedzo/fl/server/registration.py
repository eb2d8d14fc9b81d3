"""What a client registers, judged: whether it belongs to the run, and holds what it held when it registered first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedzo.errors import ProtocolError
from fedzo.fl.messages import HelloReply, Identity
from fedzo.records.decode import decode_json
from fedzo.records.fields import Figures, LabelCounts


@dataclass(frozen=True, slots=True)
class First:
    """What a client registered with at first.

    Attributes:
        reply: Its registration.
        label_counts: Its training rows by label; None where the server was not told.
    """

    reply: HelloReply
    label_counts: Mapping[str, int] | None


def registration_problem(reply: HelloReply, *, identity: Identity, num_labels: int, first: First | None = None) -> str:
    """Why a client does not belong to the run, or an empty string: all peers must mean the same run.

    Args:
        reply: What it answers to a greeting.
        identity: What the server holds.
        num_labels: Labels of the task; 0 where clients tell no counts.
        first: What the client registered with before.
    """
    peers = {"configuration": (identity.config_hash, reply.config_hash)}
    if not reply.refusal:  # which says nothing of what the client holds
        peers |= {
            "base weights": (identity.base_digest, reply.base_digest),
            "tokenizer": (identity.tokenizer_digest, reply.tokenizer_digest),
            "task": (identity.task_digest, reply.task_digest),
        }
    for what, (ours, theirs) in peers.items():
        if ours != theirs:
            told = f"its {what} must be the server's ({ours[:12]}), got {theirs[:12]}"
            return f"{told}. Give both sides the same model, task and configuration."
    if reply.refusal:
        return ""
    if reply.prepared > reply.preparing:
        return f"no more rows can be prepared than the {reply.preparing} that it prepares, got {reply.prepared}."
    return "" if reply.preparing else _rows_problem(reply, num_labels=num_labels, first=first)


def _rows_problem(reply: HelloReply, *, num_labels: int, first: First | None) -> str:
    if reply.num_train < 1:
        return f"it must have at least one training row, got {reply.num_train}."
    if reply.num_train_cut > reply.num_train or reply.num_heldout_cut > reply.num_heldout:
        return "no more of its rows can be cut than it has."
    try:
        counts = label_counts_of(reply)
    except ProtocolError:
        return f"label_counts must be a JSON object of counts, got {reply.label_counts!r:.80}."
    try:
        figures_of(reply)
    except ProtocolError:
        return f"stages must be a JSON object of at most 64 finite numbers by name, got {reply.stages!r:.80}."
    labels = {str(label) for label in range(num_labels)}
    if not labels.issuperset(counts) or sum(counts.values()) != (reply.num_train if labels else 0):
        return (
            f"label_counts must count its {reply.num_train} training rows by label (0 to {num_labels - 1}), or be "
            f"empty where the task has none, got {reply.label_counts!r:.80}."
        )
    if first is None:
        return ""
    before = counts if first.label_counts is None else first.label_counts
    if (reply.num_train, counts) != (first.reply.num_train, before):
        return (
            f"it must hold the rows that it registered with ({first.reply.num_train} to train), "
            f"got {reply.num_train}. Its weight and its data position depend on them."
        )
    if first.reply.rows_digest != reply.rows_digest:
        return (
            "the digest of its rows must be the one that it registered with, got another. "
            "Put its rows, what its stages made of them, and the secret with which its site makes the digest, back."
        )
    return ""


def label_counts_of(reply: HelloReply) -> dict[str, int]:
    """Training rows by label; ``ProtocolError`` for anything else."""
    counts: dict[str, int] = decode_json(LabelCounts, reply.label_counts, where="label_counts", error=ProtocolError)
    return counts


def figures_of(reply: HelloReply) -> dict[str, float]:
    """What the client's stages tell of its rows, by name; ``ProtocolError`` for anything else."""
    figures: dict[str, float] = decode_json(Figures, reply.stages, where="stages", error=ProtocolError)
    return figures
