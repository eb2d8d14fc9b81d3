"""What a judge's answer means: nothing but a whole, well-formed verdict accepts a rewrite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedzo.data.preprocess.backend import Completion, RowFault, RowReason
from fedzo.data.preprocess.rephrase.prompts import DIFFERENT, SAME

_LITERAL = {SAME: SAME, "not the same": DIFFERENT}
_MAX_CHARS = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer that could be read.

    Attributes:
        same: Whether the two texts mean the same.
        label: The answer that the judge gives to the task; None where it names none.
    """

    same: bool
    label: str | None


def verdict_of(answer: Completion | RowFault, labels: Sequence[str]) -> Verdict | RowFault | None:
    """What a call to a judge says: its verdict, its fault, or None for a whole answer that is no verdict."""
    if isinstance(answer, RowFault):
        return answer
    return read_verdict(answer.text, labels) if answer.whole else RowFault(RowReason.cut_off)


def read_verdict(text: str, labels: Sequence[str]) -> Verdict | None:
    """The verdict of an answer; None where it is no verdict.

    An answer is a JSON object with ``verdict`` and, for a task with labels, ``predicted_label``, and nothing else; or
    the literal ``same`` or ``not the same``, case and full stop aside. A word within a sentence is no verdict.

    Args:
        text: As it came.
        labels: What the label may be; empty for a task without labels.
    """
    whole = text.strip()
    if len(whole) > _MAX_CHARS:
        return None
    literal = _LITERAL.get(" ".join(whole.removesuffix(".").casefold().split()))
    if literal is not None:
        return Verdict(literal == SAME, None)
    try:
        plain = json.loads(whole, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    if not isinstance(plain, dict) or plain.keys() != ({"verdict", "predicted_label"} if labels else {"verdict"}):
        return None
    verdict, label = plain["verdict"], plain.get("predicted_label")
    if verdict not in (SAME, DIFFERENT) or (labels and label not in labels):
        return None
    return Verdict(verdict == SAME, label)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys differ: of two verdicts none counts."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)
